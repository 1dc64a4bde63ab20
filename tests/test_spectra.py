"""Exact spectra against float64 numpy.linalg.svd on the same rounded weights."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tbfast import eigenvalues, fit_alpha
from tbfast.fitting import FIT_KINDS, FitOptions
from tbfast.matrices import find_layers
from tbfast.precision import zero_threshold
from tbfast.spectra import measure

# The bar for alpha of every fit, relative to float64 LAPACK.
ALPHA_BAR = 1e-4

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def with_decay(rows, cols, decades, generator):
    """Random singular vectors, singular values falling geometrically over so many decades."""
    k = min(rows, cols)
    u, _ = torch.linalg.qr(torch.randn(rows, k, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(cols, k, generator=generator, dtype=torch.float64))
    return (u * torch.logspace(0, -decades, k, dtype=torch.float64)) @ v.T


def case(name, seed=0):
    g = torch.Generator().manual_seed(seed)
    n = 96

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "gaussian": lambda: randn(n, n),
        "gaussian wide": lambda: randn(n, 4 * n),
        "gaussian tall": lambda: randn(3 * n, 2 * n),
        "large": lambda: randn(400, 300),
        "1 decade": lambda: with_decay(n, n, 1, g),
        "3 decades": lambda: with_decay(n, 2 * n, 3, g),
        "6 decades": lambda: with_decay(n, n, 6, g),
        "rank deficient": lambda: randn(n, n // 3) @ randn(n // 3, n),
        "duplicated": lambda: randn(n // 2, n).repeat(2, 1),
        "one row duplicated": lambda: (lambda w: torch.cat([w, w[:1]]))(randn(n - 1, n)),
        "spiked": lambda: randn(n, n) + 3 * randn(n, 1) @ randn(1, n),
        "1 x n": lambda: randn(1, n),
        "n x 1": lambda: randn(n, 1),
        "times 1e15": lambda: randn(n, n) * 1e15,
        "times 1e-15": lambda: randn(n, n) * 1e-15,
        "6 decades times 1e-15": lambda: with_decay(n, n, 6, g) * 1e-15,
    }[name]()


CASES = [
    "gaussian",
    "gaussian wide",
    "gaussian tall",
    "large",
    "1 decade",
    "3 decades",
    "6 decades",
    "rank deficient",
    "duplicated",
    "one row duplicated",
    "spiked",
    "1 x n",
    "n x 1",
    "times 1e15",
    "times 1e-15",
    "6 decades times 1e-15",
]


def lapack(weight):
    """Ascending eigenvalues of WᵀW by NumPy's float64 SVD."""
    wide = weight.to(torch.complex128 if weight.is_complex() else torch.float64).numpy()
    return np.linalg.svd(wide, compute_uv=False)[::-1] ** 2


def oracle_alpha(values, fit, k):
    """The definitions of the four fits, in plain NumPy."""
    values = values[values > len(values) * 2.2e-16 * values[-1]]
    logs, n = np.log(values), len(values)

    def alpha(i):
        excess = (logs[i:] - logs[i]).sum()
        return 1 + (n - i) / excess if excess > 0 else math.inf

    if fit == "median":
        return alpha(int(n / 2))
    if fit == "tail":
        return alpha(n - k) if k <= n else math.nan
    candidates = list(range(n - 1))
    if fit == "peak" and n > 1:
        log10 = np.log10(values)
        counts, edges = np.histogram(log10, 100, (log10[0], log10[-1]))
        peak = 10 ** edges[np.argmax(counts)]
        candidates = [i for i in candidates if 0.95 * peak <= values[i] <= 1.5 * peak]
    distances = []
    for i in candidates:
        a = alpha(i)
        model = 1 - np.exp((1 - a) * (logs[i:] - logs[i]))
        distances.append(np.abs(model - np.arange(n - i) / (n - i)).max())
    return alpha(candidates[int(np.argmin(distances))]) if candidates else math.nan


