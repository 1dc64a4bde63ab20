"""Picture of a comparison: every seed of every variant, and the differences. Needs matplotlib."""

from __future__ import annotations

import io
import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tbfast.files import PathLike, write_whole
from tbfast.plot import check_plot

if TYPE_CHECKING:
    from tbfast.compare_report import Comparison


def plot_comparison(comparison: Comparison, path: PathLike) -> None:
    """Draw the test metrics at each variant's best rate, and their differences to the baseline.

    A thin line joins the runs of one seed; a cross at the top edge is a failed run. Bars are
    standard errors of the mean.

    Raises:
        ValueError: If the suffix is neither ``.png`` nor ``.svg`` nor ``.pdf``.
        RuntimeError: If matplotlib is not installed.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    count = len(comparison.variants)
    figure = Figure(figsize=(3.0 + 1.5 * count, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _metrics(left, comparison)
    _differences(right, comparison)
    width = 16 * count + 40
    figure.suptitle(_plain("\n".join(textwrap.wrap(comparison.verdict, width))), fontsize=9)
    stream = io.BytesIO()
    figure.savefig(stream, format=Path(path).suffix[1:].lower(), dpi=150, facecolor="white")
    write_whole(path, stream.getvalue())


def _metrics(axes: Any, comparison: Comparison) -> None:
    by_seed = _by_seed(comparison)
    for values in by_seed:
        axes.plot(values, color="0.75", linewidth=0.8, marker="o", markersize=3, zorder=1)
        for x, value in enumerate(values):
            if math.isnan(value):
                axes.plot(x, 0.98, "x", color="tab:red", transform=axes.get_xaxis_transform())
    for x, summary in enumerate(comparison.summaries):
        error = summary.spread / math.sqrt(max(1, len(by_seed) - summary.failed))
        axes.errorbar(x, summary.test, yerr=error, **_style(summary.outcome))
    axes.set_xlabel("variant and its best rate", fontsize=8)
    _name(axes, [f"{s.variant}\n{s.rate:g}" for s in comparison.summaries])
    axes.set_ylabel(f"test metric, {'smaller' if comparison.goal == 'min' else 'larger'} is better")


def _differences(axes: Any, comparison: Comparison) -> None:
    base = [s.variant for s in comparison.summaries].index(comparison.baseline)
    others = [i for i in range(len(comparison.summaries)) if i != base]
    for values in _by_seed(comparison):
        gaps = [values[i] - values[base] for i in others]
        axes.plot(gaps, "o", color="0.75", markersize=3, zorder=1)
    for x, index in enumerate(others):
        summary = comparison.summaries[index]
        assert summary.difference is not None
        d = summary.difference
        axes.errorbar(x, d.mean, yerr=d.error, **_style(summary.outcome))
    axes.axhline(0, color="0.5", linewidth=0.8, linestyle="--", zorder=0)
    _name(axes, [comparison.summaries[i].variant for i in others])
    axes.set_ylabel(f"minus {_plain(comparison.baseline)}, by seed (± standard error)", fontsize=9)


def _by_seed(comparison: Comparison) -> list[list[float]]:
    """Test metric of each variant at its best rate, NaN where it failed; a list per seed."""
    found = {
        (run.variant, run.rate, run.seed): math.nan if run.failed else run.test
        for run in comparison.runs
    }
    return [
        [found[s.variant, s.rate, seed] for s in comparison.summaries] for seed in comparison.seeds
    ]


def _style(outcome: str) -> dict[str, Any]:
    colour = {"better": "tab:green", "worse": "tab:red", "failed": "tab:red"}
    return dict(fmt="D", color=colour.get(outcome, "tab:blue"), markersize=6, capsize=4, zorder=2)


def _name(axes: Any, names: list[str]) -> None:
    axes.set_xticks(range(len(names)), map(_plain, names), fontsize=8, rotation=30)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.6, zorder=0)


def _plain(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")
