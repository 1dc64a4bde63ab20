"""Does balancing help in the examples? The comparisons that are kept in benchmarks/results/.

    python examples/fetch.py
    python benchmarks/compare_examples.py [NAME ...]

runs the examples named (default: all) on one thread, about twenty minutes each, and writes
benchmarks/results/compare_NAME.csv, a row per run, compare_NAME.md, the tables, and
docs/compare-NAME.png (for Darcy also NAME-alpha.png). Finished runs lie in build/compare/NAME and
are not repeated: delete that folder to start afresh.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TBFAST_NUM_THREADS": "1"}

# Ten seeds where a run takes less than ten seconds, else four.
RECORDED = {
    "darcy": "darcy/run.py --size 16 --seeds 10 --rates 8e-3 1.6e-2 3.2e-2 6.4e-2",
    "darcy_64": "darcy/run.py --size 64 --seeds 10 --rates 8e-3 1.6e-2 3.2e-2 6.4e-2",
    "finetune_text": "finetune_text/run.py --seeds 10 --rates 1e-4 2e-4 4e-4",
    "pretrain": "pretrain/run.py --seeds 4 --rates 5e-4 1e-3 2e-3 4e-3 8e-3",
}


def record(name: str) -> None:
    """Run one comparison and keep its results."""
    command = f"examples/{RECORDED[name]}"
    out = ROOT / "build" / "compare" / name
    subprocess.run(
        [sys.executable, *command.split(), "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, **ONE_THREAD},
        check=True,
    )
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    head = (
        f"# {name}\n\nWritten by `python benchmarks/compare_examples.py {name}`, which runs\n"
        f"`python {command}` on one thread. {versions}.\n\n"
    )
    table = (out / "table.md").read_text(encoding="utf-8")
    (RESULTS / f"compare_{name}.md").write_text(head + table, encoding="utf-8")
    shutil.copyfile(out / "runs.csv", RESULTS / f"compare_{name}.csv")
    label = name.replace("_", "-")
    shutil.copyfile(out / "comparison.png", ROOT / "docs" / f"compare-{label}.png")
    if (out / "alpha.png").exists():
        shutil.copyfile(out / "alpha.png", ROOT / "docs" / f"{label}-alpha.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RECORDED))
    names = parser.parse_args().names
    if unknown := set(names) - RECORDED.keys():
        parser.error(f"no comparison {unknown.pop()!r}; known are {', '.join(RECORDED)}")
    for name in names or RECORDED:
        record(name)


if __name__ == "__main__":
    main()
