"""How far each estimate of alpha is from the exact one; writes docs/accuracy.md.

    python benchmarks/accuracy.py [--quick] [--out docs/accuracy.md] [--data build/data]

Along seven trainings, anchors are taken and the estimates made from them compared a while later
with all singular values in float64; fresh sketches as well, there and on matrices of known spectra.
Every row goes to benchmarks/results/accuracy.csv; of a quick run, beside its report.
"""

from __future__ import annotations

import argparse
import csv
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accuracy_report import report
from accuracy_runs import SEED, Drawn, Training, random_matrices, trainings
from numpy.typing import NDArray
from torch import Tensor, nn

from tbfast.anchors import Anchors, take_anchors
from tbfast.backends.threads import parallel_map
from tbfast.batch import Batch
from tbfast.fitting import FitOptions
from tbfast.matrices import Kind, Layer, find_layers
from tbfast.sketching import SketchOptions
from tbfast.spectra import Measurement, Method, measure

ROOT = Path(__file__).parents[1]
OPTIONS = FitOptions()
SMOOTH = FitOptions(smooth=1 / 32)  # xmin the geometric mean over N / 32 ranks to either side
PROBES = (4, 8, 16)
STEPS = 20
LEAST = 50  # eigenvalues; layers with fewer are left out, as ``tbfast.analyze`` does

Array = NDArray[np.float64]
Estimates = dict[str, tuple[Array, Array]]  # method -> alpha and its standard error, by layer


class Row(NamedTuple):
    """One estimate of alpha of one layer.

    Attributes:
        source, run: Table and training, or ``"synthetic"`` and the spectrum.
        layer: Its name, or which of the random matrices.
        n: Number of eigenvalues.
        anchor: Step of the anchor; None if the method has none.
        step: Step of the training, or which of the draws of the probes.
        drift: |W - W_0| / |W_0| since the anchor; None without anchor.
        method: Name of the method.
        exact: Alpha of all singular values in float64.
        alpha: The estimate.
        error: The standard error that comes with it; NaN if none does.
    """

    source: str
    run: str
    layer: str
    n: int
    anchor: int | None
    step: int
    drift: float | None
    method: str
    exact: float
    alpha: float
    error: float


class Held(NamedTuple):
    """What an anchor needs to be compared later; arrays are by layer."""

    anchors: Anchors
    weights: list[Tensor]  # of the anchor, copies
    smooth: Array  # alpha with a smoothed xmin


