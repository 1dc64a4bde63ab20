"""The tracker over a run: what it believes, what it spends, and that it resumes exactly."""

import io
import itertools
import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tbfast import Balancer, attach
from tbfast.budget import GRANT_SECONDS, GRANT_STEPS, Budget, joint_cost, layer_cost
from tbfast.matrices import Layer
from tbfast.presets import resolve
from tbfast.spectra import measure
from tbfast.tracker import Tracker

ANY = torch.empty(0)  # for a lens that does not look at it


def layers_of(count, side=64):
    return [Layer(f"blocks.{i}.weight", "linear", (side, side)) for i in range(count)]


def make_weights(count, side=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, side + 1) ** -0.5
    return {i: torch.randn(side, side, generator=generator) * scale for i in range(count)}


def median_alpha(weight):
    """The published fit, in NumPy."""
    values = np.sort(np.linalg.svd(np.asarray(weight, np.float64), compute_uv=False) ** 2)
    tail = values[len(values) // 2 :]
    return 1 + len(tail) / np.log(tail / tail[0]).sum()


class Clock:
    """A time that moves by hand, or by a fixed amount whenever it is read."""

    def __init__(self, monkeypatch, each_read=0.0):
        self.now, self.each_read = 100.0, each_read
        monkeypatch.setattr(time, "perf_counter", self.read)

    def read(self):
        self.now += self.each_read
        return self.now


class Drifting:
    """A lens on layers that turn by ``drift`` a step, their alphas by about ``pace * drift``."""

    def __init__(self, count, drift, pace, seed=0):
        self.rng, self.drift, self.pace = np.random.default_rng(seed), drift, pace
        self.alpha, self.step, self.workers, self.measured = np.full(count, 2.0), 0, 1, []

    def show(self, weights): ...

    def keep(self, rows):
        return [torch.tensor([float(self.step)]) for _ in rows]

    def turned(self, rows, kept):
        return np.array([self.drift * (self.step - float(k)) for k in kept])

    def move(self, steps):
        """The error grows in proportion to drift: one draw for the whole way."""
        self.step += steps
        change = self.rng.standard_normal(len(self.alpha)) * self.pace * self.drift * steps
        self.alpha = 1 + (self.alpha - 1) * (1 + change)

    def measure(self, rows, look, draw):
        self.measured.append((self.step, list(rows)))
        fits = [SimpleNamespace(alpha=float(self.alpha[row]), reason=None) for row in rows]
        return [SimpleNamespace(fit=fit, sketch_error=0.0) for fit in fits]

    def agree(self, seconds):
        return seconds


def test_unmoved_sketches_average_with_the_weights_of_their_variances():
    weights = make_weights(1)
    options = resolve("tempbalance", {"method": "sketch", "probes": 2, "steps": 12})
    tracker = Tracker(layers_of(1), options)
    for step in range(6):
        if step:
            tracker.tick()
        tracker.update(weights, step)
    found = [
        measure(list(weights.values()), ["linear"], options.fit, names=["blocks.0.weight"],
                method="sketch", sketch=type(options.sketch)(probes=2, steps=12, draw=step))[0]
        for step in range(6)
    ]  # fmt: skip
    alphas = np.array([m.fit.alpha for m in found])
    inverse = np.array([m.sketch_error for m in found]) ** -2
    # 1e-9: the recursion against the closed form, both in float64
    assert tracker.known.alpha[0] == pytest.approx(
        (alphas * inverse).sum() / inverse.sum(), rel=1e-9
    )
    assert tracker.known.error(5)[0] == pytest.approx(inverse.sum() ** -0.5, rel=1e-9)
    assert len(set(alphas)) == 6


@pytest.mark.parametrize("true_pace", [0.05, 0.15, 0.45])
def test_the_pace_of_alpha_is_learned_from_how_far_off_measurements_find_it(true_pace):
    tracker = Tracker(layers_of(8), resolve("tempbalance", {"budget": 1.0}))
    lens = tracker._lens = Drifting(8, drift=0.01, pace=true_pace)
    tracker._costs = [1e-6] * 8
    tracker.update(dict.fromkeys(range(8), ANY), 0)
    for _ in range(150):
        for _ in range(4):
            tracker.tick()
        lens.move(4)
        tracker.budget.credit = 1.0
        tracker.update(dict.fromkeys(range(8), ANY), lens.step)
    # Each layer remembers about 5 measurements; the mean over 8 layers varies by a fifth or so,
    # and a root of a noisy square is low by a little.
    assert np.mean(tracker.known.pace) == pytest.approx(true_pace, rel=0.4)


def test_standard_errors_cover_the_exact_alphas_of_a_training():
    torch.manual_seed(0)
    sizes = [48, 96, 64, 96, 48, 10]
    model = nn.Sequential(
        *itertools.chain(*[(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(sizes)])
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    balancer = attach(optimizer, model, budget=0.2, min_eigs=40, skip_first=False, skip_last=False)
    parameters = dict(model.named_parameters())
    inputs = torch.randn(512, 48)
    target = (inputs @ torch.randn(48, 10)).argmax(1)
    far, errors, spread = [], [], []
    for step in range(240):
        optimizer.zero_grad()
        batch = torch.randint(512, (64,))
        nn.functional.cross_entropy(model(inputs[batch]), target[batch]).backward()
        optimizer.step()
        if step % 6 == 5:
            exact = {name: median_alpha(parameters[name].detach()) for name in balancer.alphas}
            error = [balancer.alphas[name] - exact[name] for name in exact]
            far += [abs(e) < 2 * balancer.errors[n] for e, n in zip(error, exact, strict=True)]
            errors += error
            spread.append(max(exact.values()) - min(exact.values()))
    # Errors are conservative while everything moves at once and a little small straight after a
    # measurement; 95 % is what two standard errors promise.
    assert np.mean(far) > 0.8
    # Alpha moves by several times that over this run.
    assert np.sqrt(np.mean(np.square(errors))) < 0.1 * np.mean(spread)


def test_small_models_are_measured_at_every_one_of_the_first_steps():
    balancer = Balancer(layers_of(3))
    for step in range(GRANT_STEPS + 1):
        if step:
            balancer.advance()
        assert balancer.due
        named = {f"blocks.{i}.weight": w for i, w in make_weights(3, seed=step).items()}
        balancer.update(named)
        exact = [median_alpha(w) for w in named.values()]
        # 1e-5: float32 weights through a Gram matrix
        np.testing.assert_allclose(list(balancer.alphas.values()), exact, rtol=1e-5)


@pytest.mark.parametrize("share", [0.01, 0.05])
def test_no_more_than_the_share_is_spent_in_nominal_seconds(share, monkeypatch):
    clock = Clock(monkeypatch)
    layers = layers_of(12, 256)
    tracker = Tracker(layers, resolve("tempbalance", {"budget": share}))
    lens = tracker._lens = Drifting(12, drift=0.01, pace=0.2)
    tracker._costs = [layer_cost(layer, is_complex=False) for layer in layers]
    weights = dict.fromkeys(range(12), ANY)
    first = tracker.budget.pay_first
    monkeypatch.setattr(tracker.budget, "pay_first", lambda n, s: first(n, n))
    tracker.update(weights, 0)
    paid = []
    pay = tracker.budget.pay
    monkeypatch.setattr(tracker.budget, "pay", lambda n, s: (paid.append(n), pay(n, n)))
    for step in range(1, 2001):
        clock.now += 0.05
        tracker.tick()
        lens.move(1)
        if tracker.is_ready:
            tracker.update(weights, step)
    earned = share * 0.05 * 2000 + GRANT_SECONDS
    assert sum(paid) <= earned
    # Nearly all of it: less than the price of the next call is left.
    assert sum(paid) > 0.95 * earned
    assert {row for _, rows in lens.measured[12:] for row in rows} == set(range(12))


def test_nothing_is_measured_while_nothing_moves():
    tracker = Tracker(layers_of(4), resolve("tempbalance", {}))
    weights = make_weights(4)
    tracker.update(weights, 0)
    for step in range(1, 400):
        tracker.tick()
        tracker.budget.credit += 1e-4
        tracker.update(weights, step)
    assert max(tracker.known.measured_at) <= GRANT_STEPS


def test_the_first_steps_do_not_depend_on_the_clock(monkeypatch):
    def run(each_read):
        Clock(monkeypatch, each_read)
        tracker = Tracker(layers_of(30, 256), resolve("tempbalance", {}))
        lens = tracker._lens = Drifting(30, drift=0.01, pace=0.2)
        tracker._costs = [0.01 * (1 + i % 3) for i in range(30)]
        weights = dict.fromkeys(range(30), ANY)
        tracker.update(weights, 0)
        for step in range(1, 32):
            tracker.tick()
            lens.move(1)
            tracker.update(weights, step)
        return lens.measured

    assert run(1e-5) == run(3.0)
    assert len(run(1.0)) > 1


def test_the_dearest_layer_is_not_starved():
    """Variance over cost alone would leave it out while the others move."""
    tracker = Tracker(layers_of(3), resolve("tempbalance", {"budget": 0.5}))
    lens = tracker._lens = Drifting(3, drift=0.01, pace=0.2)
    tracker._costs = [0.01, 0.01, 0.2]
    weights = dict.fromkeys(range(3), ANY)
    tracker.update(weights, 0)
    for step in range(1, 600):
        tracker.tick()
        tracker.budget.credit += 0.005
        lens.move(1)
        tracker.update(weights, step)
    counts = [sum(row in rows for _, rows in lens.measured) for row in range(3)]
    # Intervals grow with the square root of the cost where variances grow evenly, with the cubic
    # root where errors do: a factor of 2.7 to 4.5 for one of 20.
    assert 2 <= counts[0] / counts[2] <= 6


@pytest.mark.parametrize("saved_at", [10, 40])
def test_a_resumed_run_decides_as_the_one_it_continues(saved_at, monkeypatch):
    def steps(tracker, lens, numbers):
        for step in numbers:
            tracker.tick()
            lens.move(1)
            tracker.update(dict.fromkeys(range(6), ANY), step)

    def fresh():
        tracker = Tracker(layers_of(6), resolve("tempbalance", {"budget": 1.0}))
        tracker._lens = Drifting(6, drift=0.02, pace=0.2)
        tracker._costs = [0.004] * 6
        return tracker, tracker._lens

    Clock(monkeypatch, 0.1)
    straight, lens = fresh()
    straight.update(dict.fromkeys(range(6), ANY), 0)
    steps(straight, lens, range(1, saved_at + 1))
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    resumed, other = fresh()
    resumed.load_state_dict(torch.load(file, weights_only=True), range(6))
    other.rng.bit_generator.state = lens.rng.bit_generator.state
    other.alpha, other.step = lens.alpha.copy(), lens.step
    lens.measured.clear()
    for pair in ((straight, lens), (resumed, other)):
        steps(*pair, range(saved_at + 1, saved_at + 41))
    assert lens.measured == other.measured
    assert len(lens.measured) > 1
    assert straight.known.alpha == resumed.known.alpha
    assert straight.state_dict()["rows"] == resumed.state_dict()["rows"]


def test_the_first_measurement_can_be_spread_and_is_reported_apart():
    balancer = Balancer(layers_of(10), warm_start=5)
    weights = {f"blocks.{i}.weight": w for i, w in make_weights(10).items()}
    for step in range(5):
        if step:
            balancer.advance()
        assert balancer.due
        assert set(balancer.factors.values()) == {1.0}
        balancer.update(weights)
        known = [a for a in balancer.alphas.values() if math.isfinite(a)]
        assert len(known) == 2 * (step + 1)
    assert (min(balancer.factors.values()), max(balancer.factors.values())) == (0.5, 1.5)
    assert balancer.initial_seconds > 0


def test_more_layers_than_classes_have_so_many_rates_and_fewer_have_their_own():
    weights = {f"blocks.{i}.weight": w for i, w in make_weights(20).items()}
    many, exact, few = (
        Balancer(layers_of(20)), Balancer(layers_of(20), rate_classes=None), Balancer(layers_of(16))
    )  # fmt: skip
    for balancer in (many, exact, few):
        balancer.update({n: w for n, w in weights.items() if n in balancer.alphas})
    assert len(set(many.factors.values())) <= 16
    assert len(set(exact.factors.values())) == 20
    assert len(set(few.factors.values())) == 16
    # Half the distance between two of 16 classes over [0.5, 1.5], in logarithms at the lower end
    for name, factor in exact.factors.items():
        assert many.factors[name] == pytest.approx(factor, rel=0.5 / 15 / 0.5)


def test_a_budget_keeps_the_price_of_waiting():
    budget = Budget(0.01)
    budget.credit = 0.5
    count, price = budget.afford([0.2, 0.2, 0.2], workers=2, look=0.01)
    assert (count, price) == (3, pytest.approx(0.01 + joint_cost([0.2] * 3, 2)))
    budget.credit = 0.1
    assert budget.afford([0.2, 0.2, 0.2], workers=2, look=0.01) == (0, 0.01)
    assert not budget.is_ready
    budget.credit = 0.25
    assert budget.is_ready
