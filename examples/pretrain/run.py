"""Pre-training of a tiny GPT: one rate against layer-wise rates (LLR), and three controls.

    python examples/pretrain/run.py --out out/pretrain

The text is the Python standard library, byte by byte, with whole files held out; metrics are
losses in nats per byte. A run takes ten seconds, the comparison with all variants a quarter of an
hour; it goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from train import options, rates, seeds, train, variants

import tbfast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/pretrain"),
        help="folder for results; runs that it holds are not repeated, whatever the other options",
    )
    parser.add_argument("--rates", type=float, nargs="+", default=rates)
    parser.add_argument("--seeds", type=int, default=len(seeds), help="number of seeds")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of a run")
    parser.add_argument("--width", type=int, default=96, help="of the model, a multiple of 32")
    parser.add_argument("--depth", type=int, default=3, help="blocks of the model")
    parser.add_argument("--variants", nargs="+", default=list(variants), choices=variants)
    args = parser.parse_args()
    if min(args.seeds, args.steps, args.depth) < 1 or args.width % 32 or args.width < 32:
        parser.error("--seeds, --steps and --depth must be at least 1, --width 32, 64, 96, ...")
    comparison = tbfast.compare(
        partial(train, steps=args.steps, width=args.width, depth=args.depth),
        variants={name: variants[name] for name in args.variants},
        rates=args.rates,
        seeds=range(args.seeds),
        out=args.out,
        **options,
    )
    print(comparison)


if __name__ == "__main__":
    main()
