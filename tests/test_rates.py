"""Learning-rate factors against the published formulas, written out in NumPy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tbfast.rates import MAPPINGS, check_mapping, lr_factors, quantise

ALPHA = [2.4, 1.9, 3.3, 2.4001, 5.0, 2.0]

# Tolerance of the comparisons with NumPy: float64 through exp and log.
EXACT = {"rtol": 1e-12, "atol": 0}


def published(alpha, mapping, low, high, exp_temp=10.0):
    """The maps of the papers' code (base learning rate 1)."""
    alpha = np.asarray(alpha, dtype=np.float64)
    n = len(alpha)
    if mapping == "linear":
        return np.interp(alpha, [alpha.min(), alpha.max()], [low, high])
    if mapping == "sqrt":
        return n * np.sqrt(alpha) / np.sqrt(alpha).sum()
    if mapping == "log2":
        return n * np.log2(alpha) / np.log2(alpha).sum()
    if mapping == "step":
        factors = np.empty(n)
        for rank, index in enumerate(np.argsort(alpha)):
            factors[index] = low + (high - low) * rank / n
        return factors
    s_min, s_max = -2 * math.log10(low), 2 * math.log10(high)
    gap = alpha - alpha.mean()
    centred = 1 / (1 + np.exp(-exp_temp * gap)) - 0.5
    return 10 ** np.where(gap > 0, s_max * centred, s_min * centred)


@pytest.mark.parametrize("mapping", ["linear", "sqrt", "log2", "step", "sigmoid"])
@pytest.mark.parametrize(("low", "high"), [(0.5, 1.5), (10**-0.5, 10**0.5), (1.0, 5.0)])
def test_each_mapping_is_the_published_one(mapping, low, high):
    found = lr_factors(ALPHA, mapping, low=low, high=high)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, published(ALPHA, mapping, low, high), **EXACT)


def test_model_balancing_sigmoid_has_its_range_and_slope():
    # Published s = 1 on both sides: factors from 10**-0.5 to 10**0.5.
    found = lr_factors([1.0, 9.0], "sigmoid", low=10**-0.5, high=10**0.5)
    # sigmoid(10 * 4) is 1 - 4e-18: the ends to the last bit or two
    np.testing.assert_allclose(found, [10**-0.5, 10**0.5], **EXACT)
    soft = lr_factors(ALPHA, "sigmoid", exp_temp=0.5)
    np.testing.assert_allclose(soft, published(ALPHA, "sigmoid", 0.5, 1.5, 0.5), **EXACT)


def test_reverse_is_linear_with_its_ends_swapped():
    found = lr_factors(ALPHA, "reverse", low=0.5, high=1.5)
    np.testing.assert_allclose(found, 2 - published(ALPHA, "linear", 0.5, 1.5), **EXACT)


@pytest.mark.parametrize(
    ("mapping", "middle"),
    [("linear", 2.0), ("reverse", 2.0), ("step", 2.0), ("sqrt", 1.0), ("log2", 1.0)],
)
@pytest.mark.parametrize("alpha", [[3.0], [2.7, 2.7, 2.7], [math.nan, 2.7, 2.7, math.inf]])
def test_equal_alphas_get_the_middle_of_the_range(mapping, middle, alpha):
    found = lr_factors(alpha, mapping, low=1.0, high=3.0).tolist()
    assert found == [middle if math.isfinite(a) else 1.0 for a in alpha]


