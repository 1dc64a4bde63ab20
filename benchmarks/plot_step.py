"""Draw docs/step-error.png, error against cost, from results/policies.csv and results/step.csv."""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[1]
TITLES = {
    "gpt2": "GPT-2 small from random, 4 × 128 tokens",
    "darcy": "Fourier neural operator from random",
    "minilm": "MiniLM, fine-tuned",
    "mlp": "Perceptron from random, batch 64",
}
BARS = {"gpt2": 3, "darcy": 3, "minilm": 1, "mlp": 3}
STYLES = {
    "drift gate, learned pace (tbfast)": dict(color="#2a6f97", marker="o", linewidth=2),
    "round robin": dict(color="#8d99ae", marker="s", linewidth=1),
    "filter, exact or 8 probes": dict(color="#b08968", marker="^", linewidth=1),
    "svdvals": dict(color="#d1495b", marker="x", linewidth=1.4),
}
LABELS = {"svdvals": "all layers, torch svdvals every k steps"}


def rows_of(name: str) -> list[dict]:
    path = ROOT / "benchmarks/results" / name
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def draw(out: Path) -> None:
    replayed, measured = rows_of("policies.csv"), rows_of("step.csv")
    figure, panels = plt.subplots(2, 2, figsize=(9.2, 6.6), layout="constrained")
    for axes, (name, title) in zip(panels.flat, TITLES.items(), strict=True):
        for policy, style in STYLES.items():
            points = sorted(
                (float(row["overhead_percent"]), float(row["rms_error_percent_of_spread"]))
                for row in replayed
                if row["workload"] == name and row["policy"].startswith(policy)
            )
            if points:
                axes.plot(*zip(*points, strict=True), **style, label=LABELS.get(policy, policy))
        for row in measured:
            if row["workload"] == name and row["policy"].startswith("tbfast"):
                cost = float(row["overhead_percent"])
                axes.plot(
                    cost, float(row["rms_error_percent_of_spread"]), "*", color="black",
                    markersize=12, label="tbfast, as measured in the training",
                )  # fmt: skip
        axes.axhline(BARS[name], color="#333333", linewidth=0.8, linestyle=":")
        axes.set(xscale="log", yscale="log", title=title)
        axes.set_xlabel("measuring, % of step time")
        axes.set_ylabel("rms error of alpha, % of spread")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    draw(ROOT / "docs/step-error.png")
