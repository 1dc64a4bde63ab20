"""Tables, verdict and pictures from the runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import matplotlib

matplotlib.use("Agg")
import numpy as np
from experiment import VARIANTS, Result
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

COLOURS = {"plain": "#555555", "published": "#d55e00", "ours": "#0072b2", "fixed": "#009e73"}


@dataclass(frozen=True)
class Row:
    """One variant at one training-set size, at its best rate; lists are by seed."""

    variant: str
    size: int
    rate: float
    at_edge: bool  # the best rate is the first or last of the grid
    runs: list[Result]
    versus_plain: list[float]  # paired difference of the test error, %

    def errors(self, field: str) -> list[float]:
        return [getattr(run, field) for run in self.runs]

    @property
    def gain(self) -> tuple[float, float]:
        """Mean paired difference and its standard error, %; NaN where there are too few seeds."""
        values = self.versus_plain
        spread = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return fmean(values), spread


def best_rows(results: list[Result]) -> list[Row]:
    """For each size and variant the rate with the smallest mean validation error."""
    rows: list[Row] = []
    for size in sorted({result.job.size for result in results}):
        plain: list[Result] = []
        for variant in VARIANTS:
            rates: dict[float, list[Result]] = {}
            for run in results:
                if (run.job.variant, run.job.size) == (variant, size):
                    rates.setdefault(run.job.rate, []).append(run)
            rate = min(rates, key=lambda rate: fmean(run.validation for run in rates[rate]))
            runs = sorted(rates[rate], key=lambda run: run.job.seed)
            plain = plain or runs  # VARIANTS begins with it
            versus = [100 * (a.test / b.test - 1) for a, b in zip(runs, plain, strict=True)]
            edge = len(rates) > 1 and rate in (min(rates), max(rates))
            rows.append(Row(variant, size, rate, edge, runs, versus))
    return rows


def verdict(rows: list[Row]) -> str:
    """One sentence: which differences to plain Adam are larger than two standard errors."""
    compared = [row for row in rows if row.variant != "plain"]
    seeds = len(compared[0].runs)
    if seeds < 2:
        return "One seed says nothing about a difference; run with --seeds 3 or more."
    clear = [row for row in compared if abs(row.gain[0]) >= 2 * row.gain[1]]
    if not clear:
        return (
            f"No difference found beyond noise: with {seeds} seeds, none of the {len(compared)} "
            "paired differences to plain Adam reaches two standard errors."
        )
    found = "; ".join(
        f"{VARIANTS[row.variant]} at n = {row.size} has a "
        f"{'smaller' if row.gain[0] < 0 else 'larger'} error ({_gain(row)})"
        for row in clear
    )
    by_chance = len(compared) * chance_beyond_two(seeds - 1)
    return (
        f"Beyond two standard errors of plain Adam: {found}; no difference found beyond noise in "
        f"the other {len(compared) - len(clear)} of {len(compared)} comparisons, of which chance "
        f"alone would be expected to lift {by_chance:.1f} over that bar with {seeds} seeds."
    )


def chance_beyond_two(freedom: int) -> float:
    """P(|t| > 2) of Student's t distribution."""
    t = (np.arange(2000) + 0.5) / 1000  # midpoints over [0, 2]
    density = (1 + t**2 / freedom) ** (-(freedom + 1) / 2)
    log_norm = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    norm = math.exp(log_norm) / math.sqrt(freedom * math.pi)
    return 1 - 2 * norm * 2 * float(density.mean())


def _gain(row: Row) -> str:
    mean, error = row.gain
    return f"{mean:+.1f} %" + ("" if math.isnan(error) else f" ± {error:.1f}")


def _spread(values: list[float]) -> str:
    return f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def error_table(rows: list[Row]) -> list[list[str]]:
    """Header and body; the same on every run with the same settings on one machine."""
    head = ["n", "variant", "best rate", "test error", "to Adam", "official 16×16", "32×32"]
    return [head] + [
        [
            str(row.size),
            VARIANTS[row.variant],
            f"{row.rate:g}" + ("*" if row.at_edge else ""),
            _spread(row.errors("test")),
            "–" if row.variant == "plain" else _gain(row),
            _spread(row.errors("official")),
            _spread(row.errors("fine")),
        ]
        for row in rows
    ]


