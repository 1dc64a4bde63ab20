"""Which policy of measuring follows alpha best for its cost? Real trainings, recorded and replayed.

    python benchmarks/policies.py record gpt2 220 5    # 220 steps, looked at every 5
    python benchmarks/policies.py replay               # all recorded; writes results/policies.csv

A recording holds, for every layer, the exact alpha, sketches of it and the kept rows. A replay
drives the tracker of ``tbfast.tracker``, or a variant of it, through them with nominal costs: what
is compared is the choice of what to measure, free of the machine's noise. Errors are shares of the
spread between the layers, over all looks after the 50th step (after the first, in fine-tuning).
"""

from __future__ import annotations

import csv
import math
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from workloads import DATA, WORKLOADS, Workload

from tbfast.alpha import AlphaFit
from tbfast.budget import layer_cost
from tbfast.estimates import Estimates
from tbfast.lens import Lens
from tbfast.presets import resolve, select_options
from tbfast.selection import tuned_layers
from tbfast.spectra import Measurement
from tbfast.tracker import Tracker

RECORDS = DATA.parent / "policies"
RESULTS = Path(__file__).parent / "results/policies.csv"
STEP_SECONDS = {"gpt2": 2.0, "darcy": 0.009, "minilm": 0.38, "mlp": 0.02}  # two cores, undisturbed
BUDGETS = (0.001, 0.003, 0.01, 0.03, 0.1)  # shares of a step
PROBES = (4, 8)
_BREAK = 4.0  # see Filter


@cache
def workload_of(name: str) -> Workload:
    return WORKLOADS[name](0)


def layers_of(workload: Workload) -> list:
    """The tuned layers of a training."""
    selection = select_options("tempbalance", workload.options)
    return [entry.layer for entry in tuned_layers(workload.model, selection)]


def record(name: str, steps: int, each: int) -> None:
    """Train, and write down what any policy could see."""
    workload = workload_of(name)
    layers, parameters = layers_of(workload), dict(workload.model.named_parameters())
    lenses = {p: Lens(layers, resolve("tempbalance", {"probes": p})) for p in PROBES}
    rows = range(len(layers))
    looks: list[dict] = []
    optimizer = torch.optim.AdamW(workload.model.parameters(), lr=workload.rate)
    for step in range(steps + 1):
        if step:
            optimizer.zero_grad()
            workload.loss(step).backward()
            optimizer.step()
        if step % each:
            continue
        for lens in lenses.values():
            lens.show({row: parameters[layer.name] for row, layer in enumerate(layers)})
        look = {"step": step, "kept": lenses[4].keep(rows)}
        look["exact"] = [m.fit.alpha for m in lenses[4].measure(rows, "exact", 0)]
        for probes, lens in lenses.items():
            found = lens.measure(rows, "sketch", step)
            look[f"sketch{probes}"] = [(m.fit.alpha, m.sketch_error) for m in found]
        looks.append(look)
        print(f"{name}: step {step} of {steps}", file=sys.stderr)
    RECORDS.mkdir(parents=True, exist_ok=True)
    torch.save(looks, RECORDS / f"{name}.pt")


class Recorded(Lens):
    """A lens on a recording; ``at`` is the look that it sees."""

    def __init__(self, layers, options, looks) -> None:
        super().__init__(layers, options)
        self.looks, self.at, self.probes = looks, 0, 8
        self.workers = 2

    def show(self, weights) -> None: ...

    def keep(self, rows):
        return [self.looks[self.at]["kept"][row] for row in rows]

    def _movement(self, rows, kept):
        sums = []
        for new, old in zip(self.keep(rows), kept, strict=True):
            old, step = old.double(), new.double() - old.double()
            sums.append([float(s.sum()) for s in (step * step, step * old, old * old)])
        return np.array(sums).T

    def measure(self, rows, look, draw):
        now = self.looks[self.at]
        if look != "sketch":
            return [_measured(now["exact"][row], 0.0) for row in rows]
        return [_measured(*now[f"sketch{self.probes}"][row]) for row in rows]


def _measured(alpha: float, error: float) -> Measurement:
    nan = math.nan
    fit = AlphaFit(alpha, nan, 0, nan, nan, 0, None)
    return Measurement(fit, 0, nan, nan, "sketch" if error else "exact", error)


class RoundRobin(Tracker):
    """The layer that was measured longest ago comes first."""

    def _ranked(self, rows, step):
        measured_at = self.known.measured_at
        waiting = [row for row in rows if measured_at[row] < step]
        return sorted(waiting, key=lambda row: (measured_at[row], row))


class SamePace(Estimates):
    def _filter(self, row, alpha, variance, step):
        pace = self.pace[row]
        super()._filter(row, alpha, variance, step)
        self.pace[row] = pace


class FixedPace(Tracker):
    """Nothing is learned of how alpha follows drift."""

    def __init__(self, layers, options) -> None:
        super().__init__(layers, options)
        self.known = SamePace(layers, options)


