"""Where the weights come from that estimates of alpha are tried on: trainings and known spectra."""

from __future__ import annotations

import itertools
import math
import runpy
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer

EXAMPLES = Path(__file__).parents[1] / "examples"
SEED = 0  # of every training: initial weights and batches

Anchors = Mapping[int, Sequence[int]]
# A step, twenty and a hundred after each anchor.
FROM_START: Anchors = {0: (1, 20, 100), 20: (21, 40, 100), 100: (101, 120, 200)}
FINE_TUNING: Anchors = {0: (1, 20, 60), 20: (60,)}
# The operator starts from weights of 1 / width^2 and leaves them at once.
OPERATOR: Anchors = {100: (101, 110, 200), 400: (401, 410, 600), 1000: (1001, 1020, 1100)}
QUICK: Anchors = {0: (1, 4), 4: (5, 8)}


@dataclass(frozen=True)
class Training:
    """A training, and when to look at its weights.

    Attributes:
        source, name: Which table it belongs to, and its own name.
        begin: Gives a new model and the function that trains it for a step.
        anchors: Steps after which anchors are taken, and steps after which each is compared.
    """

    source: str
    name: str
    begin: Callable[[], tuple[nn.Module, Callable[[], object]]]
    anchors: Anchors


def trainings(data: Path, quick: bool = False) -> list[Training]:
    """All trainings; downloads what they read from ``data`` unless it is there."""
    plans = (QUICK,) * 3 if quick else (FROM_START, FINE_TUNING, OPERATOR)
    from_start, fine_tuning, operator = plans
    fetch = runpy.run_path(str(EXAMPLES / "fetch.py"))
    for name in ("minilm", "darcy"):
        fetch["fetch"](fetch["SOURCES"][name], data / name)

    def adam(model: nn.Module) -> Optimizer:
        return Adam(model.parameters(), lr=1e-3)

    def sgd(model: nn.Module) -> Optimizer:
        return SGD(model.parameters(), lr=0.1, momentum=0.9)

    return [
        Training("init", "mlp-adam", lambda: mlp(adam), from_start),
        Training("init", "mlp-sgd", lambda: mlp(sgd), from_start),
        Training("init", "tf-adam", lambda: transformer(adam), from_start),
        Training("init", "tf-sgd", lambda: transformer(sgd), from_start),
        Training("fine", "minilm", lambda: minilm(data / "minilm", 1e-4), fine_tuning),
        Training("fine", "minilm-5e-4", lambda: minilm(data / "minilm", 5e-4), fine_tuning),
        Training("darcy", "fno", lambda: darcy(data / "darcy"), operator),
    ]


# Trainings -----------------------------------------------------------------------------------


@lru_cache
def text(*packages: str) -> Tensor:
    """Bytes of the Python sources of the standard library, or of packages of it, 2 MB at most."""
    root = Path(sysconfig.get_path("stdlib"))
    folders = [root / package for package in packages] or [root]
    files = itertools.chain.from_iterable(sorted(folder.glob("*.py")) for folder in folders)
    joined = b"".join(file.read_bytes() for file in files)[:2_000_000]
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8).long()


def windows(source: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Random pieces of a text, (count, length)."""
    starts = torch.randint(len(source) - length, (count, 1), generator=generator)
    return source[starts + torch.arange(length)]


def learner(
    model: nn.Module, optimizer: Optimizer, loss: Callable[[torch.Generator], Tensor]
) -> tuple[nn.Module, Callable[[], object]]:
    """A model and its training step, on batches that a generator of their own draws."""
    generator = torch.Generator().manual_seed(SEED)

    def step() -> None:
        optimizer.zero_grad()
        loss(generator).backward()
        optimizer.step()

    return model, step


def mlp(
    optimizer: Callable[[nn.Module], Optimizer],
    widths: Sequence[int] = (512, 768, 768, 3072),
    batch: int = 128,
) -> tuple[nn.Module, Callable[[], object]]:
    """A perceptron that guesses the next byte from 16, each a fixed random vector."""
    torch.manual_seed(SEED)
    vectors = torch.randn(256, widths[0] // 16)
    sizes = itertools.pairwise((*widths, 256))
    layers = [part for size in sizes for part in (nn.Linear(*size), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])

    def loss(generator: torch.Generator) -> Tensor:
        bytes_ = windows(text(), batch, 17, generator)
        return F.cross_entropy(model(vectors[bytes_[:, :16]].flatten(1)), bytes_[:, 16])

    return learner(model, optimizer(model), loss)


class Block(nn.Module):
    """Causal self-attention and a perceptron, each behind its LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.project = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm, self.up_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, tokens, width)
        y = self.norm(x)
        q, k, v = (
            part(y).unflatten(-1, (6, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.up_norm(x))))


class Transformer(nn.Module):
    """A byte-level language model."""

    def __init__(self, width: int, tokens: int, depth: int) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(256, width), nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256))

    def forward(self, ids: Tensor) -> Tensor:  # (batch, tokens) -> (batch, tokens, 256)
        return self.head(self.blocks(self.words(ids) + self.positions.weight[: ids.shape[1]]))