def representable(weight, dtype):
    rounded = weight.to(dtype)
    return bool(torch.isfinite(rounded).all()) and float(rounded.abs().max()) > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_alpha_of_every_fit_is_that_of_float64_lapack(name, dtype):
    weight = case(name)
    if not representable(weight, dtype):
        pytest.skip(f"{name} overflows or vanishes in {dtype}")
    weight = weight.to(dtype)
    values = eigenvalues(weight)
    expected = lapack(weight)
    for fit in FIT_KINDS:
        found = fit_alpha(values, fit, k=24).alpha
        oracle = oracle_alpha(expected, fit, 24)
        if math.isfinite(oracle):
            assert found == pytest.approx(oracle, rel=ALPHA_BAR), fit
        else:
            assert math.isnan(found), fit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", [c for c in CASES if "x" not in c])
def test_measured_alpha_follows_the_rank_of_the_rounded_weights(name, dtype):
    # measure() may use float32 where the fit allows; zeros are what rounding could have made.
    weight = case(name)
    if not representable(weight, dtype):
        pytest.skip(f"{name} overflows or vanishes in {dtype}")
    weight = weight.to(dtype)
    values = lapack(weight)
    kept = values[values > zero_threshold(weight[None], float(values.sum()))]
    for fit in ("median", "tail"):
        [found] = measure([weight], ["linear"], FitOptions(fit, k=24))
        assert found.fit.n_zeros == len(values) - len(kept)
        assert found.fit.alpha == pytest.approx(oracle_alpha(kept, fit, 24), rel=ALPHA_BAR)


def test_zeros_are_counted_by_rank_and_not_by_conditioning():
    def zeros(weight):
        return measure([weight], ["linear"], FitOptions())[0].fit.n_zeros

    assert zeros(case("gaussian").float()) == 0
    assert zeros(case("6 decades").float()) == 0
    assert zeros(case("rank deficient").float()) == 64
    assert zeros(case("duplicated").float()) == 48
    assert zeros(case("one row duplicated").float()) == 1
    # A product of float32 factors carries the rounding of 32 sums, and no more.
    g = torch.Generator().manual_seed(3)
    product = torch.randn(96, 32, generator=g) @ torch.randn(32, 96, generator=g)
    assert zeros(product) == 64


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_matrices_have_the_squared_singular_values(dtype):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 24, generator=g, dtype=torch.complex128).to(dtype)
    np.testing.assert_allclose(eigenvalues(weight).numpy(), lapack(weight), rtol=1e-6)


def test_ragged_list_of_strided_parameters_and_arrays():
    g = torch.Generator().manual_seed(0)
    base = torch.randn(60, 80, generator=g)
    views = [base.T, base[::2, 1::3], base[:, :1], torch.nn.Parameter(base), base[5:20].numpy()]
    for view, found in zip(views, eigenvalues(views), strict=True):
        wide = torch.as_tensor(view).detach().double().numpy()
        expected = np.linalg.svd(wide, compute_uv=False)[::-1] ** 2
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_module_weights_are_measured_without_touching_them():
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Conv2d(8, 64, 3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    layers = find_layers(model)
    weights = [model.get_parameter(layer.name) for layer in layers]
    linear, conv = measure(weights, [layer.kind for layer in layers], FitOptions())
    assert (linear.n_eigs, conv.n_eigs) == (64, 72)
    slices = (weights[1].detach().double() * math.sqrt(0.5)).flatten(2).permute(2, 0, 1).numpy()
    pooled = np.sort((np.linalg.svd(slices, compute_uv=False) ** 2).ravel())
    assert conv.fit.alpha == pytest.approx(oracle_alpha(pooled, "median", 0), rel=ALPHA_BAR)
    assert conv.max_eigenvalue == pytest.approx(pooled[-1], rel=1e-6)
    assert conv.sum_eigenvalues == pytest.approx(pooled.sum(), rel=1e-6)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bad_entry_gives_nan_and_a_reason_to_that_layer_only(bad, dtype):
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(60, 60, generator=g).to(dtype) for _ in range(3)]
    weights[1][7, 3] = bad
    found = measure(weights, ["linear"] * 3, FitOptions())
    assert math.isnan(found[1].fit.alpha)
    assert found[1].fit.reason == "weights or eigenvalues are not finite"
    assert all(math.isfinite(found[i].fit.alpha) for i in (0, 2))
    assert eigenvalues(weights[1]).isnan().all()