def test_equal_alphas_get_one_from_the_sigmoid():
    assert lr_factors([2.7, 2.7], "sigmoid", low=0.2, high=7.0).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("mapping", ["linear", "sqrt", "log2", "step", "sigmoid", "reverse"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_alpha_gets_one_and_the_others_do_not_see_it(mapping, bad):
    with_bad = lr_factors([bad, *ALPHA[:3], bad, *ALPHA[3:]], mapping)
    assert with_bad[0] == with_bad[4] == 1.0
    kept = torch.cat([with_bad[1:4], with_bad[5:]])
    assert torch.equal(kept, lr_factors(ALPHA, mapping))


def test_all_alphas_non_finite_give_ones():
    assert lr_factors([math.nan, math.inf]).tolist() == [1.0, 1.0]


def test_clip_limits_an_outlier_to_the_quantiles():
    alpha = [2.0, 2.1, 2.2, 2.3, 50.0]
    clipped = np.clip(alpha, *np.quantile(alpha, [0.25, 0.75]))
    found = lr_factors(alpha, clip=0.25)
    np.testing.assert_allclose(found, published(clipped, "linear", 0.5, 1.5), **EXACT)
    assert lr_factors(alpha)[3] < 0.51 < found[3]


def test_fixed_takes_the_first_glob_that_matches_and_needs_no_alpha():
    names = ["a.q.weight", "a.k.weight", "b.weight"]
    factors = {"*.q.*": 0.25, "a.*": 2.0}
    assert lr_factors(None, "fixed", names=names, factors=factors).tolist() == [0.25, 2.0, 1.0]


def test_result_has_the_dtype_of_a_tensor_and_the_input_is_untouched():
    alpha = torch.tensor(ALPHA, dtype=torch.float32)
    before = alpha.clone()
    assert lr_factors(alpha, clip=0.1).dtype == torch.float32
    assert torch.equal(alpha, before)
    assert lr_factors(torch.tensor([2, 3])).dtype == torch.float64
    assert lr_factors(np.float32(ALPHA)).dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (([[2.0]],), {}, ValueError, r"shape \(layers,\), got \(1, 1\)"),
        (([],), {}, ValueError, r"got \(0,\)"),
        ((ALPHA, "cubic"), {}, ValueError, "mapping must be one of .*'cubic'"),
        ((ALPHA,), {"low": 0.0}, ValueError, "0 < low <= high, got low=0.0"),
        ((ALPHA,), {"low": 2.0}, ValueError, "0 < low <= high"),
        ((ALPHA,), {"high": math.nan}, ValueError, "0 < low <= high"),
        ((ALPHA, "sigmoid"), {"low": 1.2}, ValueError, "low <= 1 <= high"),
        ((ALPHA,), {"clip": 0.5}, ValueError, r"clip .* \[0, 0.5\), got 0.5"),
        ((ALPHA,), {"clap": 0.1}, TypeError, "no option 'clap'; known are clip"),
        ((ALPHA,), {"exp_temp": 1.0}, TypeError, "no option 'exp_temp'"),
        ((ALPHA, "sigmoid"), {"exp_temp": 0.0}, ValueError, "exp_temp must be above 0"),
        (([0.9, 2.0], "log2"), {}, ValueError, "'log2' needs every alpha above 1, got 0.9"),
        (([0.0, 2.0], "sqrt"), {}, ValueError, "'sqrt' needs every alpha above 0, got 0"),
        ((None, "fixed"), {"factors": {}}, ValueError, "needs the option 'names'"),
        ((None, "fixed"), {"factors": {"*": -1}, "names": ["a"]}, ValueError, r"factors\['\*'\]"),
    ],
)
def test_what_cannot_be_mapped_is_refused_by_name(arguments, options, error, words):
    with pytest.raises(error, match=words):
        lr_factors(*arguments, **options)


def test_rounding_to_classes_takes_the_nearest_by_ratio():
    factors = torch.tensor([0.5, 0.70, 0.72, 1.22, 1.23, 1.5], dtype=torch.float64)
    # Classes 0.5, 1, 1.5; neighbours part at their geometric means, 0.707 and 1.2247.
    found = quantise(factors, 3, "linear", 0.5, 1.5)
    assert found.tolist() == [0.5, 0.5, 1.0, 1.0, 1.5, 1.5]
    ratios = quantise(torch.tensor([0.3, 1.1, 2.9]), 3, "sigmoid", 0.1, 10.0)
    np.testing.assert_allclose(ratios, [0.1, 1.0, 1.0], **EXACT)
    shares = quantise(torch.tensor([0.8, 0.9, 1.3]), 2, "sqrt", 0.5, 1.5)
    np.testing.assert_allclose(shares, [0.8, 0.8, 1.3], rtol=1e-7)  # float32 input


finite = st.floats(1.0001, 1e4)
alphas = st.lists(finite | st.just(math.nan), min_size=1, max_size=12)
ranges = st.tuples(st.floats(1e-3, 1.0), st.floats(1.0, 1e3))


@settings(max_examples=150, deadline=None)
@given(alphas, ranges, st.sampled_from([m for m in MAPPINGS if m != "fixed"]), st.booleans())
def test_factors_are_finite_positive_and_within_the_range(alpha, ends, mapping, clip):
    low, high = ends
    options = {"clip": 0.1} if clip else {}
    found = lr_factors(alpha, mapping, low=low, high=high, **options).numpy()
    assert np.isfinite(found).all()
    assert (found > 0).all()
    if mapping not in ("sqrt", "log2"):
        # 1e-12: log10 and its power, where the sigmoid saturates
        assert (found >= low * (1 - 1e-12)).all()
        assert (found <= high * (1 + 1e-12)).all()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(finite, min_size=1, max_size=12, unique=True),
    st.sampled_from(["linear", "sqrt", "log2", "step", "sigmoid", "reverse"]),
    st.randoms(use_true_random=False),
)
def test_permuting_layers_permutes_factors(alpha, mapping, random):
    order = list(range(len(alpha)))
    random.shuffle(order)
    found = lr_factors([alpha[i] for i in order], mapping)
    # The mean of the alphas (sigmoid, sqrt, log2) sums in another order; the sigmoid's slope of 10
    # magnifies its rounding, 1e-12 of an alpha of 1e4.
    np.testing.assert_allclose(found, lr_factors(alpha, mapping)[order], rtol=1e-9)


def test_check_mapping_accepts_what_lr_factors_accepts():
    check_mapping("linear", 0.5, 1.5, {"clip": 0.2})
