"""Randomized singular value decompositions against LAPACK, and the random bits they start from."""

import math

import numpy as np
import pytest
import torch

import tbfast
from tbfast import _native, rsvd
from tbfast.backends.philox import Purpose, philox, signs
from tbfast.batch import Batch

DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
]
DOUBLE = (torch.float64, torch.complex128)

# |QᴴQ - I| of U and V, entry by entry: rounding of factors that CholeskyQR2 made orthonormal to a
# few eps, and sums over up to 3072 products of them. The worst seen are 5e-7 and 5e-15.
ORTHONORMAL = {False: 2e-6, True: 2e-14}
# Error of a singular value that the sketch holds wholly, relative to the largest: a few roundings
# in the working precision. The worst seen are 1.3e-7 and 4e-15.
CAPTURED = {False: 1e-6, True: 2e-14}
# Rounding of U, S and Vh themselves leaves this of |A|_F, or less, even of a matrix of low rank.
ROUNDING = {False: 2e-6, True: 2e-14}
# What the issue asks for.
NEARLY_OPTIMAL = 1.02
RIGHT_ERROR = 0.1


def wide(tensor):
    """The same values as a float64 or complex128 array."""
    tensor = tensor.resolve_conj().resolve_neg()
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64).numpy()


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    double = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=generator, dtype=double).to(dtype)


def with_spectrum(values, rows, cols, dtype=torch.float32, seed=0):
    """A matrix with the given singular values and random vectors."""
    double = torch.complex128 if dtype.is_complex else torch.float64
    left = torch.linalg.qr(randn(rows, len(values), dtype=double, seed=seed)).Q
    right = torch.linalg.qr(randn(cols, len(values), dtype=double, seed=seed + 1)).Q
    return ((left * torch.as_tensor(values, dtype=torch.float64)) @ right.mH).to(dtype)


def residual(matrix, found):
    a = wide(matrix)
    left = a - (wide(found.U) * found.S.double().numpy()) @ wide(found.Vh)
    return np.linalg.norm(left) / (np.linalg.norm(a) or 1.0)


def check(matrix, rank, found):
    """Whatever holds for every decomposition; returns the ratio to the best residual."""
    double = matrix.dtype in DOUBLE
    rows, cols = matrix.shape
    assert found.U.shape == (rows, rank)
    assert found.S.shape == (rank,)
    assert found.Vh.shape == (rank, cols)
    for basis in (wide(found.U), wide(found.Vh).conj().T):
        np.testing.assert_allclose(
            basis.conj().T @ basis, np.eye(rank), rtol=0, atol=ORTHONORMAL[double]
        )
    sigma = np.linalg.svd(wide(matrix), compute_uv=False)
    slack = CAPTURED[double] * sigma[0]
    values = found.S.double().numpy()
    assert np.all(np.diff(values) <= 0)
    assert np.all(values >= 0)
    assert np.all(values <= sigma[:rank] + slack)  # Cauchy's interlacing
    true = residual(matrix, found)
    if true > ROUNDING[True]:  # below it the oracle rounds as much itself
        assert found.error == pytest.approx(true, rel=RIGHT_ERROR)
    else:
        assert found.error <= ROUNDING[True]
    best = np.linalg.norm(sigma[rank:]) / (np.linalg.norm(sigma) or 1.0)
    if best <= ROUNDING[double]:
        assert true <= 2 * best + ROUNDING[double]
        np.testing.assert_allclose(values, sigma[:rank], rtol=0, atol=slack)
        return 1.0
    return true / best


