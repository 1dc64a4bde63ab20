"""Four real trainings, small enough for two cores: what the scheduler's cost is measured on.

Each is the same from run to run: the model, its data and their order depend on the seed alone.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "build/data"  # written by examples/fetch.py


@dataclass
class Workload:
    """A training.

    Attributes:
        model: The model.
        loss: The loss of a step, by its number.
        rate: Base learning rate of AdamW.
        fresh: Whether the weights are random at the start.
        options: For ``tbfast.attach`` and ``param_groups``.
        epoch: Steps of an epoch.
    """

    model: nn.Module
    loss: Callable[[int], Tensor]
    rate: float
    fresh: bool
    options: dict
    epoch: int


def gpt2(seed: int = 0) -> Workload:
    """The shapes of GPT-2 small (148 tensors, 124 M parameters) on 4 × 128 tokens."""
    torch.manual_seed(seed)
    model = GPT(vocabulary=50257, context=1024, width=768, depth=12, heads=12)
    text = torch.tensor(list(python_text(2_000_000)))
    tokens = (text[:-1:2] + 256 * text[1::2]) % 50257  # pairs of bytes

    def loss(step: int) -> Tensor:
        places = torch.randint(len(tokens) - 129, (4,), generator=_generator(seed, step))
        batch = torch.stack([tokens[p : p + 129] for p in places])
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    return Workload(model, loss, 3e-4, True, {"skip_first": False}, 1000)


def darcy(seed: int = 0) -> Workload:
    """A Fourier neural operator on Darcy flow, 16 samples of 16 × 16 a batch."""
    sys.path.insert(0, str(ROOT / "examples/darcy"))
    from fno import FNO2d

    torch.manual_seed(seed)
    model = FNO2d()
    held = torch.load(DATA / "darcy/darcy_train_16.pt", weights_only=True)
    a, u = held["x"].float()[:128], held["y"].float()[:128]
    u = (u - u.mean()) / u.std()

    def loss(step: int) -> Tensor:
        batch = torch.randint(len(a), (16,), generator=_generator(seed, step))
        error = (model(a[batch]) - u[batch]).flatten(1).norm(dim=1)
        return (error / u[batch].flatten(1).norm(dim=1)).mean()

    options = {"min_eigs": 20, "skip_first": False, "skip_last": False}
    return Workload(model, loss, 8e-3, True, options, 8)


def minilm(seed: int = 0) -> Workload:
    """MiniLM-L6 learns which package of Python a snippet is from; 16 × 64 tokens a batch."""
    sys.path.insert(0, str(ROOT / "examples/finetune_text"))
    from bert import WordPiece, load_encoder

    torch.manual_seed(seed)
    encoder, tokenizer = load_encoder(DATA / "minilm"), WordPiece(DATA / "minilm/vocab.txt")
    head = nn.Linear(encoder.width, len(PACKAGES))
    model = nn.ModuleDict({"encoder": encoder, "head": head}).train()
    snippets, labels = [], []
    for label, package in enumerate(PACKAGES):
        text = python_text(40_000, package).decode(errors="ignore")
        parts = [text[i : i + 250] for i in range(0, len(text) - 250, 250)]
        snippets += parts
        labels += [label] * len(parts)
    ids, mask = tokenizer(snippets, 64)
    target = torch.tensor(labels)

    def loss(step: int) -> Tensor:
        batch = torch.randint(len(target), (16,), generator=_generator(seed, step))
        return F.cross_entropy(head(encoder(ids[batch], mask[batch])), target[batch])

    options = {"skip_first": False, "skip_last": False}
    return Workload(model, loss, 5e-5, False, options, len(labels) // 16)


def mlp(seed: int = 0) -> Workload:
    """A perceptron 512-768-768-3072 on noisy labels of a random teacher, batch 64."""
    torch.manual_seed(seed)
    layers = [nn.Linear(512, 768), nn.ReLU(), nn.Linear(768, 768), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(768, 3072), nn.ReLU(), nn.Linear(3072, 10))
    inputs = torch.randn(6400, 512) / torch.arange(1, 513).sqrt()  # a decaying spectrum
    teacher = nn.Sequential(nn.Linear(512, 64), nn.Tanh(), nn.Linear(64, 10))
    with torch.no_grad():
        target = teacher(8 * inputs).argmax(1)

    def loss(step: int) -> Tensor:
        batch = torch.randint(len(inputs), (64,), generator=_generator(seed, step))
        return F.cross_entropy(model(inputs[batch]), target[batch])

    return Workload(model, loss, 1e-3, True, {"skip_first": False}, 100)


WORKLOADS: dict[str, Callable[[int], Workload]] = {
    "gpt2": gpt2,
    "darcy": darcy,
    "minilm": minilm,
    "mlp": mlp,
}
PACKAGES = ("asyncio", "email", "json", "logging", "multiprocessing", "unittest", "xml", "http")


def python_text(size: int, package: str = "") -> bytes:
    """The first bytes of Python's own library, or of one of its packages, in order of names."""
    folder = Path(sysconfig.get_paths()["stdlib"]) / package
    text = b""
    for path in sorted(folder.rglob("*.py") if package else folder.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= size:
            break
    return text[:size]


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_003 * seed + step)


class GPT(nn.Module):
    """A decoder of GPT-2's shapes; the head is the embedding."""

    def __init__(self, vocabulary: int, context: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.h = nn.ModuleList(GPTBlock(width, heads) for _ in range(depth))
        self.ln_f = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                narrow = (2 * depth) ** -0.5 if name.endswith("proj.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 * narrow)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.h:
            x = block(x)
        return self.ln_f(x) @ self.wte.weight.T


class GPTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.c_fc, self.mlp_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.c_attn(self.ln_1(x)).chunk(3, dim=-1)
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))
