"""method="sketch" from weights to alpha: against exact spectra, and however it is run."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import tbfast
from tbfast import _native
from tbfast.anchors import take_anchors
from tbfast.batch import Batch
from tbfast.fitting import FIT_KINDS, FitOptions
from tbfast.sketching import SketchOptions
from tbfast.spectra import SKETCH_ABOVE, measure

# The same arithmetic with sums in another order, amplified by Lanczos.
ISA_TOLERANCE = 1e-5


def gaussian(rows, cols, seed=0, dtype=torch.float32):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sketched(weights, *, fit="median", names=None, **options):
    kinds = ["linear"] * len(weights)
    sketch = SketchOptions(**options)
    return measure(weights, kinds, FitOptions(fit), names=names, method="sketch", sketch=sketch)


def alphas(found):
    return np.array([m.fit.alpha for m in found])


def test_the_error_is_one_over_the_root_of_probes_and_eigenvalues():
    weight = gaussian(512, 512)
    exact = tbfast.fit_alpha(torch.linalg.svdvals(weight.double()).square()).alpha
    rms = {}
    for probes in (4, 16):
        runs = [sketched([weight], probes=probes, seed=s)[0] for s in range(24)]
        rms[probes] = math.sqrt(np.mean((alphas(runs) / exact - 1) ** 2))
        reported = np.mean([m.sketch_error / m.fit.alpha for m in runs])
        # 24 draws tell an rms to 15 %; the report must be of its size.
        assert 0.5 * rms[probes] < reported < 2.5 * rms[probes]
    # NUMERICS: about 130 % / sqrt(p N), 2.9 % and 1.4 % here, give or take a third.
    assert 0.015 < rms[4] < 0.045
    assert rms[16] < 0.7 * rms[4]


@pytest.mark.parametrize("fit", FIT_KINDS)
def test_a_sketch_reports_what_an_exact_fit_reports(fit):
    weight = gaussian(300, 200) * torch.linspace(0.1, 2, 200)
    [exact] = measure([weight], ["linear"], FitOptions(fit), method="exact")
    [found] = sketched([weight], fit=fit, probes=32, steps=40)
    assert found.method == "sketch"
    assert exact.method == "exact"
    assert exact.sketch_error == 0
    assert abs(found.fit.alpha - exact.fit.alpha) < 3 * found.sketch_error
    assert found.n_eigs == exact.n_eigs == 200
    assert found.fit.n_zeros == 0
    # 40 Lanczos steps of 32 runs find the largest eigenvalue to float32; none goes beyond it.
    assert found.max_eigenvalue == pytest.approx(exact.max_eigenvalue, rel=1e-4)
    assert found.max_eigenvalue <= exact.max_eigenvalue * (1 + 1e-5)
    # The trace of random signs errs by sqrt(2 / (32 * 200)) of itself or less.
    assert found.sum_eigenvalues == pytest.approx(exact.sum_eigenvalues, rel=0.05)


def test_a_largest_ritz_value_is_never_above_the_norm():
    weights = [gaussian(400, 300, seed) for seed in range(6)]
    for weight, found in zip(weights, sketched(weights, steps=60), strict=True):
        largest = float(torch.linalg.matrix_norm(weight.double(), 2)) ** 2
        assert found.max_eigenvalue <= largest * (1 + 1e-5)  # float32 products


def test_rank_deficient_weights_lose_their_zeros():
    weight = gaussian(500, 100) @ gaussian(100, 400, 1)
    [exact] = measure([weight], ["linear"], FitOptions(), method="exact")
    [found] = sketched([weight], probes=16)
    assert exact.fit.n_zeros == 300
    assert abs(found.fit.n_zeros - 300) < 15  # the mass at zero scatters by sqrt(2 * 400 / 16)
    assert abs(found.fit.alpha - exact.fit.alpha) < 3 * found.sketch_error


def test_layers_without_an_alpha_say_why_and_leave_the_others_alone():
    good = gaussian(90, 80)
    bad = good.clone()
    bad[40, 40] = math.nan
    orthogonal = torch.linalg.qr(gaussian(70, 70).double()).Q.float()
    # (values, 1 x n and n x 1 have one eigenvalue: exact, whatever was asked for)
    weights = [good, bad, torch.zeros(60, 60), orthogonal, gaussian(1, 50), gaussian(50, 1)]
    names = [str(i) for i in range(len(weights))]
    found = sketched(weights, names=names)
    [alone] = sketched([good], names=["0"])
    assert found[0].fit.alpha == alone.fit.alpha
    reasons = [m.fit.reason for m in found]
    assert reasons[0] is None
    assert reasons[1] == "weights or eigenvalues are not finite"
    assert reasons[2] == "all eigenvalues are zero"
    assert reasons[3] == "all eigenvalues of the tail are equal"
    assert all(math.isnan(m.fit.alpha) for m in found[1:])
    assert [m.method for m in found[4:]] == ["exact", "exact"]


@pytest.mark.parametrize("factor", [1e-30, 1e-15, 1e15, 1e30])
def test_alpha_does_not_depend_on_the_scale(factor):
    weight = gaussian(120, 100, dtype=torch.float64)
    plain, scaled = sketched([weight]), sketched([weight * factor])
    # float32 products, whether or not they were scaled first
    np.testing.assert_allclose(alphas(scaled), alphas(plain), rtol=1e-4)
    assert scaled[0].max_eigenvalue == pytest.approx(plain[0].max_eigenvalue * factor**2, rel=1e-5)


def test_rank_one_and_equal_singular_values():
    outer = gaussian(90, 1) @ gaussian(1, 70)
    equal = torch.linalg.qr(gaussian(90, 70).double()).Q.float() * 3
    rank_one, flat = sketched([outer, equal])
    assert rank_one.fit.n_zeros >= 68  # one eigenvalue; the mass of the zeros is estimated
    assert math.isnan(rank_one.fit.alpha)
    assert flat.fit.reason == "all eigenvalues of the tail are equal"
    assert flat.max_eigenvalue == pytest.approx(9, rel=1e-5)


def test_alpha_is_the_same_to_the_bit_for_any_threads_and_order(monkeypatch):
    shapes = [(96, 64), (300, 300), (64, 500), (2100, 1100), (1100, 2100)]
    weights = [gaussian(r, c, i) for i, (r, c) in enumerate(shapes)]
    names = [f"layer.{i}" for i in range(len(weights))]
    runs = []
    for threads in ("1", "2", "4"):
        monkeypatch.setenv("TBFAST_NUM_THREADS", threads)
        runs.append(alphas(sketched(weights, names=names, seed=7)))
    backwards = alphas(sketched(weights[::-1], names=names[::-1], seed=7))
    np.testing.assert_array_equal(runs[1], runs[0])
    np.testing.assert_array_equal(runs[2], runs[0])
    np.testing.assert_array_equal(backwards[::-1], runs[0])


def test_alpha_agrees_across_instruction_sets(monkeypatch):
    decay = torch.logspace(0, -2, 256)
    weights = [gaussian(300, 256), gaussian(300, 256) * decay, gaussian(200, 700)]
    weights += [gaussian(150, 150).bfloat16(), gaussian(100, 130).half()]
    found = []
    for isa in _native.isas():
        monkeypatch.setenv("TBFAST_ISA", isa)
        found.append(alphas(sketched(weights)))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=ISA_TOLERANCE)


def test_native_and_reference_sketches_agree():
    weights = [gaussian(150, 100), gaussian(80, 200) * torch.logspace(0, -2, 200)]
    both = [
        measure(weights, ["linear"] * 2, FitOptions(), method="sketch", backend=backend)
        for backend in ("native", "reference")
    ]
    # Lanczos in float32 and in float64: far below the error of the sketch, 3 %.
    np.testing.assert_allclose(alphas(both[0]), alphas(both[1]), rtol=1e-3)


def test_auto_sketches_only_what_is_large_and_fitted_by_its_median():
    small, large = torch.zeros(8, SKETCH_ABOVE + 9), torch.zeros(SKETCH_ABOVE + 1, 2 * SKETCH_ABOVE)
    methods = lambda **more: [  # noqa: E731
        m.method for m in measure([small, large], ["linear"] * 2, FitOptions(), **more)
    ]
    assert methods() == ["exact", "sketch"]
    with pytest.raises(ValueError, match="filter_zeros=1e-05; leave it out, or use method='exact'"):
        methods(method="sketch", filter_zeros=1e-5)


def test_analyze_sketches_and_keeps_the_exact_norm():
    model = nn.Sequential(nn.Linear(150, 130), nn.Conv2d(60, 60, 3))
    exact = tbfast.analyze(model, method="exact")
    rough = tbfast.analyze(model, method="sketch", probes=4, steps=25, seed=3)
    again = tbfast.analyze(model, method="sketch", probes=4, steps=25, seed=3)
    other = tbfast.analyze(model, method="sketch", probes=4, steps=25, seed=4)
    for e, r in zip(exact, rough, strict=True):
        assert r.method == "sketch"
        assert abs(r.alpha - e.alpha) < 3 * r.sketch_error
        assert r.alpha_error == pytest.approx(
            math.hypot((r.alpha - 1) / math.sqrt(r.n_tail), r.sketch_error)
        )
        assert r.frobenius_norm == pytest.approx(e.frobenius_norm, rel=1e-6)  # float32 weights
        assert e.sketch_error == 0
    assert rough.alphas == again.alphas
    assert rough.alphas != other.alphas


def test_probes_from_earlier_weights_give_their_alpha_and_follow_it():
    torch.manual_seed(0)
    before = {"a": torch.randn(200, 150), "c": torch.randn(60, 60, 3)}
    after = {name: w + 0.02 * torch.randn(w.shape) for name, w in before.items()}
    anchors = take_anchors(Batch(before), FitOptions(), gradient=False)
    for source in (before, anchors):
        there = tbfast.analyze(before, method="sketch", probes_from=source)
        exact = tbfast.analyze(before, method="exact")
        moved = tbfast.analyze(after, method="sketch", probes_from=source)
        truth = tbfast.analyze(after, method="exact")
        for x, y in zip(there, exact, strict=True):
            assert x.method == "sketch"
            assert x.alpha == pytest.approx(y.alpha, rel=2e-3)  # no probe variance at the anchor
        for x, y in zip(moved, truth, strict=True):
            assert abs(x.alpha - y.alpha) < 3 * x.sketch_error
            assert x.sketch_error < 0.02 * y.alpha
            assert x.frobenius_norm == pytest.approx(y.frobenius_norm, rel=1e-6)


def test_probes_from_other_weights_are_refused_by_name():
    weights = {"a": torch.randn(60, 70)}
    with pytest.raises(ValueError, match=r"probes_from='mapping' has no weight 'a' of the shape"):
        tbfast.analyze(weights, probes_from={"a": torch.randn(60, 71)})
    with pytest.raises(ValueError, match="probes_from= is for a sketch"):
        tbfast.analyze(weights, method="exact", probes_from=weights)


def test_every_step_of_a_training_draws_new_probes():
    model = nn.Sequential(nn.Linear(80, 70), nn.Linear(70, 75), nn.Linear(75, 60))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    balancer = tbfast.attach(optimizer, model, method="sketch", budget=None, seed=1)
    seen = []
    for _ in range(3):
        model(torch.ones(2, 80)).sum().backward()
        optimizer.step()
        seen.append(balancer.alphas["1.weight"])
    assert len(set(seen)) == 3  # the weights have not moved
    assert max(seen) / min(seen) < 1.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"probes": 0}, "probes must be a whole number from 1 to 8192, got 0"),
        ({"probes": 2.5}, "probes must be a whole number"),
        ({"steps": 0}, "steps must be a whole number from 1 to 1000, got 0"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"probes": True}, "probes must be a whole number"),
    ],
)
def test_options_of_a_sketch_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        SketchOptions(**options)