class Filter(Tracker):
    """Exact or sketched, layer by layer, whichever makes the mean variance less.

    With a random walk of rate q, a cost c and a noise R, exact measurements at every affordable
    moment leave q c / 2, sketches sqrt(q R c'): the sketch wins once the variance at the time of
    measuring is above 4 R c' / c.
    """

    def _ranked(self, rows, step):
        exact = [layer_cost(layer, is_complex=len(layer.shape) > 2) for layer in self._layers]
        options = (self._lens.probes, 20)
        rough = [
            layer_cost(layer, is_complex=len(layer.shape) > 2, sketch=options)
            for layer in self._layers
        ]
        noise = [
            (1.3 * a) ** 2 / (self._lens.probes * layer.n_eigs)
            for a, layer in zip(self.known.estimate, self._layers, strict=True)
        ]
        self._sketched = {
            row
            for row in rows
            if self.known.predicted(row, step) > _BREAK * noise[row] * rough[row] / exact[row]
            and rough[row] < exact[row] / 1.5
        }
        self._costs = [
            r if i in self._sketched else e
            for i, (r, e) in enumerate(zip(rough, exact, strict=True))
        ]
        ranked = super()._ranked(rows, step)
        return [row for row in ranked if (row in self._sketched) == (ranked[0] in self._sketched)]

    def _measure(self, lens, rows, step):
        sketched = rows[0] in getattr(self, "_sketched", ())
        for row, found in zip(
            rows, lens.measure(rows, "sketch" if sketched else "exact", step), strict=True
        ):
            self.known.take(row, found, step, anew=step == 0)
        for row, kept in zip(rows, lens.keep(rows), strict=True):
            self._kept[row] = kept
        return [True] * len(rows)


POLICIES: dict[str, type[Tracker]] = {
    "round robin": RoundRobin,
    "drift gate, fixed pace": FixedPace,
    "drift gate, learned pace (tbfast)": Tracker,
    "filter, exact or 4 probes": Filter,
    "filter, exact or 8 probes": Filter,
}


def replay(name: str, policy: str, budget: float, looks: list[dict]) -> dict:
    """One policy through one recording."""
    workload = workload_of(name)
    layers, options = layers_of(workload), resolve("tempbalance", {"budget": budget})
    tracker = POLICIES[policy](layers, options)
    lens = tracker._lens = Recorded(layers, options, looks)
    lens.probes = 4 if "4 probes" in policy else 8
    tracker._costs = [layer_cost(layer, is_complex=layer.kind == "spectral") for layer in layers]
    account = tracker.budget
    account._step_seconds, account._read = STEP_SECONDS[name], lambda agree: None
    paid = [0.0]
    account.pay = lambda nominal, seconds, pay=account.pay: (
        paid.append(nominal),
        pay(nominal, 0.0),
    )
    weights, errors, ratios = dict.fromkeys(range(len(layers)), torch.empty(0)), [], []
    for lens.at, look in enumerate(looks):
        for _ in range(look["step"] - looks[max(0, lens.at - 1)]["step"]):
            tracker.tick()
        tracker.update(weights, look["step"])
        if look["step"] >= (50 if workload.fresh else 1):
            exact = np.array(look["exact"])
            error = np.array(tracker.known.alpha) - exact
            errors.append(error / np.ptp(exact))
            ratios.append(error / tracker.known.error(look["step"]))
    return _row(
        name, policy, budget, sum(paid) / (looks[-1]["step"] * STEP_SECONDS[name]), errors
    ) | {"within_two_errors": round(float(np.mean(np.abs(ratios) < 2)), 3)}


def published(name: str, every: int, looks: list[dict], refresh: float) -> dict:
    """All layers by torch.linalg.svdvals every so many steps, each time for so many seconds."""
    workload = workload_of(name)
    known, errors = looks[0]["exact"], []
    for look in looks:
        known = look["exact"] if look["step"] % every == 0 else known
        if look["step"] >= (50 if workload.fresh else 1):
            exact = np.array(look["exact"])
            errors.append((np.array(known) - exact) / np.ptp(exact))
    return _row(name, f"svdvals every {every}", "", refresh / every / STEP_SECONDS[name], errors)


def all_published(name: str, looks: list[dict]) -> list[dict]:
    """The published way at several intervals; those between the looks say nothing."""
    workload = workload_of(name)
    parameters = dict(workload.model.named_parameters())
    refresh = svdvals_seconds([parameters[layer.name].detach() for layer in layers_of(workload)])
    steps = sorted({10, 20, 50, 100, workload.epoch})
    return [published(name, k, looks, refresh) for k in steps if k % looks[1]["step"] == 0]


def svdvals_seconds(weights) -> float:
    """Median time of one refresh the published way."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        for weight in weights:
            torch.linalg.svdvals(weight if weight.ndim == 2 else weight.flatten(2).permute(2, 0, 1))
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def _row(name, policy, budget, overhead, errors) -> dict:
    rms, most = np.sqrt(np.mean(np.square(errors))), np.abs(errors).max()
    return {
        "workload": name,
        "policy": policy,
        "budget": budget,
        "overhead_percent": round(100 * float(overhead), 4),
        "rms_error_percent_of_spread": round(100 * float(rms), 3),
        "max_error_percent_of_spread": round(100 * float(most), 2),
    }


def main(arguments: list[str]) -> None:
    if arguments[0] == "record":
        record(arguments[1], int(arguments[2]), int(arguments[3]))
        return
    rows = []
    for name in WORKLOADS:
        path = RECORDS / f"{name}.pt"
        if not path.exists():
            continue
        looks = torch.load(path, weights_only=True)
        rows += [replay(name, policy, budget, looks) for policy in POLICIES for budget in BUDGETS]
        rows += all_published(name, looks)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]], lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        if row["budget"] in ("", 0.01):
            print(*row.values(), sep="  ")


if __name__ == "__main__":
    main(sys.argv[1:])
