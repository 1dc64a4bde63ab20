"""Low-data Darcy flow: plain Adam against two ways to set layer-wise rates, and two controls.

    python examples/darcy/run.py --data build/data/darcy --out out/darcy

Writes the comparison (tables, runs, picture) and alpha.png, what alpha saw in one run.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from data import load
from torch import nn
from torch.optim import Optimizer
from train import BATCH, DATA, options, rates, train, variants_of

import tbfast

History = list[tuple[int, dict[str, float], dict[str, float]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the data")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/darcy"),
        help="folder for results; runs that it holds are not repeated, whatever the other options",
    )
    parser.add_argument("--size", type=int, default=16, help="training samples")
    parser.add_argument("--rates", type=float, nargs="+", default=rates)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of a run")
    parser.add_argument("--variants", nargs="+", help="some of them (default: all)")
    args = parser.parse_args()
    variants = variants_of(args.size)
    if unknown := set(args.variants or ()) - variants.keys():
        parser.error(f"no variant {unknown.pop()!r}; known are {', '.join(variants)}")
    try:
        largest = load(args.data).largest_size
    except FileNotFoundError as error:
        sys.exit(str(error))
    if not BATCH <= args.size <= largest:
        parser.error(f"--size must lie between {BATCH} (a batch) and {largest}")
    if min(args.seeds, args.steps) < 1:
        parser.error("--seeds and --steps must be at least 1")

    torch.set_num_threads(1)  # the matrices are small: a second thread would only be waited for
    experiment = partial(train, size=args.size, steps=args.steps, data=args.data)
    comparison = tbfast.compare(
        experiment,
        variants={name: variants[name] for name in args.variants or variants},
        rates=args.rates,
        seeds=range(args.seeds),
        out=args.out,
        **options,
    )
    print(comparison)
    best = {summary.variant: summary.rate for summary in comparison.summaries}
    rate = best.get("every-step", args.rates[0])
    plot_alphas(seen(experiment, rate), f"{args.size} samples, rate {rate:g}", args.out)
    print(f"\nwritten to {args.out}: {', '.join(sorted(p.name for p in args.out.iterdir()))}")


def seen(experiment: Any, rate: float) -> History:
    """(step, alphas, factors) of one more run, measured exactly at every step."""
    found: list[tbfast.Balancer] = []

    def make_optimizer(model: nn.Module, kind: Any, **kwargs: Any) -> Optimizer:
        optimizer = kind(model.parameters(), **kwargs)
        found.append(tbfast.attach(optimizer, model, budget=None, method="exact", **options))
        return optimizer

    experiment(make_optimizer, seed=0, rate=rate)
    return found[0].history


def plot_alphas(history: History, title: str, folder: Path) -> None:
    """alpha of every balanced layer over time: real weights in orange, complex ones in blue."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    steps = [step for step, _, _ in history]
    spectral = [name for name in history[0][1] if name.startswith("spectral")]
    real = [name for name in history[0][1] if name not in spectral]
    for names, shades, style in ((real, "Oranges", "-"), (spectral, "Blues", "--")):
        for place, name in enumerate(names, 1):
            shade = colormaps[shades](0.45 + 0.5 * place / len(names))
            label = name.removesuffix(".weight").replace(".", " ")
            alphas = [alphas[name] for _, alphas, _ in history]
            axes.plot(steps, alphas, style, color=shade, lw=1.6, label=label)
    axes.set(xlabel="step", ylabel="alpha", title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(folder / "alpha.png", dpi=150)


if __name__ == "__main__":
    main()