KNOWN_ANSWERS = [  # the test vectors of Random123, philox 4x32 with 10 rounds
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words_in_python_and_in_cpp(counter, key, words):
    expected = [int(word, 16) for word in words.split()]
    assert philox(counter, key).tolist() == expected
    assert _native.philox(counter, key) == expected


def test_signs_are_the_bits_of_the_documented_counters():
    seed, name, draw, first = (7 << 32) + 5, 0xDEADBEEF, 3, (1 << 33) + 1
    found = signs(seed, name, Purpose.SKETCH, draw, first, 4, 300)
    assert found.shape == (4, 300)
    for row, column in [(0, 0), (1, 31), (2, 32), (3, 127), (0, 128), (3, 299)]:
        element, block = first + row, column // 128
        what = Purpose.SKETCH << 30 | block << 24 | draw
        words = _native.philox((element % 2**32, element >> 32, what, seed >> 32), (5, name))
        bit = words[column % 128 // 32] >> column % 32 & 1
        assert found[row, column] == 1 - 2 * bit


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factors_are_those_of_lapack_whatever_the_shape(dtype, isa, monkeypatch):
    monkeypatch.setenv("TBFAST_ISA", isa)
    shapes = [(1, 1), (1, 9), (9, 1), (2, 2), (3, 2), (17, 5), (33, 50), (129, 121), (260, 40)]
    for rows, cols in shapes:
        matrix = randn(rows, cols, dtype=dtype, seed=rows)
        copy = matrix.clone()
        for rank in {1, min(3, rows, cols), min(rows, cols)}:
            found = rsvd(matrix, rank)
            assert torch.equal(matrix, copy)
            # Small and flat spectra, the worst case: 16 columns are few to choose from.
            assert check(matrix, rank, found) < 1.03, (rows, cols, rank)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factors_have_the_precision_of_the_matrix(dtype):
    found = rsvd(randn(12, 10, dtype=dtype), 3)
    factors = {torch.float16: torch.float32, torch.bfloat16: torch.float32}.get(dtype, dtype)
    assert found.U.dtype == found.Vh.dtype == factors
    assert found.S.dtype == factors.to_real()
    assert isinstance(found.error, float)


SPECTRA = {
    "gaussian": None,
    "power law, 1/4": np.arange(1, 201.0) ** -0.25,
    "power law, 1/2": np.arange(1, 201.0) ** -0.5,
    "power law, 1": 1 / np.arange(1, 201.0),
    "exponential": np.exp(-np.arange(200) / 16),
    "slow exponential": np.exp(-np.arange(200) / 64),
    "step": np.where(np.arange(200) < 16, 1, 0.3),
    "outlier": np.where(np.arange(200) < 1, 100, 1.0),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_residual_is_nearly_optimal_with_the_defaults(name):
    values = SPECTRA[name]
    for seed in range(3):
        matrix = (
            randn(200, 800, seed=seed)
            if values is None
            else with_spectrum(values, 200, 300, seed=2 * seed)
        )
        assert check(matrix, 32, rsvd(matrix, 32, seed=seed)) < NEARLY_OPTIMAL


def test_power_iterations_and_oversampling_make_the_residual_smaller():
    matrix = with_spectrum(np.arange(1, 301.0) ** -0.5, 300, 400)
    by_power = [rsvd(matrix, 16, power_iters=n).error for n in (0, 1, 2, 3)]
    by_columns = [rsvd(matrix, 16, oversample=n).error for n in (0, 16, 64, 284)]
    assert all(np.diff(by_power) < 0)
    assert all(np.diff(by_columns) < 0)
    best = np.linalg.norm(np.linalg.svd(wide(matrix), compute_uv=False)[16:])
    # 284 more columns are all that the matrix has: the result is exact but for rounding.
    assert by_columns[-1] == pytest.approx(best / np.linalg.norm(wide(matrix)), rel=1e-5)


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matrices_of_low_rank_are_found_exactly_with_orthonormal_factors(dtype, isa, monkeypatch):
    monkeypatch.setenv("TBFAST_ISA", isa)
    unit = torch.zeros(40, 60, dtype=dtype)
    unit[3, 5] = 2
    few_rows = torch.zeros(64, 50, dtype=dtype)
    few_rows[7:11] = randn(4, 50, dtype=dtype)
    cases = [
        torch.zeros(20, 30, dtype=dtype),
        torch.ones(30, 20, dtype=dtype),
        torch.outer(torch.arange(1, 31), torch.arange(1, 41)).to(dtype),
        torch.eye(25, dtype=dtype)[:20],
        torch.eye(40, dtype=dtype) * (torch.arange(40) < 5),
        unit,
        few_rows,
        few_rows.mT,
        with_spectrum([3.0] * 6, 70, 50, dtype),
    ]
    for power_iters in (0, 1, 2):
        for matrix in cases:
            check(matrix, 12, rsvd(matrix, 12, power_iters=power_iters))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128], ids=str)
def test_spectra_over_many_decades_keep_small_singular_values(dtype):
    matrix = with_spectrum(np.logspace(0, -18, 60), 60, 90, dtype)
    for power_iters in (0, 1, 2):
        found = rsvd(matrix, 30, power_iters=power_iters)
        check(matrix, 30, found)
        true = np.linalg.svd(wide(matrix), compute_uv=False)[:30]
        np.testing.assert_allclose(found.S, true, rtol=0, atol=CAPTURED[dtype in DOUBLE])


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e30),
        (torch.float32, 1e-30),
        (torch.bfloat16, 1e30),
        (torch.complex64, 1e-30),
        (torch.float64, 1e200),
        (torch.complex128, 1e-200),
    ],
    ids=str,
)
def test_huge_and_tiny_entries_change_nothing_but_the_scale(dtype, scale):
    # A power of two next to it: then the scaled matrix has the same digits.
    exact = 2.0 ** round(math.log2(scale))
    plain = randn(40, 50, dtype=dtype)
    found, expected = rsvd(plain * exact, 6), rsvd(plain, 6)
    assert found.error == pytest.approx(expected.error, rel=1e-6)
    torch.testing.assert_close(found.S / exact, expected.S, rtol=1e-6, atol=0)
    for ours, theirs in ((found.U, expected.U), (found.Vh, expected.Vh)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # rounded elsewhere


def test_numbers_at_the_ends_of_the_range_are_no_trouble():
    for dtype, value in [(torch.float32, 3e38), (torch.float32, 1e-44), (torch.float64, 1e308)]:
        matrix = torch.diag(torch.tensor([value, value / 4, 0, 0], dtype=dtype))
        found = rsvd(matrix, 2)
        torch.testing.assert_close(found.S, torch.tensor([value, value / 4], dtype=dtype))
        assert found.error < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_views_are_read_through_their_strides(dtype):
    base = randn(90, 140, dtype=dtype)
    stacked = randn(30, 3, 50, dtype=dtype)
    views = [
        base.mT,
        base[::2, ::3],
        base[5:, 7:],
        base.mT[1::4, ::2],
        stacked[:, 1],
        stacked[:, :, 4],
        base[:1].expand(20, 140),
        base.conj(),
        base.mH,
    ]
    for view in views:
        found, expected = rsvd(view, 3), rsvd(view.resolve_conj().clone().contiguous(), 3)
        check(view, 3, found)
        # Transposed, the sums run in another order.
        torch.testing.assert_close(found.S, expected.S, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(90, 60), (60, 90), (33, 33)], ids=str)
