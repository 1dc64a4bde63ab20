"""The parts of the exact engine: the eigensolver, the certificate of full rank, the routes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tbfast import _native, fit_alpha
from tbfast.backends import exact
from tbfast.backends.rank import least_singular_value_exceeds
from tbfast.fitting import FitOptions
from tbfast.precision import zero_threshold
from tbfast.spectra import measure

ALPHA_BAR = 1e-4  # that of test_spectra.py, relative to float64 LAPACK


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def with_least_singular_value(matrix, least):
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s[-1] = least
    return (u * s) @ v


def singular_values(weight):
    wide = weight.to(torch.complex128 if weight.is_complex() else torch.float64)
    return np.linalg.svd(wide.numpy(), compute_uv=False)


def threshold(weight):
    """The singular value under which rounding could have made it."""
    return math.sqrt(zero_threshold(weight[None], float((singular_values(weight) ** 2).sum())))


# The eigensolver


def tridiagonal(diagonal, off_diagonal):
    return np.diag(diagonal) + np.diag(off_diagonal, 1) + np.diag(off_diagonal, -1)


def glued(copies):
    """Wilkinson's W21+, which has pairs equal to 14 digits, joined by tiny links."""
    links = np.ones(21 * copies - 1)
    links[20::21] = 1e-9
    return tridiagonal(np.tile(np.abs(np.arange(21) - 10.0), copies), links)


