"""What the methods of merging compute, against NumPy in float64, and what they refuse."""

import numpy as np
import pytest
import torch
from merge_oracle import arrays, drawn

import tbfast
from tbfast import _native
from tbfast.merging.draws import key

ISAS = _native.isas()
METHODS = ("select", "linear", "task", "slerp", "ties", "dare_linear", "dare_ties")
WITH_BASE = ("task", "ties", "dare_linear", "dare_ties")


def oracle(method, base, models, weights, density=0.5, t=0.5, scale=1.0, name="w"):
    """The published formulas in float64."""
    x = np.array(models, dtype=np.float64)
    w = np.array(weights, dtype=np.float64)[:, None]
    if method == "linear":
        return (w * x).sum(0) / w.sum()
    if method == "slerp":
        a, b = x
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        if abs(cosine) > 0.9995:
            return (1 - t) * a + t * b
        angle = np.arccos(cosine)
        return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    old = np.array(base, dtype=np.float64)
    delta = x - old
    if method.startswith("dare"):
        place = np.arange(x.shape[1])
        for i in range(len(x)):
            kept = drawn(key(0, f"drop/{i}", name), place) < density * 2**32
            delta[i] = np.where(kept, delta[i] / density, 0)
    if method == "ties":
        kept = max(1, round(density * x.shape[1]))
        least = np.sort(np.abs(delta), axis=1)[:, -kept]
        delta = np.where(np.abs(delta) >= least[:, None], delta, 0)
    total = (w * delta).sum(0)
    if method in ("task", "dare_linear"):
        return old + scale * total
    agrees = np.where(total >= 0, delta > 0, delta < 0)
    share = (w * agrees).sum(0)
    return old + scale * (w * delta * agrees).sum(0) / np.where(share == 0, 1, share)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("method", METHODS[1:])
def test_methods_are_the_published_formulas(method, isa, monkeypatch):
    monkeypatch.setenv("TBFAST_ISA", isa)
    count = 2 if method == "slerp" else 3
    base, models = arrays(count, 1500)
    weights = [0.5, 0.2, 0.3][:count] if method != "slerp" else [1, 1]
    given = base if method in WITH_BASE else None
    found = tbfast.merge_tensors(
        models, name="w", method=method, base=given, weights=weights, density=0.4, t=0.3, scale=0.7
    )
    expected = oracle(method, base, models, weights, density=0.4, t=0.3, scale=0.7)
    # A handful of float32 roundings of numbers up to 4
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("method", METHODS)
def test_instruction_sets_and_threads_change_no_bit(method, monkeypatch):
    base, models = arrays(2, 200_000)
    given = base if method in WITH_BASE else None
    results = set()
    for isa in ISAS:
        for threads in ("1", "3"):
            monkeypatch.setenv("TBFAST_ISA", isa)
            monkeypatch.setenv("TBFAST_NUM_THREADS", threads)
            found = tbfast.merge_tensors(models, name="w", method=method, base=given)
            results.add(found.tobytes())
    assert len(results) == 1


@pytest.mark.parametrize("density", [1e-9, 0.1, 0.5, 0.97, 1.0])
@pytest.mark.parametrize(
    "kind", ["normal", "few values", "all equal", "mostly zero", "one outlier"]
)
def test_ties_keeps_what_sorting_would(density, kind):
    size = 1_300_001  # above what is held at once, so that a sample is taken
    rng = np.random.default_rng(1)
    delta = {
        "normal": rng.standard_normal(size),
        "few values": rng.integers(-3, 4, size).astype(float),
        "all equal": np.ones(size),
        "mostly zero": np.where(rng.random(size) < 0.01, rng.standard_normal(size), 0),
        "one outlier": np.where(np.arange(size) == 700_000, 1e6, 1e-3 * np.arange(size) / size),
    }[kind].astype(np.float32)
    found = tbfast.merge_tensors(
        [delta], name="w", method="ties", base=np.zeros(size, np.float32), density=density
    )
    least = np.sort(np.abs(delta))[-max(1, round(density * size))]
    np.testing.assert_array_equal(found, np.where(np.abs(delta) >= least, delta, 0))