def test_zero_and_orthogonal_matrices_have_no_alpha_but_a_reason():
    orthogonal, _ = torch.linalg.qr(torch.randn(80, 80, generator=torch.Generator().manual_seed(0)))
    zero, equal = measure([torch.zeros(60, 60), orthogonal], ["linear"] * 2, FitOptions())
    assert zero.fit.reason == "all eigenvalues are zero"
    assert equal.fit.reason == "all eigenvalues of the tail are equal"
    assert eigenvalues(torch.zeros(4, 6)).tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (torch.ones(3), ValueError, r"matrix 0 must have shape \(rows, cols\).* got \(3,\)"),
        (torch.ones(2, 3, 4), ValueError, r"got \(2, 3, 4\)"),
        (torch.ones(0, 4), ValueError, r"both above 0; got \(0, 4\)"),
        (
            torch.ones(3, 3, dtype=torch.int8),
            TypeError,
            "floating point or complex, got torch.int8",
        ),
    ],
)
def test_matrices_of_the_wrong_shape_or_type_are_refused(matrix, error, message):
    with pytest.raises(error, match=message):
        eigenvalues(matrix)
    with pytest.raises(error, match="matrix 1"):
        eigenvalues([torch.ones(2, 2), matrix])


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method must be one of auto, exact, sketch; got 'svd'"):
        measure([torch.ones(3, 3)], ["linear"], FitOptions(), method="svd")


def test_an_empty_list_has_no_spectra():
    assert eigenvalues([]) == []
    assert measure([], [], FitOptions()) == []


def orthogonal(n, g):
    return torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(8, 40), cols=st.integers(8, 40))
def test_alpha_is_invariant_under_scaling_rotation_and_transposition(seed, rows, cols):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=g, dtype=torch.float64)
    rotated = orthogonal(rows, g) @ weight @ orthogonal(cols, g)
    same = [weight, weight * 3e7, rotated, weight.T]
    alphas = [m.fit.alpha for m in measure(same, ["linear"] * 4, FitOptions())]
    backwards = [m.fit.alpha for m in measure(same[::-1], ["linear"] * 4, FitOptions())]
    # Rounding of the rotation in float64, amplified by the smallest spacing of the spectrum.
    assert alphas == pytest.approx([alphas[0]] * 4, rel=1e-8)
    assert alphas == backwards[::-1]


def test_arrays_of_any_stride_and_byte_order_are_matrices():
    array = np.random.default_rng(0).standard_normal((20, 30))
    frozen = array.copy()
    frozen.flags.writeable = False
    expected = eigenvalues(array)
    for same in (
        array[::-1],
        array[:, ::-1],
        array.astype(">f8"),
        frozen,
        np.asfortranarray(array),
    ):
        torch.testing.assert_close(eigenvalues(same), expected, rtol=1e-10, atol=0)


def test_tensors_without_dense_values_are_refused():
    with pytest.raises(TypeError, match=r"matrix 0 must be dense .* layout torch\.sparse_coo"):
        eigenvalues(torch.eye(4).to_sparse())
    with pytest.raises(TypeError, match="on the meta device"):
        eigenvalues(torch.ones(3, 3, device="meta"))
    with pytest.raises(TypeError, match="matrix 0 must be a tensor or an array, got str"):
        eigenvalues(["no matrix"])
