"""Pictures of a report, drawn with matplotlib and without its global state."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tbfast.files import PathLike, write_whole
from tbfast.matrices import block_of, type_of

if TYPE_CHECKING:
    from tbfast.report import Report

SUFFIXES = (".png", ".svg", ".pdf")

# Up to so many layers each has its name beside it; more are drawn along an axis of blocks.
_NAMED = 60

# More types than this make a legend that nobody reads.
_MAX_TYPES = 20

_MARKERS = {None: "o", "embedding": "s", "head": "D"}


def check_plot(path: PathLike) -> None:
    """Refuse what :func:`plot_report` could not write, before the work that fills it.

    Raises:
        ValueError: If the suffix names no picture.
        RuntimeError: If matplotlib is not installed.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"cannot draw '{path}': its suffix must be one of {', '.join(SUFFIXES)}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise RuntimeError(f"cannot draw '{path}': pip install matplotlib") from error


def plot_report(report: Report, path: PathLike) -> None:
    """Write a picture of alpha by layer, with its standard errors.

    Colours are layer types, squares embeddings, diamonds heads, crosses at the edge layers
    without an alpha.

    Raises:
        ValueError: If the suffix is neither ``.png`` nor ``.svg`` nor ``.pdf``.
        RuntimeError: If matplotlib is not installed.
    """
    check_plot(path)
    figure = _named(report) if len(report) <= _NAMED else _by_block(report)
    stream = io.BytesIO()
    kind = Path(path).suffix[1:].lower()
    figure.savefig(stream, format=kind, dpi=150, bbox_inches="tight", facecolor="white")
    write_whole(path, stream.getvalue())


def _named(report: Report) -> Any:
    """Alpha to the right, one line per layer from the top, names at the left."""
    figure, axes = _figure(8.0, 1.2 + 0.21 * max(len(report), 4))
    _points(axes, report, across=False)
    axes.set_yticks(range(len(report)), [_short(layer.name) for layer in report], fontsize=8)
    axes.set_ylim(len(report) - 0.5, -0.5)
    _finish(axes, report, axis="x")
    return figure


def _by_block(report: Report) -> Any:
    """Layers to the right in model order, alpha upwards, a tick where a block begins."""
    figure, axes = _figure(13.0, 5.0)
    _points(axes, report, across=True)
    blocks = [block_of(layer.name) for layer in report]
    starts = [i for i, block in enumerate(blocks) if block and (i == 0 or blocks[i - 1] != block)]
    starts = starts[:: max(1, math.ceil(len(starts) / 24))] or [0, len(report) - 1]
    labels = [_short(blocks[i] or report[i].name) for i in starts]
    axes.set_xticks(starts, labels, fontsize=8, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.02 * len(report), 1.02 * len(report))
    _finish(axes, report, axis="y")
    return figure


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _points(axes: Any, report: Report, *, across: bool) -> None:
    """Each layer as a marker, one colour and legend entry per layer type."""
    fitted = [(i, x) for i, x in enumerate(report) if math.isfinite(x.alpha)]
    labels = _type_labels([layer.name for _, layer in fitted])
    colour_of = dict(zip(dict.fromkeys(labels), _colours(len(set(labels))), strict=True))
    seen: set[str] = set()
    for (index, layer), label in zip(fitted, labels, strict=True):
        x, y, error = (index, layer.alpha, "yerr") if across else (layer.alpha, index, "xerr")
        axes.errorbar(
            x,
            y,
            **{error: layer.alpha_error},
            fmt=_MARKERS[layer.role],
            markersize=5,
            elinewidth=0.8,
            color=colour_of[label],
            label=None if label in seen else label,
        )
        seen.add(label)
    for index, layer in enumerate(report):
        if not math.isfinite(layer.alpha):
            at = (index, 0.015) if across else (0.015, index)
            transform = axes.get_xaxis_transform() if across else axes.get_yaxis_transform()
            axes.plot(*at, "x", color="0.5", markersize=5, transform=transform)
    if len(seen) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8, frameon=False)


def _type_labels(names: list[str]) -> list[str]:
    """The type of each layer, in as few of its last words as tell it from the other types.

    One label for all where types tell nothing: each layer its own, or too many for a legend.
    """
    types = [type_of(name.removesuffix(".weight")) for name in names]
    distinct = set(types)
    if len(distinct) in (1, len(names)) or len(distinct) > _MAX_TYPES:
        return ["layers"] * len(names)

    def label(kind: str) -> str:
        words = kind.split(".")
        tails = [".".join(words[-count:]) for count in range(1, len(words) + 1)]
        alone = (t for t in tails if sum(f".{k}".endswith(f".{t}") for k in distinct) == 1)
        return _short(next(alone, kind).removeprefix("*."))

    label_of = {kind: label(kind) for kind in distinct}
    return [label_of[kind] for kind in types]


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    if count <= 10:
        return [colormaps["tab10"](i) for i in range(count)]
    return [colormaps["turbo"](i / (count - 1)) for i in range(count)]


def _finish(axes: Any, report: Report, *, axis: str) -> None:
    median = report.summary()["median_alpha"]
    if math.isfinite(median):
        line = axes.axvline if axis == "x" else axes.axhline
        line(median, color="0.5", linewidth=0.8, linestyle="--", zorder=0)
    axes.grid(axis=axis, color="0.9", linewidth=0.6, zorder=0)
    label = f"alpha ({report.fit} fit); dashed: median"
    if len(report.alphas) < len(report):
        label += "; ×: no alpha"
    axes.set_xlabel(label) if axis == "x" else axes.set_ylabel(label)
    axes.set_title(_short(Path(report.source).name or report.source), loc="left", fontsize=10)


def _short(name: str) -> str:
    """A name that fits beside an axis and that matplotlib does not take for a formula."""
    name = "".join(c if c.isprintable() else "?" for c in name.removesuffix(".weight"))
    name = name if len(name) <= 60 else f"{name[:28]}...{name[-29:]}"
    return name.replace("$", r"\$")