def transformer(
    optimizer: Callable[[nn.Module], Optimizer], width: int = 384, batch: int = 8, tokens: int = 64
) -> tuple[nn.Module, Callable[[], object]]:
    """Two blocks that guess the next byte."""
    torch.manual_seed(SEED)
    model = Transformer(width, tokens, 2)

    def loss(generator: torch.Generator) -> Tensor:
        bytes_ = windows(text(), batch, tokens + 1, generator)
        return F.cross_entropy(model(bytes_[:, :-1]).flatten(0, 1), bytes_[:, 1:].flatten())

    return learner(model, optimizer(model), loss)


def minilm(folder: Path, rate: float) -> tuple[nn.Module, Callable[[], object]]:
    """MiniLM learns which package of the standard library a piece of source code is from."""
    bert = runpy.run_path(str(EXAMPLES / "finetune_text" / "bert.py"))
    torch.manual_seed(SEED)
    encoder, tokenizer = bert["load_encoder"](folder), bert["WordPiece"](folder / "vocab.txt")
    for embedding in (encoder.words, encoder.positions, encoder.segments):
        embedding.requires_grad_(False)
    sources = [text(package) for package in ("asyncio", "email", "unittest", "xml/etree")]
    head = nn.Linear(encoder.width, len(sources))
    groups: list[dict[str, Any]] = [
        {"params": encoder.blocks.parameters()},
        {"params": head.parameters(), "lr": 10 * rate},
    ]

    def loss(generator: torch.Generator) -> Tensor:
        pieces = torch.cat([windows(source, 4, 200, generator) for source in sources])
        texts = [bytes(piece.tolist()).decode(errors="replace") for piece in pieces]
        target = torch.arange(len(sources)).repeat_interleave(4)
        return F.cross_entropy(head(encoder(*tokenizer(texts, 32))), target)

    return learner(encoder.blocks, AdamW(groups, lr=rate, weight_decay=0.01), loss)


def darcy(folder: Path) -> tuple[nn.Module, Callable[[], object]]:
    """The demo's Fourier neural operator on 100 Darcy flows; its weights are complex."""
    torch.manual_seed(SEED)
    model = runpy.run_path(str(EXAMPLES / "darcy" / "fno.py"))["FNO2d"]()
    flows = runpy.run_path(str(EXAMPLES / "darcy" / "data.py"))["load"](folder)
    train = flows.split(100, SEED).train
    mean, std = train.u.mean(), train.u.std()

    def loss(generator: torch.Generator) -> Tensor:
        batch = train[torch.randperm(len(train), generator=generator)[:8]]
        missed = (model(batch.a) * std + mean - batch.u).flatten(1)
        return (missed.norm(dim=1) / batch.u.flatten(1).norm(dim=1)).mean()

    return learner(model, Adam(model.parameters(), lr=1e-3, weight_decay=1e-4), loss)


# Known spectra -------------------------------------------------------------------------------


def gaussian(rows: int, cols: int, seed: int) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def power_law(exponent: float) -> Callable[[int, int], Tensor]:
    """Gaussian, column j times j^-exponent."""
    return lambda n, seed: gaussian(n, n, seed) * torch.arange(1, n + 1) ** -exponent


def rank_deficient(n: int, seed: int) -> Tensor:
    """A product of Gaussian factors, of rank 3 N / 4."""
    return gaussian(n, 3 * n // 4, seed) @ gaussian(3 * n // 4, n, seed + 1000)


def one_outlier(n: int, seed: int) -> Tensor:
    """Gaussian, its largest singular value made 20 times as large."""
    u, v = (F.normalize(gaussian(n, 1, seed + shift), dim=0) for shift in (1000, 2000))
    return gaussian(n, n, seed) + 40 * math.sqrt(n) * u @ v.T


SPECTRA: dict[str, Callable[[int, int], Tensor]] = {
    "Gaussian 1:1": lambda n, seed: gaussian(n, n, seed),
    "Gaussian 4:1": lambda n, seed: gaussian(4 * n, n, seed),
    "power law 0.5": power_law(0.5),
    "power law 1": power_law(1.0),
    "power law 1.5": power_law(1.5),
    "rank 3/4": rank_deficient,
    "one outlier": one_outlier,
}


@dataclass(frozen=True)
class Drawn:
    """A random matrix of a spectrum and how often it is sketched, with how many probes each."""

    spectrum: str
    n: int
    seed: int
    draws: int
    probes: tuple[int, ...] = (4, 8, 16)

    def matrix(self) -> Tensor:
        return SPECTRA[self.spectrum](self.n, self.seed)


def random_matrices(quick: bool = False) -> list[Drawn]:
    """All random matrices, the large ones fewer and sketched more often."""
    sizes = {96: (4, 1)} if quick else {96: (8, 1), 384: (6, 1), 1536: (2, 3)}
    small = [
        Drawn(spectrum, n, seed, draws)
        for spectrum in SPECTRA
        for n, (seeds, draws) in sizes.items()
        for seed in range(seeds)
    ]
    large = () if quick else ("Gaussian 1:1", "power law 1", "one outlier")
    return [*small, *(Drawn(spectrum, 4096, 0, 6, (8,)) for spectrum in large)]
