"""MiniLM fine-tuned on the same texts in several orders, and merged: does merging help?

    python examples/fetch.py
    python examples/data_order/run.py

After Ju et al. 2024 (arXiv 2410.03743): models that saw the same data in different orders are
merged by taking each element from one of them (selection), or from their mean (linear). The texts
are those of examples/finetune_text, or a CSV or JSONL file of yours; each seed draws others from
the same pool. Resampling draws again where an element has the bits of the starting weights. Of
bfloat16 checkpoints a tenth of the trained elements has them, of float32 ones some two in a
million: there resampling makes no difference.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "finetune_text"))

from bert import load_encoder
from experiment import DTYPES, Task, run_seed
from results import LEGEND, Tested, by_model, table, verdict, write_csv
from texts import read_texts, split_texts
from train import MODEL, docstrings

# Defaults, and what --quick makes of them.
SIZES = {"seeds": 4, "orders": 3, "shots": 24, "epochs": 5, "tests": 100}
QUICK = {"seeds": 2, "orders": 2, "shots": 4, "epochs": 1, "tests": 10}


def main() -> None:
    args = parse()
    try:
        rows = read_texts(args.data, args.text, args.label) if args.data else docstrings()
        _, training, _, test = split_texts(rows, args.shots, seed=0, tests=args.tests)
        load_encoder(args.model)
    except (OSError, ValueError, csv.Error) as error:
        sys.exit(str(error))
    task = Task(rows, args.shots, args.tests, args.epochs, args.rate, args.model, args.dtype)
    print(
        f"{args.seeds} seeds, {args.orders} orders, {len(training)} training and {len(test)} test "
        f"texts, {args.dtype} checkpoints",
        flush=True,
    )
    tested: list[Tested] = []
    for seed in range(args.seeds):
        with ExitStack() as stack:
            if args.out:
                folder = args.out / f"seed-{seed}"
                folder.mkdir(parents=True, exist_ok=True)
            else:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            tested += run_seed(task, seed, args.orders, folder, _tell)
        if args.out:
            write_csv(tested, args.out / "results.csv")
    models = by_model(tested)
    print(f"\n{table(models)}\n\n{LEGEND}\n\n{verdict(models)}")
    if args.out:
        print(f"\nwritten to {args.out}: results.csv and the checkpoints of each seed")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, help="CSV with a header, or JSONL")
    parser.add_argument("--text", default="text", help="column of the texts")
    parser.add_argument("--label", default="label", help="column of the labels")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the encoder")
    parser.add_argument("--out", type=Path, help="folder to keep checkpoints and results.csv in")
    parser.add_argument("--seeds", type=int, help="draws of the texts (default: %(default)s)")
    parser.add_argument(
        "--orders", type=int, help="models of a seed, to be merged (default: %(default)s)"
    )
    parser.add_argument("--shots", type=int, help="training texts per class (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="passes over them (default: %(default)s)")
    parser.add_argument(
        "--tests", type=int, help="most test texts per class (default: %(default)s)"
    )
    parser.add_argument(
        "--rate", type=float, default=2e-4, help="largest learning rate (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="of the checkpoints (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny run, to see that all works")
    parser.set_defaults(**SIZES)
    if parser.parse_args().quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args()
    if min(args.shots, args.tests, args.epochs) < 1 or min(args.seeds, args.orders) < 2:
        parser.error("--shots, --tests and --epochs must be 1 or more, --seeds and --orders 2")
    return args


def _tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