class Followed:
    """The weights of a model that is being trained, and everything that is asked of them."""

    def __init__(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        self.layers: list[Layer] = [
            layer
            for layer in find_layers(model)
            if layer.role != "embedding" and layer.n_eigs >= LEAST
        ]
        self.weights = [parameters[layer.name].detach() for layer in self.layers]
        self.kinds = [layer.kind for layer in self.layers]
        names = [layer.name.removesuffix(".weight") for layer in self.layers]
        self.batch = Batch(dict(zip(names, self.weights, strict=True)), self.kinds)

    def exact(self) -> list[float]:
        """The true alphas."""
        layers = list(zip(self.weights, self.kinds, strict=True))
        return parallel_map(lambda layer: true_alpha(*layer), layers, lambda x: x[0].numel())

    def smooth(self) -> Array:
        """Alpha with a smoothed xmin."""
        return columns(measured(self.weights, self.kinds, self.batch.names, SMOOTH))[0]

    def hold(self) -> Held:
        """An anchor at the weights as they are."""
        copies = [weight.clone() for weight in self.weights]
        return Held(take_anchors(self.batch, OPTIONS, seed=SEED), copies, self.smooth())

    def from_anchor(self, held: Held) -> Estimates:
        """Alpha and its standard error by every method that has an anchor."""
        anchored = held.anchors.fit.alpha
        floor = 1 + (anchored - 1) * (self.smooth() - 1) / (held.smooth - 1)
        return {
            "stale": held.anchors.stale(self.batch),
            "lin": held.anchors.lin(self.batch),
            "aligned": held.anchors.aligned(self.batch, STEPS),
            "floor": (floor, np.full_like(floor, np.nan)),
        }

    def drift(self, held: Held) -> list[float]:
        pairs = zip(self.weights, held.weights, strict=True)
        return [float((now - then).norm() / then.norm()) for now, then in pairs]

    def without_anchor(self, step: int) -> Estimates:
        """Alpha and its standard error by every method that looks at these weights alone."""
        layers = (self.weights, self.kinds, self.batch.names, OPTIONS)
        found = {
            f"fresh p{p}": columns(measured(*layers, SketchOptions(p, STEPS, SEED, step)))
            for p in PROBES
        }
        return {**found, "exact": columns(measured(*layers))}


def measured(
    weights: Sequence[Tensor],
    kinds: Sequence[Kind],
    names: Sequence[str],
    options: FitOptions,
    sketch: SketchOptions | None = None,
) -> list[Measurement]:
    """What tbfast gives: of a sketch, or of the exact spectra."""
    method: Method = "sketch" if sketch else "exact"
    return measure(weights, kinds, options, names=names, method=method, sketch=sketch)


def columns(found: Sequence[Measurement]) -> tuple[Array, Array]:
    """Alphas and their standard errors."""
    pairs = [(one.fit.alpha, one.sketch_error) for one in found]
    alpha, error = np.array(pairs).T
    return alpha, error


def true_alpha(weight: Tensor, kind: Kind) -> float:
    """Alpha of all singular values in float64, by LAPACK."""
    (found,) = measure([weight], [kind], OPTIONS, method="exact", backend="reference")
    return float(found.fit.alpha)


def compared(training: Training) -> Iterator[Row]:
    """Every estimate at every step of a training that is to be looked at."""
    model, train = training.begin()
    followed = Followed(model)
    held: dict[int, Held] = {}
    steps = {step for later in training.anchors.values() for step in later}
    for step in range(max(steps) + 1):
        if step:
            train()
        if step in steps:
            yield from _compared_at(step, training, followed, held)
        if step in training.anchors:
            held[step] = followed.hold()


def _compared_at(
    step: int, training: Training, followed: Followed, held: dict[int, Held]
) -> Iterator[Row]:
    exact = followed.exact()
    looks: list[tuple[int | None, Sequence[float | None], Estimates]]
    looks = [(None, [None] * len(exact), followed.without_anchor(step))]
    for anchor, later in training.anchors.items():
        if step in later:
            then = held[anchor]
            looks.append((anchor, followed.drift(then), followed.from_anchor(then)))
    for i, (name, layer) in enumerate(zip(followed.batch.names, followed.layers, strict=True)):
        for since, drifts, estimates in looks:
            place = (training.source, training.name, name, layer.n_eigs, since, step, drifts[i])
            for method, (alpha, error) in estimates.items():
                yield Row(*place, method, exact[i], float(alpha[i]), float(error[i]))


def sketched(matrices: Sequence[Drawn]) -> Iterator[Row]:
    """Fresh sketches of random matrices, and their exact alpha."""
    exact = parallel_map(
        lambda drawn: true_alpha(drawn.matrix(), "linear"), matrices, lambda drawn: drawn.n**3
    )
    for drawn, truth in zip(matrices, exact, strict=True):
        weights, name = [drawn.matrix()], f"matrix {drawn.seed}"
        looks: list[tuple[str, int, SketchOptions | None]] = [("exact", 0, None)]
        looks += [
            (f"fresh p{p}", draw, SketchOptions(p, STEPS, SEED, draw))
            for p in drawn.probes
            for draw in range(drawn.draws)
        ]
        for method, draw, sketch in looks:
            alpha, error = columns(measured(weights, ["linear"], [name], OPTIONS, sketch))
            place = ("synthetic", drawn.spectrum, name, drawn.n, None, draw, None)
            yield Row(*place, method, truth, float(alpha[0]), float(error[0]))


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Six significant digits; three of drift and of the standard error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = {"n": "N", "exact": "alpha_exact"}
        writer.writerow([names.get(field, field) for field in Row._fields])
        for row in rows:
            drift = "" if row.drift is None else f"{row.drift:.3g}"
            error = "" if np.isnan(row.error) else f"{row.error:.3g}"
            anchor = "" if row.anchor is None else row.anchor
            alphas = (f"{row.exact:.6g}", f"{row.alpha:.6g}")
            writer.writerow([*row[:4], anchor, row.step, drift, row.method, *alphas, error])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="few steps, small matrices")
    parser.add_argument("--out", type=Path, help="report (docs/accuracy.md; quick: build/)")
    parser.add_argument("--data", type=Path, default=ROOT / "build" / "data", help="downloads")
    args = parser.parse_args()
    torch.set_num_threads(1)  # so that trainings do not depend on the number of cores
    out: Path = args.out or ROOT / ("build" if args.quick else "docs") / "accuracy.md"
    table = out.with_suffix(".csv") if args.quick else ROOT / "benchmarks/results/accuracy.csv"
    start = time.perf_counter()
    rows: list[Row] = []
    for training in trainings(args.data, args.quick):
        rows += compared(training)
        print(f"{time.perf_counter() - start:6.0f} s  {training.name}", flush=True)
    rows += sketched(random_matrices(args.quick))
    print(f"{time.perf_counter() - start:6.0f} s  synthetic", flush=True)
    write_csv(rows, table)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        report(rows, f"{versions}. Seed of every training, anchor and sketch: {SEED}"),
        encoding="utf-8",
    )
    print(f"{len(rows)} rows in {table}, report in {out}")


if __name__ == "__main__":
    main()
