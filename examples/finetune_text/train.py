"""One fine-tuning run on a few labelled texts, and what is compared.

    tbfast compare examples/finetune_text/train.py

needs the encoder that ``python examples/fetch.py`` gets. Without ``data`` the task is: of which
package of Python's standard library is this docstring?
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from bert import Encoder, WordPiece, load_encoder
from texts import PACKAGES, Example, read_docstrings, split_texts
from torch import Tensor, nn
from torch.nn import functional as F

MODEL = Path("build/data/minilm")
SHOTS, BATCH = 8, 16
LENGTH = 24  # tokens kept of each text

encoder_of = lru_cache(maxsize=1)(load_encoder)
docstrings = lru_cache(maxsize=1)(read_docstrings)


def variants_of(epoch: int) -> dict[str, dict[str, Any] | None]:
    """What is compared where an epoch has so many steps."""
    return {
        "plain": None,
        # ModelBalancing: one rate per block, from spectra refreshed once an epoch.
        "published": {"every": epoch, "budget": None, "method": "exact", "rate_classes": None},
        "every-step": {},
        # Constants: the factors of the pretrained weights, never refreshed.
        "once": {"every": 1_000_000, "budget": None, "method": "exact"},
        "tempbalance": {"preset": "tempbalance"},  # one rate per matrix
        "reverse": {"mapping": "reverse"},
    }


rates = [1e-4, 2e-4, 4e-4]
seeds = range(5)
variants = variants_of(-(-SHOTS * len(PACKAGES) // BATCH))
options = {"preset": "model-balancing"}


class Classifier(nn.Module):
    """The encoder under a linear head that starts at zero."""

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        for table in (encoder.words, encoder.positions, encoder.segments):
            table.requires_grad_(False)  # a few texts show few of the words
        self.head = nn.Linear(encoder.width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.encoder(ids, mask))


def adamw(model: Classifier, rate: float) -> torch.optim.AdamW:
    """The encoder's blocks learn at the rate, the head at ten times it."""
    trained = [p for p in model.encoder.parameters() if p.requires_grad]
    groups = [{"params": trained}, {"params": model.head.parameters(), "lr": 10 * rate}]
    return torch.optim.AdamW(groups, lr=rate, weight_decay=0.01)


def fit(
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    tokenizer: WordPiece,
    training: list[Example],
    *,
    epochs: int,
    length: int = LENGTH,
    order: torch.Generator | None = None,
) -> None:
    """Fine-tune in place; batches are drawn anew each epoch, with ``order`` if it is given."""
    steps = epochs * -(-len(training) // BATCH)
    # A tenth of the steps rises, the rest falls to zero.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, 10 * (step + 1) / steps) * (1 - step / steps)
    )
    ids, mask = tokenizer([text for text, _ in training], length)
    targets = torch.tensor([target for _, target in training])
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(training), generator=order).split(BATCH):
            loss = F.cross_entropy(model(ids[batch], mask[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def predict(
    model: Classifier, tokenizer: WordPiece, examples: list[Example], length: int = LENGTH
) -> tuple[Tensor, Tensor]:
    """Logits without dropout, (texts, classes), and the right answers, (texts,)."""
    model.eval()
    logits = []
    for start in range(0, len(examples), 64):
        texts = [text for text, _ in examples[start : start + 64]]
        logits.append(model(*tokenizer(texts, length)))
    return torch.cat(logits), torch.tensor([answer for _, answer in examples])


def train(
    make_optimizer: Any,
    *,
    seed: int,
    rate: float,
    rows: Callable[[], list[tuple[str, str]]] = docstrings,
    shots: int = SHOTS,
    epochs: int = 5,
    folder: Path = MODEL,
    length: int = LENGTH,
) -> dict[str, float]:
    """Shares of validation and test texts that get the wrong label, 0 to 1.

    The seed sets which texts train, their batches and the dropout: they are the same in every
    variant.

    Args:
        make_optimizer: Attaches the variant's factors to an optimizer.
        seed, rate: Of this run; the head learns at ten times the rate.
        rows: Gives all (text, label).
        shots: Texts of each label that train, and as many that validate.
        epochs: Passes over the training texts.
        folder: Checkpoint of the encoder.
        length: Tokens kept of each text.
    """
    labels, training, validation, test = split_texts(rows(), shots, seed)
    tokenizer = WordPiece(folder / "vocab.txt")
    torch.manual_seed(seed)
    model = Classifier(deepcopy(encoder_of(folder)), len(labels))
    optimizer = adamw(model, rate)
    make_optimizer.attach(optimizer, model)
    fit(model, optimizer, tokenizer, training, epochs=epochs, length=length)

    def error(examples: list[Example]) -> float:
        logits, answers = predict(model, tokenizer, examples, length)
        return int((logits.argmax(1) != answers).sum()) / len(examples)

    return {"validation": error(validation), "test": error(test)}
