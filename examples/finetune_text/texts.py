"""Labelled texts, from a file or Python's docstrings, split into a few to train and the rest."""

from __future__ import annotations

import ast
import csv
import io
import json
import random
import sysconfig
from pathlib import Path

Example = tuple[str, int]  # a text and the index of its class

# Of about equal difficulty, with a hundred docstrings or more in every version of Python.
PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "unittest")


def read_docstrings() -> list[tuple[str, str]]:
    """(first paragraph of a docstring, its package) in this interpreter's standard library."""
    rows = set()
    for package in PACKAGES:
        for path in Path(sysconfig.get_path("stdlib"), package).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
                    rows.add((" ".join(paragraph.split()), package))
    return sorted(row for row in rows if len(row[0]) >= 30)


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
    rows: list[tuple[str, str]], shots: int, seed: int, tests: int = 30
) -> tuple[list[str], list[Example], list[Example], list[Example]]:
    """Class names, then training, validation and test examples: of each class ``shots``, as many,
    and at most ``tests`` of the rest."""
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
        cuts = (texts[:shots], texts[shots : 2 * shots], texts[2 * shots : 2 * shots + tests])
        for part, cut in zip(parts, cuts, strict=True):
            part += [(text, index) for text in cut]
    return labels, *parts