def cost_table(rows: list[Row]) -> list[list[str]]:
    """Header and body of what the rates cost; timings vary from run to run."""
    return [["n", "variant", "ms per step", "of it measuring"]] + [
        [
            str(row.size),
            VARIANTS[row.variant],
            f"{fmean(row.errors('ms_per_step')):.1f}",
            f"{fmean(row.errors('measuring')):.1%}",
        ]
        for row in rows
    ]


def plot_errors(rows: list[Row], path: Path) -> None:
    """Test error by variant and size, and its paired difference to plain Adam; dots are seeds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    sizes = sorted({row.size for row in rows})
    for row in rows:
        offset = 0.18 * (list(VARIANTS).index(row.variant) - 1.5)
        x = sizes.index(row.size) + offset
        for axis, values in ((left, row.errors("test")), (right, row.versus_plain)):
            if axis is right and row.variant == "plain":
                continue
            reach = stdev(values) if len(values) > 1 else 0.0
            reach = reach / math.sqrt(len(values)) if axis is right else reach
            colour = COLOURS[row.variant]
            label = VARIANTS[row.variant] if row.size == sizes[0] else None
            axis.scatter(
                [x + 0.06] * len(values), values, s=16, color=colour, alpha=0.5, linewidths=0
            )
            axis.errorbar(
                x, fmean(values), reach, fmt="o", ms=7, capsize=4, color=colour, label=label
            )
    right.axhline(0, color=COLOURS["plain"], lw=1, ls="--")
    left.set(ylabel="test error (relative L2)", title="Mean ± standard deviation over seeds")
    right.set(
        ylabel="paired difference to Adam, %", title="Mean ± standard error; below 0 is better"
    )
    for axis in (left, right):
        axis.set_xticks(range(len(sizes)), [f"{size} samples" for size in sizes])
        axis.set_xlim(-0.5, len(sizes) - 0.5)
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_alphas(rows: list[Row], path: Path) -> None:
    """alpha of every balanced layer over time, in the first seed's run of "ours"."""
    ours = [row for row in rows if row.variant == "ours"]
    figure, axes = plt.subplots(
        1, len(ours), figsize=(1.5 + 4.5 * len(ours), 4.2), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, row in zip(axes[0], ours, strict=True):
        run = row.runs[0]
        spectral = [name for name in run.alphas if name.startswith("spectral")]
        real = [name for name in run.alphas if name not in spectral]
        for names, shades, style in ((real, "Oranges", "-"), (spectral, "Blues", "--")):
            for name, shade in zip(names, np.linspace(0.45, 0.95, len(names)), strict=True):
                label = name.removesuffix(".weight").replace(".", " ")
                axis.plot(
                    run.alpha_steps, run.alphas[name], style, color=plt.get_cmap(shades)(shade),
                    lw=1.6, label=label,
                )  # fmt: skip
        axis.set(xlabel="step", title=f"{row.size} samples, rate {row.rate:g}")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("alpha")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_report(results: list[Result], out: Path) -> None:
    """Print tables and verdict; write table.md, error.png and alpha.png to ``out``."""
    rows = best_rows(results)
    note = "* best rate at the edge of the grid" if any(row.at_edge for row in rows) else ""
    errors, costs = error_table(rows), cost_table(rows)
    console = Console()
    if not console.is_terminal:
        console.width = 120
    for title, table in (("Darcy flow: relative L2 error, mean ± std", errors), ("Cost", costs)):
        shown = Table(title=title, title_justify="left")
        for heading in table[0]:
            shown.add_column(heading, justify="left" if heading == "variant" else "right")
        for line in table[1:]:
            shown.add_row(*line, end_section=line[1] == list(VARIANTS.values())[-1])
        console.print(shown)
        if table is errors and note:
            console.print(note)
    sentence = verdict(rows)
    console.print(sentence)
    parts = [_markdown(errors), note, sentence, "Timings vary from run to run:", _markdown(costs)]
    text = "\n\n".join(part for part in parts if part)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    plot_errors(rows, out / "error.png")
    plot_alphas(rows, out / "alpha.png")
    console.print(f"written to {out}: results.json, table.md, error.png, alpha.png")


def _markdown(table: list[list[str]]) -> str:
    head, *body = table
    rule = ["---:" if heading != "variant" else "---" for heading in head]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body))
