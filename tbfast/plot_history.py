"""Picture of a run: alpha and factor of every layer over time. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

_LEGEND_ROWS = 24  # more layers than this do not fit beside the axes


def plot_history(
    history: Sequence[tuple[int, dict[str, float], dict[str, float]]], path: str | PathLike[str]
) -> None:
    """Draw a history of a ``Balancer`` into an image file, one line per layer.

    Layers are coloured by their order in the model, first to last.

    Args:
        history: (step, alphas, factors) of each refresh.
        path: File; its suffix says the format.

    Raises:
        RuntimeError: If matplotlib is missing or the history is empty.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(
            "plotting needs matplotlib; install it with: pip install 'tbfast[plot]'"
        ) from error
    if not history:
        raise RuntimeError("there is nothing to plot: no layer was measured yet")
    steps = [step for step, _, _ in history]
    names = list(history[0][1])
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)  # a canvas of its own: pyplot would want a display
    upper, lower = figure.subplots(2, 1, sharex=True)
    for row, name in enumerate(names):
        style = {"color": colormaps["viridis"](row / max(1, len(names) - 1)), "linewidth": 1}
        if len(steps) == 1:
            style["marker"] = "o"
        upper.plot(steps, [alphas[name] for _, alphas, _ in history], label=name, **style)
        lower.plot(steps, [factors[name] for _, _, factors in history], **style)
    upper.set_ylabel("alpha")
    lower.set_ylabel("learning-rate factor")
    lower.axhline(1, color="grey", linewidth=0.5)
    lower.set_xlabel("optimizer step")
    if len(names) <= _LEGEND_ROWS:
        figure.legend(loc="outside right upper", fontsize="x-small")
    figure.savefig(path, dpi=120)
