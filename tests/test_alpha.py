"""Fits against independent oracles: closed forms, the powerlaw package, the published formula."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tbfast import fit_alpha

# Same formula in float64, summed in another order.
ROUNDING = 1e-10
# The bar for agreement with powerlaw and the NumPy oracle.
BAR = 1e-6


def spectra(count, seed=0):
    """Spectra of several families and sizes, ascending."""
    rng = np.random.default_rng(seed)
    families = [
        lambda n: rng.pareto(1.5, n) + 1,
        lambda n: rng.exponential(size=n),
        lambda n: rng.lognormal(0, 2, n),
        lambda n: np.linalg.svd(rng.standard_normal((n, n)), compute_uv=False) ** 2,
        lambda n: np.linalg.svd(rng.standard_normal((n, 3 * n)), compute_uv=False) ** 2,
    ]
    sizes = rng.integers(50, 400, count)
    return [np.sort(families[i % len(families)](n)) for i, n in enumerate(sizes)]


def published(values, candidates):
    """alpha and index of the candidate with the least distance, written out as published."""
    logs, n = np.log(values), len(values)
    best = (1.0, 0, 0.0)
    for i in candidates:
        tail = n - i
        excess = logs[i:].sum() - tail * logs[i]
        alpha = 1 + tail / excess if excess > 0 else math.inf
        if 1 < alpha < math.inf:
            model = 1 - (values[i:] / values[i]) ** (1 - alpha)
            distance = np.abs(model - np.arange(tail) / tail).max()
            if distance < best[0]:
                best = (distance, i, alpha)
    return best


def median_formula(values, xmin_pos):
    i = int(len(values) / xmin_pos)
    n = len(values) - i
    return 1 + n / (np.log(values[i:]).sum() - n * np.log(values[i])), values[i], n


@pytest.mark.parametrize("xmin_pos", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("n", [2, 3, 64, 65, 257])
def test_median_fit_starts_at_index_n_over_xmin_pos(n, xmin_pos):
    values = np.sort(np.random.default_rng(n).exponential(size=n))
    if n - int(n / xmin_pos) == 1:  # the tail is xmin alone: no excess, no alpha
        assert math.isnan(fit_alpha(values, xmin_pos=xmin_pos).alpha)
        return
    alpha, xmin, n_tail = median_formula(values, xmin_pos)
    found = fit_alpha(values, "median", xmin_pos=xmin_pos)
    assert found.alpha == pytest.approx(alpha, rel=ROUNDING)
    assert (found.xmin, found.n_tail) == (xmin, n_tail)
    assert found.alpha_error == pytest.approx((alpha - 1) / math.sqrt(n_tail), rel=ROUNDING)


def test_index_of_xmin_matters_by_more_than_the_tolerances_here():
    values = spectra(5)[3]
    i = len(values) // 2
    shifted = 1 + (len(values) - i - 1) / np.log(values[i + 1 :] / values[i + 1]).sum()
    assert abs(shifted / fit_alpha(values).alpha - 1) > 1e-4


@pytest.mark.parametrize("exponent", [1.5, 2.0, 3.5])
def test_alpha_of_an_exact_power_law_is_its_exponent(exponent):
    # Quantiles of a Pareto law with density ~ x^-exponent. The mean log excess of n midpoint
    # quantiles is that of the law to O(log n / n).
    n = 20_000
    values = (1 - (np.arange(n) + 0.5) / n) ** (-1 / (exponent - 1))
    for fit, options in (("median", {}), ("tail", {"k": 10_000}), ("ks", {})):
        assert fit_alpha(values, fit, **options).alpha == pytest.approx(exponent, rel=2e-3)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_ks_fit_agrees_with_the_published_formula_on_50_spectra(backend):
    cases = spectra(50)
    found = fit_alpha(cases, "ks", backend=backend)
    for row, values in enumerate(cases):
        distance, i, alpha = published(values, range(len(values) - 1))
        assert found.alpha[row] == pytest.approx(alpha, rel=BAR)
        assert found.xmin[row] == values[i]
        assert found.n_tail[row] == len(values) - i
        assert found.ks[row] == pytest.approx(distance, abs=1e-12)


def test_ks_fit_agrees_with_the_powerlaw_package_on_50_spectra():
    powerlaw = pytest.importorskip("powerlaw")
    for values in spectra(50, seed=1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # powerlaw divides by zero at its last candidate
            # By default powerlaw refuses candidates with alpha above 3.
            peer = powerlaw.Fit(values, verbose=False, parameter_ranges={"alpha": [1, 1e9]})
        found = fit_alpha(values, "ks")
        # powerlaw takes min(D) over the same candidates with the same one-sided distance.
        assert found.alpha == pytest.approx(float(peer.power_law.alpha), rel=BAR)
        assert found.xmin == pytest.approx(float(peer.power_law.xmin), rel=1e-12)


@pytest.mark.parametrize("compat", [False, True])
def test_peak_fit_agrees_with_the_published_formula(compat):
    for values in spectra(20, seed=2):
        log10 = np.log10(values)
        counts, edges = np.histogram(log10, bins=100, range=(log10[0], log10[-1]))
        peak = 10 ** edges[np.argmax(counts)]
        low = math.log10(0.95 * peak) if compat else 0.95 * peak
        near = [i for i in range(len(values) - 1) if low <= values[i] <= 1.5 * peak]
        distance, i, alpha = published(values, near)
        found = fit_alpha(values, "peak", peak_compat=compat)
        assert (found.alpha, found.ks) == pytest.approx((alpha, distance), rel=BAR)
        assert found.n_tail == len(values) - i


def test_tail_fit_is_the_hill_estimate_of_the_k_largest():
    values = spectra(1)[0]
    largest = values[-40:]
    expected = 1 + 40 / np.log(largest / largest[0]).sum()
    found = fit_alpha(values, "tail", k=40)
    assert found.alpha == pytest.approx(expected, rel=ROUNDING)
    assert found.n_tail == 40


def test_smooth_replaces_ln_xmin_by_its_mean_over_neighbouring_ranks():
    values = spectra(1)[0]
    n, i = len(values), len(values) // 2
    half = int(n / 32)
    logs = np.log(values)
    anchor = logs[i - half : i + half + 1].mean()
    expected = 1 + (n - i) / (logs[i:] - anchor).sum()
    assert fit_alpha(values, smooth=1 / 32).alpha == pytest.approx(expected, rel=ROUNDING)


def test_eigenvalues_may_come_in_any_order_and_type():
    values = spectra(1)[0]
    shuffled = np.random.default_rng(0).permutation(values)
    copy = shuffled.copy()
    assert fit_alpha(shuffled) == fit_alpha(values) == fit_alpha(list(values))
    np.testing.assert_array_equal(shuffled, copy)


def test_ragged_list_gives_arrays_equal_to_single_fits():
    cases = spectra(7)
    together = fit_alpha(cases, "ks")
    assert together.alpha.shape == (7,)
    for row, values in enumerate(cases):
        assert together.row(row) == fit_alpha(values, "ks")


def test_median_fit_ignores_zeros():
    values = spectra(1)[0]
    padded = np.concatenate([np.zeros(30), np.full(5, 1e-17 * values[-1]), values])
    found = fit_alpha(padded)
    assert found.alpha == fit_alpha(values).alpha
    assert found.n_zeros == 35


def test_filter_zeros_is_an_absolute_threshold():
    values = np.array([1e-6, 1e-5, 2e-5, 1.0, 2.0, 3.0, 4.0])
    assert fit_alpha(values, filter_zeros=1e-5).alpha == fit_alpha(values[2:]).alpha
    assert fit_alpha(values, filter_zeros=0.0).n_zeros == 0


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.zeros(60), "zero"),
        (np.ones(60), "equal"),
        (1 + 1e-7 * np.random.default_rng(0).standard_normal(60), "equal"),
        (np.array([1.0]), "equal"),
        (np.array([1.0, np.nan, 2.0]), "not finite"),
        (np.array([1.0, np.inf, 2.0]), "not finite"),
    ],
)
def test_spectra_without_a_tail_give_nan_and_a_reason(values, reason, backend):
    found = fit_alpha(values, backend=backend)
    assert math.isnan(found.alpha)
    assert math.isnan(found.xmin)
    assert reason in found.reason


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_fits_among_candidates_need_a_candidate(backend):
    for fit in ("ks", "peak"):
        found = fit_alpha(np.full(60, 2.0), fit, backend=backend)
        assert math.isnan(found.alpha)
        assert found.reason == "no eigenvalue qualifies as xmin"
    assert fit_alpha(np.arange(1.0, 10), "tail", k=10).reason == "too few eigenvalues"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), r"eigenvalues\[0\] is empty"),
        ((np.ones((3, 3, 3)),), r"shape \(n,\), got \(3, 3\)"),
        ((np.array([-1.0, 2.0]),), "must not be negative, got -1"),
        ((np.ones(5), "mean"), "fit must be one of median, ks, peak, tail; got 'mean'"),
    ],
)
def test_bad_input_names_rule_and_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit_alpha(*arguments)


@pytest.mark.parametrize(
    ("option", "value"),
    [("xmin_pos", 1.0), ("xmin_pos", math.nan), ("smooth", 0.5), ("k", 1), ("k", 2.5), ("bins", 0)],
)
def test_option_out_of_range_is_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"{option} must .* got {value}"):
        fit_alpha(np.ones(5), **{option: value})


def test_unknown_option_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown fit option 'xmin'; known are bins, k"):
        fit_alpha(np.ones(5), xmin=3)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-150, 150))
@pytest.mark.parametrize("fit", ["median", "ks", "tail"])
def test_alpha_does_not_change_when_the_spectrum_is_scaled(fit, seed, exponent):
    values = np.sort(np.random.default_rng(seed).lognormal(0, 1, 80))
    options = {"k": 30} if fit == "tail" else {}
    scaled = fit_alpha(values * 10.0**exponent, fit, **options)
    assert scaled.alpha == pytest.approx(fit_alpha(values, fit, **options).alpha, rel=1e-9)


def test_tensors_of_any_kind_are_spectra_and_complex_numbers_are_not():
    values = torch.rand(60, generator=torch.Generator().manual_seed(0))
    expected = fit_alpha(values.double().numpy())
    assert fit_alpha(values.clone().requires_grad_()) == expected
    rounded = values.bfloat16()
    assert fit_alpha(rounded) == fit_alpha(rounded.double())
    with pytest.raises(TypeError, match=r"eigenvalues\[0\] must be real, got complex"):
        fit_alpha(values.to(torch.complex64))
