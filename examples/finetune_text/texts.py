"""Labelled texts from a CSV or JSONL file, split into a few to train and the rest."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path

Example = tuple[str, int]  # a text and the index of its class


def read_texts(path: Path, text: str, label: str) -> list[tuple[str, str]]:
    """(text, label) of every row; raises ValueError with the file, the row and the remedy."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give a CSV or JSONL file of labelled texts")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason})") from None
    if path.suffix in (".jsonl", ".json"):
        rows = []
        for number, line in enumerate(content.split("\n"), 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON ({error.msg})") from None
    else:
        rows = list(csv.DictReader(io.StringIO(content, newline="")))
    if not rows:
        raise ValueError(f"{path} holds no rows")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or None in (row.get(text), row.get(label)):
            held = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise ValueError(
                f"{path}, row {number} has no {text!r} or no {label!r}, only: {held}; "
                "name the columns with --text and --label"
            )
    return [(str(row[text]), str(row[label])) for row in rows]


def split_texts(
    rows: list[tuple[str, str]], shots: int, seed: int
) -> tuple[list[str], list[Example], list[Example], list[Example]]:
    """Class names, then training, validation and test examples."""
    labels = sorted({label for _, label in rows})
    if len(labels) < 2:
        raise ValueError(f"the texts have one label only, {labels[0]!r}; need at least two")
    shuffled = random.Random(seed)
    parts: tuple[list[Example], ...] = ([], [], [])
    for index, label in enumerate(labels):
        texts = sorted({text for text, found in rows if found == label})
        if len(texts) <= 2 * shots:
            raise ValueError(
                f"label {label!r} has {len(texts)} different texts, but --shots {shots} needs "
                f"more than {2 * shots}: {shots} to train, {shots} to validate, the rest to test"
            )
        shuffled.shuffle(texts)
        cuts = (texts[:shots], texts[shots : 2 * shots], texts[2 * shots :])
        for part, cut in zip(parts, cuts, strict=True):
            part += [(text, index) for text in cut]
    return labels, *parts