def spectrum(name, n=500):
    graded = 10.0 ** -np.linspace(0, 12, n)
    return {
        "glued Wilkinson": lambda: glued(24),
        "graded down": lambda: tridiagonal(graded, 0.3 * graded[:-1]),
        "graded up": lambda: tridiagonal(graded[::-1], 0.3 * graded[:0:-1]),
        "zero diagonal": lambda: tridiagonal(np.zeros(n), np.ones(n - 1)),
        "falls apart": lambda: tridiagonal(np.arange(n) % 3.0, np.arange(n - 1) % 5 == 0),
        "clusters": lambda: np.diag(np.repeat([1.0, 1 + 1e-12, 2.0, 0.0], n // 4)),
        "rank 10": lambda: (lambda w: w @ w.T)(randn(n, 10).numpy()),
        "zero": lambda: np.zeros((n, n)),
    }[name]()


@pytest.mark.parametrize(
    "name",
    [
        "glued Wilkinson",
        "graded down",
        "graded up",
        "zero diagonal",
        "falls apart",
        "clusters",
        "rank 10",
        "zero",
    ],
)
def test_four_sweeps_at_a_time_find_the_eigenvalues_of_lapack(name):
    matrix = spectrum(name)
    [found] = _native.symmetric_eigenvalues(matrix[None])
    # Both are backward stable; the worst seen is 31 eps of the norm.
    atol = 100 * np.finfo(float).eps * np.abs(matrix).sum(1).max()
    np.testing.assert_allclose(found, np.linalg.eigvalsh(matrix), rtol=0, atol=atol)


@pytest.mark.parametrize("n", [11, 12, 13, 14, 100, 777])
def test_the_second_difference_has_its_closed_form_spectrum(n):
    # Around 13 rows single sweeps take over from four at a time.
    matrix = tridiagonal(np.full(n, 2.0), np.full(n - 1, -1.0))
    [found] = _native.symmetric_eigenvalues(matrix[None])
    expected = 2 - 2 * np.cos(np.arange(1, n + 1) * np.pi / (n + 1))
    np.testing.assert_allclose(found, expected, rtol=0, atol=4 * 50 * np.finfo(float).eps)


# The certificate


def deficient(name, n, seed):
    """Float32 weights with a singular value that rounding alone could have made."""
    w = randn(n, n, seed=seed)
    if name == "duplicated row":
        w[n // 2] = w[n // 3]
    elif name == "zero column":
        w[:, n // 2] = 0
    elif name == "row that depends on others":
        w[n - 1] = w[: n // 2].mean(0)
    elif name == "rows of zero mean":
        w -= w.mean(1, keepdim=True)
    elif name == "product of float32 factors":
        return w[:, 1:].float() @ randn(n - 1, n, seed=seed + 1).float()
    elif name == "half the threshold":
        w = with_least_singular_value(w, 0.5 * threshold(w.float()))
    return w.float()


DEFICIENT = [
    "duplicated row",
    "zero column",
    "row that depends on others",
    "rows of zero mean",
    "product of float32 factors",
    "half the threshold",
]


@pytest.mark.parametrize("n", [40, 256, 400])
@pytest.mark.parametrize("name", DEFICIENT)
def test_a_matrix_without_full_rank_is_never_certified(name, n):
    for seed in range(3):
        weight = deficient(name, n, seed)
        assert not least_singular_value_exceeds(weight, threshold(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("n", [1, 2, 40, 256, 400])
def test_a_random_square_matrix_is_certified(n, dtype):
    # Least singular values of 0.1 / sqrt(n) and below come once in ten; none of these seeds is.
    for seed in range(3):
        weight = randn(n, n, seed=seed).to(dtype)
        if dtype.is_complex:
            weight = weight + 1j * randn(n, n, seed=seed + 10).to(dtype)
        assert least_singular_value_exceeds(weight, 2 * threshold(weight))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 60), seed=st.integers(0, 10**6), decades=st.floats(-2, 4))
def test_the_certificate_tells_all_but_a_narrow_range_and_never_wrongly(n, seed, decades):
    weight = randn(n, n, seed=seed)
    zero = threshold(weight.float())
    weight = with_least_singular_value(weight, min(1.0, 10**decades) * zero * 10 ** max(decades, 0))
    weight = weight.float()
    least = singular_values(weight)[-1] / zero
    certified = least_singular_value_exceeds(weight, zero)
    assert not (certified and least <= 1)
    # |X| / |uᵀB| makes it 6 thresholds at the least, chance up to twice as much.
    if least > 20:
        assert certified


def test_a_matrix_that_is_not_finite_is_not_certified():
    weight = randn(8, 8).float()
    weight[3, 3] = math.nan
    assert not least_singular_value_exceeds(weight, 1e-9)


# The routes


def alpha_of_lapack(weight):
    values = singular_values(weight)[::-1] ** 2
    return fit_alpha(values[values > zero_threshold(weight[None], float(values.sum()))]).alpha


def forbid(monkeypatch, *names):
    def refuse(_):
        raise AssertionError("not this way")

    for name in names:
        monkeypatch.setattr(exact, name, refuse)


def slender_with_a_small_singular_value():
    # lambda_min is 2e-7 lambda_max: in the noise of float32, but sigma is 500 times that of a zero.
    # The first 300 rows alone, which the certificate looks at, are not badly conditioned by chance.
    weight = randn(700, 300, seed=2)
    return with_least_singular_value(weight, 5e-4 * singular_values(weight)[0])


LIGHT = {
    "square": lambda: randn(300, 300).float(),
    "nearly square and wide": lambda: randn(300, 330).float(),
    "slender": lambda: randn(300, 700).float(),
    "slender, one small": lambda: slender_with_a_small_singular_value().float(),
    "bfloat16": lambda: randn(300, 300).bfloat16(),
    "complex": lambda: torch.complex(randn(300, 300), randn(300, 300, seed=1)).to(torch.complex64),
    "transposed": lambda: randn(300, 300).float().T,
    "times 1e30": lambda: (randn(300, 300) * 1e30).float(),
    "times 1e-30": lambda: (randn(300, 300) * 1e-30).float(),
    "shifted": lambda: (randn(300, 300) + 0.2).float(),
}


@pytest.mark.parametrize("name", LIGHT)
def test_float32_is_enough_for_the_median_fit_of_full_rank_weights(name, monkeypatch):
    weight = LIGHT[name]()
    forbid(monkeypatch, "_float64_values", "_singular_values")
    [found] = measure([weight], ["linear"], FitOptions())
    assert found.fit.n_zeros == 0
    assert found.fit.alpha == pytest.approx(alpha_of_lapack(weight), rel=ALPHA_BAR)


@pytest.mark.parametrize("name", DEFICIENT)
@pytest.mark.parametrize("rows", [300, 600])
def test_zeros_of_large_weights_are_found_whichever_way_is_tried_first(name, rows):
    weight = deficient(name, 300, 5)
    weight = torch.cat([weight, weight.flip(0)])[:rows]
    values = singular_values(weight) ** 2
    expected = int((values <= zero_threshold(weight[None], float(values.sum()))).sum())
    [found] = measure([weight], ["linear"], FitOptions())
    assert found.fit.n_zeros == expected == 1
    assert found.fit.alpha == pytest.approx(alpha_of_lapack(weight), rel=ALPHA_BAR)


def test_a_fit_that_chooses_xmin_gets_every_eigenvalue_from_float64(monkeypatch):
    forbid(monkeypatch, "_float32_values")
    measure([randn(300, 300).float()], ["linear"], FitOptions("ks"))
    measure([randn(300, 300)], ["linear"], FitOptions())  # float64 weights


def test_eigenvalues_that_float32_cannot_tell_are_above_the_zeros():
    weight = randn(512, 512).float()
    [values] = exact.eigenvalues([weight[None]], [0.5])
    assert float(values[0]) > zero_threshold(weight[None], float(values.sum()))
    expected = singular_values(weight)[::-1] ** 2
    # precision.AVERAGED_TOLERANCE for the half that was asked for
    np.testing.assert_allclose(values.numpy()[256:], expected[256:], rtol=5e-5)
    # and the noise of float32 for the others: ten times precision.GRAM_ERROR
    noise = 5 * np.finfo(np.float32).eps * expected[-1]
    np.testing.assert_allclose(values.numpy(), expected, rtol=5e-5, atol=noise)


@pytest.mark.parametrize("shape", [(60, 40), (300, 257), (257, 300)], ids=str)
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_where_a_weight_lies_in_memory_does_not_change_a_bit(shape, share):
    # Weights that need no conversion are read in place, at any address and with any row stride.
    weight = randn(*shape).float()
    [expected] = exact.eigenvalues([weight[None]], [share])
    for offset, padding in [(1, 0), (3, 1), (8, 16), (13, 5)]:
        memory = torch.zeros(offset + shape[0] * (shape[1] + padding))
        view = memory[offset:].view(shape[0], -1)[:, : shape[1]]
        view.copy_(weight)
        [found] = exact.eigenvalues([view[None]], [share])
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(15, 15), (40, 33), (100, 63)], ids=str)
def test_the_place_in_a_batch_does_not_change_a_bit(shape, dtype):
    weights = [torch.randn(1, *shape, generator=generator(i)).to(dtype) for i in range(7)]
    weights[2][0, :, 1] = weights[2][0, :, 0]  # rank-deficient: goes the way of singular values
    weights[5].zero_()[0, 0, 0] = 1
    together, backwards = exact.eigenvalues(weights), exact.eigenvalues(weights[::-1])[::-1]
    for weight, one, other in zip(weights, together, backwards, strict=True):
        (alone,) = exact.eigenvalues([weight])
        assert torch.equal(one, other)
        assert torch.equal(one, alone)


@pytest.mark.parametrize("seed", [681, 989, 1185, 1918, 2342])
def test_nearly_decoupled_tridiagonal_matrices_converge(seed):
    # In these a sweep leaves an exact zero for the next one beside it: once 0 / 0.
    rng = np.random.default_rng(seed)
    diagonal = rng.integers(0, 4, 60).astype(float) if seed % 2 else rng.standard_normal(60)
    off = 10.0 ** -rng.uniform(0, 8, 59)
    matrix = np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1)
    [found] = _native.symmetric_eigenvalues(matrix[None])
    # eps of float64 times the norm, 5, times a factor that grows with n
    np.testing.assert_allclose(found, np.linalg.eigvalsh(matrix), rtol=0, atol=1e-14)
