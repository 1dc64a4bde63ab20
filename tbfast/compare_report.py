"""The result of a comparison: tables, verdict, files."""

from __future__ import annotations

import csv
import io
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tbfast.compare_stats import Difference, Goal, Run, Summary, summarise
from tbfast.compare_variants import VariantOptions, baseline_of, is_control, is_fixed
from tbfast.compare_verdict import notes, plus_minus, verdict
from tbfast.files import PathLike, write_whole

_COLUMNS = ("variant", "rate", "seed", "validation", "test", "seconds", "overhead", "note")


class Comparison:
    """What :func:`tbfast.compare` found; ``print`` shows the tables and the verdict.

    Attributes:
        runs: All runs, a ``Run`` each.
        variants: Options of each variant, None for no factors.
        baseline: The variant without factors that the others are compared with.
        rates, seeds: The grid.
        goal: Whether small or large metrics are good.
        summaries: Each variant at its best rate, a ``Summary`` each.
        verdict: The finding in one sentence.
        notes: How the figures were made and what to doubt, a line each.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        *,
        variants: Mapping[str, VariantOptions],
        rates: Sequence[float],
        seeds: Sequence[int],
        goal: Goal = "min",
    ) -> None:
        baseline = baseline_of(variants)
        assert baseline is not None
        self.runs = tuple(runs)
        self.variants = dict(variants)
        self.baseline = baseline
        self.rates, self.seeds = tuple(rates), tuple(seeds)
        self.goal: Goal = goal
        self.summaries: list[Summary] = summarise(
            {(run.variant, run.rate, run.seed): run for run in runs},
            variants=list(variants),
            baseline=baseline,
            fixed=[name for name, options in variants.items() if is_fixed(options)],
            rates=rates,
            seeds=seeds,
            goal=goal,
        )
        self.verdict = verdict(
            self.summaries,
            baseline=baseline,
            controls=[name for name, options in variants.items() if is_control(options)],
            goal=goal,
        )
        self.notes = notes(self.summaries, baseline=baseline, rates=rates, seeds=seeds)

    def __repr__(self) -> str:
        return f"Comparison({', '.join(self.variants)}; {len(self.runs)} runs)"

    def __str__(self) -> str:
        """The tables as plain text, and the verdict."""
        table = _text(self._table())
        width = max(80, len(table.partition("\n")[0]))
        parts = [table, "", *(textwrap.fill(note, width) for note in self.notes)]
        if len(self.rates) > 1:
            parts += ["", self._equal_title(), _text(self._equal_rates())]
        return "\n".join([*parts, "", textwrap.fill(f"Verdict: {self.verdict}", width)])

    def to_markdown(self) -> str:
        """The same in Markdown."""
        parts = [f"**{self.verdict}**", _markdown(self._table()), *self.notes]
        if len(self.rates) > 1:
            parts += [self._equal_title(), _markdown(self._equal_rates())]
        return "\n\n".join(parts) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Verdict, notes, grid, summaries and runs as plain dicts and lists."""
        return {
            "verdict": self.verdict,
            "notes": self.notes,
            "goal": self.goal,
            "baseline": self.baseline,
            "rates": list(self.rates),
            "seeds": list(self.seeds),
            "summaries": [asdict(s) for s in self.summaries],
            "runs": [asdict(run) for run in self.runs],
        }

    def to_json(self, path: PathLike | None = None) -> str:
        """:meth:`to_dict` as JSON, NaN as null; also written to ``path`` if there is one."""
        text = json.dumps(_finite(self.to_dict()), indent=2, allow_nan=False)
        if path is not None:
            write_whole(path, text + "\n")
        return text

    def to_csv(self, path: PathLike) -> None:
        """Write one row per run; a metric that is not finite is empty."""
        stream = io.StringIO()
        writer = csv.DictWriter(stream, _COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for run in self.runs:
            writer.writerow(_finite(asdict(run)))
        write_whole(path, stream.getvalue())

    def plot(self, path: PathLike) -> None:
        """Draw the test metric of every variant and seed; the suffix says PNG, SVG or PDF.

        Raises:
            ValueError: On another suffix.
            RuntimeError: If matplotlib is not installed.
        """
        from tbfast.compare_plot import plot_comparison

        plot_comparison(self, path)

    def write(self, folder: PathLike) -> None:
        """Write ``table.md``, ``runs.csv``, ``comparison.json`` and, with matplotlib, the picture.

        Raises:
            OSError: If the folder is missing or not writable.
        """
        write_whole(Path(folder) / "table.md", self.to_markdown())
        self.to_csv(Path(folder) / "runs.csv")
        self.to_json(Path(folder) / "comparison.json")
        if find_spec("matplotlib") is not None:
            self.plot(Path(folder) / "comparison.png")

    def _table(self) -> list[list[str]]:
        head = ["variant", "best rate", "validation", "test (sd)", "difference", "n", "p"]
        rows = [[*head, "finding", "overhead", "s/run"]]
        for s in self.summaries:
            d, edge = s.difference, " (edge)" if s.at_edge and len(self.rates) > 2 else ""
            finding = {"none": "no difference"}.get(s.outcome, s.outcome)
            rows.append(
                [
                    s.variant,
                    f"{s.rate:g}{edge}",
                    _number(s.validation),
                    f"{_number(s.test)} ({_number(s.spread, '.2g')})",
                    "" if d is None else plus_minus(d.mean, d.error),
                    str(len(self.seeds) - s.failed) if d is None else str(d.n),
                    "" if d is None else _number(d.p, ".2g"),
                    finding if d is not None or s.failed else "",
                    "" if self.variants[s.variant] is None else f"{100 * s.overhead:.1f} %",
                    _number(s.seconds, ".3g"),
                ]
            )
        return rows

    def _equal_title(self) -> str:
        return (
            f"Test metric minus {self.baseline}'s at the same rate, ± standard error (not "
            "corrected, not part of the verdict):"
        )

    def _equal_rates(self) -> list[list[str]]:
        rows = [["variant", *(f"{rate:g}" for rate in self.rates)]]
        for s in self.summaries:
            if s.equal_rates:
                rows.append([s.variant, *(self._cell(d) for d in s.equal_rates.values())])
        return rows

    def _cell(self, d: Difference) -> str:
        missing = len(self.seeds) - d.n
        return plus_minus(d.mean, d.error) + (f" ({missing} failed)" if missing else "")


def _text(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def _markdown(rows: list[list[str]]) -> str:
    head, *body = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows]
    rule = "|---|" + "---:|" * (len(rows[0]) - 1)
    return "\n".join([head, rule, *body])


def _number(value: float, form: str = ".4g") -> str:
    return format(value, form) if math.isfinite(value) else "-"


def _finite(value: Any) -> Any:
    """The same with NaN and infinity, which JSON does not know, as None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