def test_native_agrees_with_the_reference(shape, dtype):
    matrix = randn(*shape, dtype=dtype)
    for rank, options in [
        (5, {}),
        (20, dict(oversample=0, power_iters=2, seed=2**63 + 1)),
        (7, dict(power_iters=0, oversample=3)),
        (33, dict(power_iters=3)),
    ]:
        found = rsvd(matrix, rank, **options)
        expected = rsvd(matrix, rank, **options, backend="reference")
        # The same algorithm from the same signs: only rounding differs, magnified where singular
        # values lie close together.
        tolerance = 1e-12 if dtype in DOUBLE else 1e-4
        scale = float(expected.S[0])
        torch.testing.assert_close(found.S, expected.S, rtol=0, atol=tolerance * scale)
        ours, theirs = ((wide(d.U) * d.S.double().numpy()) @ wide(d.Vh) for d in (found, expected))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * scale)
        assert found.error == pytest.approx(expected.error, rel=1e-4, abs=ROUNDING[False])


def test_reference_takes_the_same_hard_cases():
    double = torch.float64
    hard = [torch.zeros(9, 5), torch.ones(4, 6), randn(20, 30, dtype=double) * 1e-100, torch.eye(6)]
    for matrix in (matrix.to(double) for matrix in hard):
        check(matrix, 3, rsvd(matrix, 3, backend="reference"))
    with pytest.raises(ValueError, match="matrix 0 has a NaN or infinite entry"):
        rsvd(torch.full((5, 4), math.inf), 2, backend="reference")


def same_bits(a, b):
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("U", "S", "Vh")) and (
        a.error == b.error
    )


def test_threads_order_and_company_do_not_change_a_bit(monkeypatch):
    shapes = [(96, 64), (9, 32), (300, 130), (64, 500), (8, 8), (64, 500)]
    dtypes = [torch.float32, torch.complex64, torch.bfloat16, torch.float32, torch.float64]
    matrices = [randn(*s, dtype=dtypes[i % 5], seed=i) for i, s in enumerate(shapes)]
    runs = []
    for threads in ("1", "2", "4"):
        monkeypatch.setenv("TBFAST_NUM_THREADS", threads)
        runs.append(rsvd(matrices, 5))
    runs.append(rsvd(matrices[::-1], 5)[::-1])
    runs.append([rsvd(matrix, 5) for matrix in matrices])
    for run in runs[1:]:
        assert all(same_bits(a, b) for a, b in zip(run, runs[0], strict=True))
    assert not same_bits(rsvd(matrices[3], 5, seed=1), runs[0][3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128], ids=str)
