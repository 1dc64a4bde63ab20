"""Draw docs/spectra-speed.png from a file that ``bench_spectra.py`` or ``tbfast bench`` wrote.

``python benchmarks/plot_results.py [FILE]``; without one, the file of benchmarks/results/ that was
written last.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from tbfast.bench_contest import STREAM

ROOT = Path(__file__).parents[1]
OURS, BAR, TEXT = "#2a6f97", "#d1495b", "#333333"
NOT_SPEED = ("the weights", "same, with busy cores", "float32 multipliers")


def ratios(path):
    """(case, contender, ratio, bar) of the speed-ups, and of the shares of the stream."""
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["bench"] == "spectra" and row["ratio"]]
    found = [
        (row["case"], row["contender"], float(row["ratio"]), float(row["bar"] or "nan"))
        for row in rows
        if row["contender"] not in NOT_SPEED
    ]
    speeds = [row for row in found if row[1] != STREAM and not row[0].startswith("drift")]
    return sorted(speeds, key=lambda r: r[2]), [row for row in found if row[1] == STREAM][::-1]


def bars(axes, labels, values, marks, form):
    places = range(len(labels))
    axes.barh(places, values, color=OURS, height=0.62)
    axes.set_yticks(places, labels, fontsize=8)
    for place, value, mark in zip(places, values, marks, strict=True):
        axes.annotate(
            form(value),
            (value, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=TEXT,
        )
        axes.plot([mark, mark], [place - 0.42, place + 0.42], color=BAR, linewidth=2)
    axes.plot([], [], color=BAR, linewidth=2, label="target, for two cores")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def draw(path, out):
    speeds, shares = ratios(path)
    if not speeds or not shares:
        raise SystemExit(f"{path} has no rows of bench_spectra.py")
    figure, (top, bottom) = plt.subplots(
        2,
        1,
        figsize=(8.6, 1.6 + 0.3 * (len(speeds) + len(shares))),
        height_ratios=[len(speeds) + 1, len(shares) + 1],
        layout="constrained",
    )
    labels = [f"{case}\nvs {other.split(' (left')[0]}" for case, other, *_ in speeds]
    bars(top, labels, *zip(*(r[2:] for r in speeds), strict=True), lambda v: f"{v:.{v < 100:d}f}×")
    top.set_xscale("log")
    top.xaxis.set_major_formatter("{x:.0f}")
    top.set_xlim(1, 2 * max(r[2] for r in speeds))
    top.set_title("Times faster, per layer", loc="left", fontsize=10)
    top.legend(frameon=False, fontsize=8, loc="lower right")
    values = [100 * share for _, _, share, _ in shares]
    marks = [100 * bar for *_, bar in shares]
    names = [case.removesuffix(" cold") for case, *_ in shares]
    bars(bottom, names, values, marks, lambda v: f"{v:.0f} %")
    bottom.axvline(100, color=TEXT, linewidth=0.8, linestyle=":")
    bottom.set_xlim(0, 112)
    bottom.set_title(
        "Pass over cold weights, as a share of a bare read of memory (%)", loc="left", fontsize=10
    )
    figure.savefig(out, dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    written = sorted(
        (ROOT / "benchmarks/results").glob("*cores.csv"), key=lambda p: p.stat().st_mtime
    )
    draw(sys.argv[1] if len(sys.argv) > 1 else written[-1], ROOT / "docs/spectra-speed.png")
