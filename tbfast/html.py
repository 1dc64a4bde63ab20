"""A report as one HTML page: picture, table, no script and nothing loaded from elsewhere."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from tbfast import __version__
from tbfast.report import printable, table

if TYPE_CHECKING:
    from tbfast.report import LayerSpectrum, Report

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 14px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 84rem; }}
h1 {{ font-size: 1.3rem; overflow-wrap: anywhere; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .2rem .6rem; text-align: right; white-space: nowrap; }}
th {{ border-bottom: 1px solid; }}
th:first-child, td:first-child, th:last-child, td:last-child {{ text-align: left; }}
tr:target, tbody tr:hover {{ background: #8883; }}
tr.top {{ font-weight: 600; }}
svg text {{ fill: currentColor; font-size: 11px; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
<div class="scroll">{picture}</div>
<p>{legend}. The bars are standard errors. A larger alpha is a
lighter tail: less trained. It also grows with the aspect ratio, so compare layers of one shape.</p>
<div class="scroll">
{table}
</div>
<p>tbfast {version}</p>
</body>
</html>
"""

_COLOURS = {None: "#1f77b4", "embedding": "#2ca02c", "head": "#d62728"}
_LEGEND = {None: "layers", "embedding": "embeddings", "head": "heads"}

_TOP, _LEFT, _WIDTH, _HEIGHT = 10, 48, 900, 220  # pixels; many layers make it wider
_MIN_STEP = 14


def render(report: Report) -> str:
    """The page; layers in model order, each point of the picture a link to its row."""
    return _PAGE.format(
        title=escape(f"alpha by layer: {printable(report.source)}"),
        summary=escape(report.summary_line()),
        picture=_picture(report),
        legend=" ".join(
            f'<span style="color: {_COLOURS[role]}">&#9679;</span> {words}'
            for role, words in _LEGEND.items()
        ),
        table=_table(report),
        version=__version__,
    )


def _table(report: Report) -> str:
    head, *rows = table(report)
    largest = report.summary()["max_alpha"]
    lines = ["<table>", f"<thead>{_row('th', head)}</thead>", "<tbody>"]
    for index, (layer, cells) in enumerate(zip(report, rows, strict=True)):
        top = ' class="top"' if layer.alpha == largest else ""
        lines.append(_row("td", cells, f' id="layer-{index}"{top}'))
    return "\n".join([*lines, "</tbody>", "</table>"])


def _row(tag: str, cells: tuple[str, ...], attributes: str = "") -> str:
    inner = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)
    return f"<tr{attributes}>{inner}</tr>"


def _picture(report: Report) -> str:
    fitted = [(i, x) for i, x in enumerate(report) if math.isfinite(x.alpha)]
    if not fitted:
        return "<p>No layer has an alpha.</p>"
    low = min(x.alpha - x.alpha_error for _, x in fitted)
    high = max(x.alpha + x.alpha_error for _, x in fitted)
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def y(alpha: float) -> float:
        return _TOP + _HEIGHT * (high - alpha) / (high - low)

    step = max(_MIN_STEP, _WIDTH // (len(report) + 1))
    width = _LEFT + step * (len(report) + 1)
    height = _TOP + _HEIGHT + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'role="img" aria-label="alpha by layer">'
    ]
    for tick in ticks:
        parts.append(
            f'<line x1="{_LEFT}" x2="{width}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" '
            'stroke="currentColor" stroke-opacity="0.15"/>'
            f'<text x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>'
        )
    for index, layer in fitted:
        x = _LEFT + step * (index + 1)
        top, bottom = y(layer.alpha + layer.alpha_error), y(layer.alpha - layer.alpha_error)
        colour = _COLOURS[layer.role]
        parts.append(
            f'<a href="#layer-{index}" fill="{colour}" stroke="{colour}">'
            f"<title>{_hover(layer)}</title>"
            f'<line x1="{x}" x2="{x}" y1="{top:.1f}" y2="{bottom:.1f}"/>'
            f'<circle cx="{x}" cy="{y(layer.alpha):.1f}" r="4"/></a>'
        )
    return "\n".join([*parts, "</svg>"])


def _hover(layer: LayerSpectrum) -> str:
    return escape(f"{printable(layer.name)}: {layer.alpha:.3f} ± {layer.alpha_error:.3f}")


def _ticks(low: float, high: float) -> list[float]:
    """At most a dozen round numbers that enclose the range."""
    span = max(high - low, 1e-3 * abs(high))
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= 8)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    return [count * step for count in range(first, last + 1)]