def test_the_adjoint_has_the_same_factors_exchanged(dtype):
    matrix = randn(40, 70, dtype=dtype)
    found, other = rsvd(matrix, 5), rsvd(matrix.mH.resolve_conj(), 5)
    if not dtype.is_complex:  # it lies in memory as it did: the very same numbers are multiplied
        assert torch.equal(found.U, other.Vh.mT)
    torch.testing.assert_close(found.S, other.S, rtol=1e-5, atol=0)
    assert other.error == pytest.approx(found.error, rel=1e-6)


def test_instruction_sets_agree(monkeypatch):
    matrix = with_spectrum(np.arange(1, 101.0) ** -0.5, 100, 250)
    found = []
    for isa in _native.isas():
        monkeypatch.setenv("TBFAST_ISA", isa)
        found.append(rsvd(matrix, 10))
    for other in found[1:]:
        # Sums in another order, magnified by 1 / gaps of 1e-2 between the singular values.
        torch.testing.assert_close(other.S, found[0].S, rtol=1e-5, atol=0)
        assert other.error == pytest.approx(found[0].error, rel=1e-6)


def test_hundreds_of_singular_values_are_found_as_well():
    matrix = with_spectrum(np.logspace(0, -3, 300), 310, 300)
    assert check(matrix, 200, rsvd(matrix, 200, power_iters=2)) < NEARLY_OPTIMAL


def test_a_list_gives_a_list_and_arrays_and_gradients_are_taken():
    assert rsvd([], 3) == []
    array = np.random.default_rng(0).standard_normal((9, 7)).astype(">f4")
    weight = torch.nn.Parameter(torch.from_numpy(array.astype("f4")))
    found = rsvd([array, weight], 4)
    assert isinstance(found, list)
    assert same_bits(*found)
    assert isinstance(rsvd(array, 4), tbfast.SVD)
    assert not found[1].U.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_matrix_that_is_not_finite_is_named(dtype, value):
    matrices = [randn(20, 30, dtype=dtype), randn(31, 17, dtype=dtype)]
    matrices[1][30, 16] = value
    with pytest.raises(ValueError, match="matrix 1 has a NaN or infinite entry"):
        rsvd(matrices, 2)


def test_what_cannot_be_decomposed_is_refused_by_name():
    good = randn(6, 9)
    with pytest.raises(ValueError, match=r"matrix 1 of shape \(6, 9\) has no 7 .* use rank=6"):
        rsvd([randn(8, 9), good], 7)
    for bad in (dict(rank=0), dict(oversample=-1), dict(power_iters=-1), dict(seed=2**64)):
        name, value = next(iter(bad.items()))
        with pytest.raises(ValueError, match=f"need .* got .*{name}={value}"):
            rsvd(good, **{"rank": 2, **bad})
    for bad, error, message in [
        (torch.ones(2, 3, 4), ValueError, r"must have shape \(rows, cols\)"),
        (torch.ones(0, 3), ValueError, "none of them 0"),
        (torch.ones(3), ValueError, "two or more dimensions"),
        (torch.ones(3, 3, dtype=torch.int64), TypeError, "must be floating point or complex"),
        (torch.ones(3, 3, device="meta"), TypeError, "on the meta device"),
        (torch.ones(3, 3).to_sparse(), TypeError, "sparse"),
        ([[1.0]], TypeError, "must be a tensor or an array"),
    ]:
        with pytest.raises(error, match=f"matrix 1 .*{message}"):
            rsvd([good, bad], 1)
    with pytest.raises(ValueError, match="backend must be one of"):
        rsvd(good, 1, backend="mkl")


def test_native_checks_its_options():
    matrix = randn(4, 5)
    table = Batch([matrix]).table()
    options = dict(rank=2, oversample=0, power_iters=0, seed=0, threads=1)
    for bad in (dict(rank=0), dict(oversample=-1), dict(power_iters=-1), dict(threads=0)):
        with pytest.raises(ValueError, match="out of range"):
            _native.rsvd(table, **{**options, **bad})
    with pytest.raises(ValueError, match="rank is above the shorter side of matrix 0"):
        _native.rsvd(table, **{**options, "rank": 5})
