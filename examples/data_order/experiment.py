"""One seed of the experiment: fine-tune in several orders, merge the checkpoints, test them all."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bert import WordPiece
from results import Tested
from safetensors.torch import load_file, save_file
from texts import Example, split_texts
from torch.nn import functional as F
from train import Classifier, adamw, encoder_of, fit, predict

import tbfast
from tbfast.merging.diff import total

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}

# What the orders of a seed are merged by, by the name it has in the table.
MERGES: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear"},
    "select": {"method": "select", "resample": "off"},
    "select + resample": {"method": "select", "resample": "auto"},
    "select + 3 redraws": {"method": "select", "resample": 3},
}


@dataclass(frozen=True)
class Task:
    """What is learned, and how.

    Attributes:
        rows: All (text, label).
        shots: Texts of each label that train, and as many that validate.
        tests: Most texts of each label that test.
        epochs: Passes over the training texts.
        rate: Largest learning rate of the encoder.
        folder: Checkpoint of the encoder.
        dtype: Of the checkpoints; training computes in float32.
    """

    rows: list[tuple[str, str]]
    shots: int
    tests: int
    epochs: int
    rate: float
    folder: Path
    dtype: str


def run_seed(
    task: Task, seed: int, orders: int, out: Path, tell: Callable[[str], None]
) -> list[Tested]:
    """Results of every order, of the best by validation loss, and of every merge.

    The orders of a seed share starting weights, training texts and the dropout's random numbers;
    only the order of the texts, drawn anew in each epoch, differs.

    Args:
        task: What is learned.
        seed: Draws the texts, their orders, the dropout and the merges.
        orders: How many models are tuned and merged.
        out: Folder that the checkpoints are left in.
        tell: Hears what is going on.
    """
    labels, training, validation, test = split_texts(task.rows, task.shots, seed, task.tests)
    tokenizer = WordPiece(task.folder / "vocab.txt")
    model = Classifier(deepcopy(encoder_of(task.folder)), len(labels))
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    base = out / "base.safetensors"
    _save(model, base, task.dtype)

    def score(checkpoint: Path, examples: list[Example]) -> tuple[float, float]:  # loss, accuracy
        _load(model, checkpoint)
        logits, answers = predict(model, tokenizer, examples)
        right = int((logits.argmax(1) == answers).sum())
        return float(F.cross_entropy(logits, answers)), right / len(examples)

    tuned = {f"order {i}": out / f"order-{i}.safetensors" for i in range(1, orders + 1)}
    for i, (name, checkpoint) in enumerate(tuned.items()):
        tell(f"seed {seed}: training, {name} of {orders}")
        _load(model, base)
        torch.manual_seed(seed)
        order = torch.Generator().manual_seed(1000 * seed + i)
        optimizer = adamw(model, task.rate)
        fit(model, optimizer, tokenizer, training, epochs=task.epochs, order=order)
        _save(model, checkpoint, task.dtype)

    tell(f"seed {seed}: merging and testing")
    merged = {name: out / f"{name.replace(' ', '')}.safetensors" for name in MERGES}
    for name, checkpoint in merged.items():
        tbfast.merge_checkpoints(
            list(tuned.values()),
            checkpoint,
            base=base,
            exclude=frozen,
            seed=seed,
            overwrite=True,
            **MERGES[name],
        )
    checkpoints = tuned | merged
    diffs = tbfast.diff_checkpoints(list(checkpoints.values()), base)
    moved = total(diff for diff in diffs if diff.name not in frozen)
    found = {
        name: Tested(seed, name, *score(path, test), 1 - changed, distance)
        for (name, path), changed, distance in zip(
            checkpoints.items(), moved.changed, moved.norms, strict=True
        )
    }
    best = min(tuned, key=lambda name: score(tuned[name], validation))
    return [replace(found[best], model="best order"), *found.values()]


def _save(model: Classifier, path: Path, dtype: str) -> None:
    state = model.state_dict()
    save_file({name: tensor.to(DTYPES[dtype]) for name, tensor in state.items()}, path)


def _load(model: Classifier, path: Path) -> None:
    model.load_state_dict(load_file(path))  # copied into the model's float32
