"""Few-shot fine-tuning of MiniLM: one rate against layer-wise rates, and their reverse.

    python examples/finetune_text/run.py --data texts.csv --text text --label label --out out/texts

The data are a CSV with a header or a JSONL file; without them the task is to tell the packages of
Python's standard library by their docstrings. Of each class ``--shots`` texts train, as many
validate, up to 30 of the rest test. Metrics are shares of wrong answers.
"""

from __future__ import annotations

import argparse
import csv
import sys
from functools import partial
from pathlib import Path

from bert import load_encoder
from texts import read_texts, split_texts
from train import BATCH, MODEL, SHOTS, docstrings, options, rates, train, variants_of

import tbfast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, help="CSV with a header, or JSONL")
    parser.add_argument("--text", default="text", help="column of the texts")
    parser.add_argument("--label", default="label", help="column of the labels")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the encoder")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/finetune_text"),
        help="folder for results; runs that it holds are not repeated, whatever the other options",
    )
    parser.add_argument("--shots", type=int, default=SHOTS, help="training texts per class")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rates", type=float, nargs="+", default=rates)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--variants", nargs="+", help="some of them (default: all)")
    args = parser.parse_args()
    if min(args.shots, args.epochs, args.seeds) < 1:
        parser.error("--shots, --epochs and --seeds must be at least 1")
    try:
        found = read_texts(args.data, args.text, args.label) if args.data else docstrings()
        labels, *_ = split_texts(found, args.shots, seed=0)
        load_encoder(args.model)
    except (OSError, ValueError, csv.Error) as error:
        sys.exit(str(error))
    variants = variants_of(-(-args.shots * len(labels) // BATCH))
    if unknown := set(args.variants or ()) - variants.keys():
        parser.error(f"no variant {unknown.pop()!r}; known are {', '.join(variants)}")

    print(f"{len(labels)} classes, {args.shots * len(labels)} training texts")
    comparison = tbfast.compare(
        partial(
            train,
            rows=lambda: found,
            shots=args.shots,
            epochs=args.epochs,
            folder=args.model,
        ),
        variants={name: variants[name] for name in args.variants or variants},
        rates=args.rates,
        seeds=range(args.seeds),
        out=args.out,
        **options,
    )
    print(comparison)


if __name__ == "__main__":
    main()