def test_slerp_ends_at_the_models_and_meets_degenerate_pairs():
    _, (a, b) = arrays(2)
    a[5] = -0.0
    for t, end in ((0, a), (1, b)):
        found = tbfast.merge_tensors([a, b], name="w", method="slerp", t=t)
        np.testing.assert_array_equal(found.view(np.uint32), end.view(np.uint32))
    zero = np.zeros_like(a)
    for other in (a, -a, 2 * a, zero):
        found = tbfast.merge_tensors([a, other], name="w", method="slerp", t=0.25)
        np.testing.assert_allclose(found, 0.75 * a + 0.25 * other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rescale", ["paper", "l1", "none"])
def test_dare_makes_up_for_what_it_drops(rescale):
    base, (model,) = arrays(1, 100_000, changed=1.0)
    found = tbfast.merge_tensors(
        [model], name="w", method="dare_linear", base=base, density=0.25, rescale=rescale
    )
    kept = found != base
    # 5 standard deviations of the share
    assert abs(kept.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 100_000)
    delta, merged = (np.abs(m.astype(float) - base) for m in (model, found))
    factor = {"paper": 4.0, "l1": delta.sum() / delta[kept].sum(), "none": 1.0}[rescale]
    np.testing.assert_allclose(merged[kept], factor * delta[kept], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_rounded_once_to_nearest_even(dtype):
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-9, 4, 20_000)
    models = [(torch.randn(20_000, generator=generator) * scale).to(dtype) for _ in range(2)]
    found = tbfast.merge_tensors(models, name="w", method="linear")
    expected = ((models[0].float() + models[1].float()) * 0.5).to(dtype)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_float64_is_computed_in_float64():
    base, models = arrays(2, dtype=np.float64)
    found = tbfast.merge_tensors(models, name="w", method="task", base=base)
    np.testing.assert_allclose(found, oracle("task", base, models, [0.5, 0.5]), rtol=1e-14)


def test_linear_keeps_minus_zero_and_skips_models_without_weight():
    minus = np.full(10, -0.0, np.float32)
    merged = tbfast.merge_tensors([minus, minus], name="w", method="linear")
    assert np.signbit(merged).all()
    broken = np.full(10, np.inf, np.float32)
    merged = tbfast.merge_tensors([minus, broken], name="w", method="linear", weights=[1, 0])
    assert (merged == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mean"}, "method must be one of select, linear"),
        ({"method": "ties"}, r"method='ties' needs base="),
        ({"weights": [1]}, "one weight for each of the 2 models, got 1"),
        ({"weights": [1, -1]}, "weights must be finite, not negative"),
        ({"weights": [1, float("nan")]}, "weights must be finite"),
        ({"weights": [0, 0]}, "not all 0"),
        ({"density": 0}, "density must be above 0 and at most 1, got 0"),
        ({"method": "slerp", "t": 1.5}, "t must be from 0 to 1, got 1.5"),
        ({"scale": float("inf")}, "scale must be finite"),
        ({"rescale": "l2"}, "rescale must be one of paper, l1, none; got 'l2'"),
        ({"resample": 2}, r"resample=2 needs base="),
        ({"resample": "yes"}, "resample must be 'auto', 'off' or a number"),
        ({"method": "linear", "resample": 1}, r"resample=1 is for method='select'"),
        ({"seed": -1}, r"seed must be a whole number from 0 to 2\^64 - 1, got -1"),
        ({"start": -1}, "start must be 0 or more"),
        ({"method": "slerp", "start": 4}, "looks at whole tensors"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, message):
    _, models = arrays(2, 8)
    with pytest.raises(ValueError, match=message):
        tbfast.merge_tensors(models, name="w", **options)


def test_tensors_that_do_not_fit_are_refused_by_name():
    a, b = np.zeros(4, np.float32), np.zeros(5, np.float32)
    with pytest.raises(
        ValueError, match=r"w: tensor 1 has shape \(5,\) and dtype F32, tensor 0 has"
    ):
        tbfast.merge_tensors([a, b], name="w")
    with pytest.raises(ValueError, match="w: the base has shape"):
        tbfast.merge_tensors([a, a], name="w", base=b)
    with pytest.raises(ValueError, match="does not take I32; use 'select'"):
        tbfast.merge_tensors([a.astype(np.int32)] * 2, name="w", method="linear")
    with pytest.raises(ValueError, match="need 1 to 32 models, got 33"):
        tbfast.merge_tensors([a] * 33, name="w")
    with pytest.raises(ValueError, match="must be a dense CPU tensor"):
        tbfast.merge_tensors([torch.empty(3, device="meta")] * 2, name="w")
    with pytest.raises(ValueError, match="which cannot be merged"):
        tbfast.merge_tensors([np.array(["a"])] * 2, name="w")


def test_empty_and_scalar_tensors_are_merged():
    empty = tbfast.merge_tensors([np.empty((0, 3), np.float32)] * 2, name="w", method="linear")
    assert empty.shape == (0, 3)
    scalar = tbfast.merge_tensors([torch.tensor(1.0), torch.tensor(3.0)], name="w", method="linear")
    assert scalar.item() == 2.0
