"""Draw docs/gpu-model.png, the modelled share of a training step, from results/gpu_model.csv."""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[1]
COLORS = {
    "exact eigenvalues": "#d1495b",
    "two reads per step, ideal": "#8d99ae",
    "one read per step, tbfast": "#2a6f97",
    "one read per step, ideal": "#a9d6e5",
    "rsvd": "#b08968",
    "dot": "#6a994e",
    "drift": "#a7c957",
}


def draw(out: Path, gpu: str = "H100") -> None:
    with (ROOT / "benchmarks/results/gpu_model.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["gpu"] == gpu]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = plt.subplots(1, 2, figsize=(10.4, 4.2), sharey=True, layout="constrained")
    width = 0.8 / len(COLORS)
    for axes, ranks in zip(panels, ("1", "64"), strict=True):
        for i, (scheme, color) in enumerate(COLORS.items()):
            chosen = {
                row["model"]: float(row["percent_of_step"])
                for row in rows
                if (row["scheme"], row["ranks"]) == (scheme, ranks)
            }
            places = [x + (i - (len(COLORS) - 1) / 2) * width for x in range(len(models))]
            axes.bar(places, [chosen[m] for m in models], width, color=color, label=scheme)
        axes.set(yscale="log", title=f"{ranks} rank{'s' if ranks != '1' else ''}")
        axes.set_xticks(range(len(models)), models)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="y", linewidth=0.4)
    panels[0].set_ylabel("one refresh of all layers, % of a training step")
    figure.suptitle(f"{gpu}: modelled, not measured")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    draw(ROOT / "docs/gpu-model.png")
