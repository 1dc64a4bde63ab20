"""The rsvd kernel, emulated, against the reference and LAPACK."""

import importlib.util
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import tbfast
from tbfast.batch import Batch

# The oracle and its tolerances, with their reasons, are those of the CPU's tests.
_path = Path(__file__).with_name("test_rsvd.py")
_spec = importlib.util.spec_from_file_location("rsvd_oracle", _path)
oracle = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracle)
CAPTURED, DOUBLE, DTYPES = oracle.CAPTURED, oracle.DOUBLE, oracle.DTYPES
NEARLY_OPTIMAL, ROUNDING = oracle.NEARLY_OPTIMAL, oracle.ROUNDING
check, randn, same_bits = oracle.check, oracle.randn, oracle.same_bits
wide, with_spectrum = oracle.wide, oracle.with_spectrum


@pytest.fixture
def rsvd(emulated):
    """Factors of a list of matrices, and the row of results of each, with one launch."""

    def run(matrices, rank, oversample=8, power_iters=1, seed=0, schedule=0, blocks=2, poison=0xFF):
        descriptors = Batch(matrices, ["linear"] * len(matrices)).descriptors()
        plan = emulated.RsvdPlan(
            descriptors, rank=rank, oversample=oversample, power_iters=power_iters
        )
        image = torch.from_numpy(plan.image())
        workspace = torch.full((plan.workspace_bytes,), poison, dtype=torch.uint8)  # 0xFF..: NaN
        workspace[: len(image)] = image
        memory = torch.full((plan.factors_bytes,), poison, dtype=torch.uint8)
        results = torch.full((len(matrices), 3), -1.0, dtype=torch.float64)
        emulated.emulate(schedule=schedule, multiprocessors=blocks)
        before = emulated.launch_count()
        plan.launch(
            workspace=workspace.data_ptr(),
            factors=memory.data_ptr(),
            results=results.data_ptr(),
            seed=seed,
            blocks=blocks,
        )
        emulated.emulate()
        assert emulated.launch_count() == before + 1
        found = []
        for matrix, (u, s, vh), row in zip(matrices, plan.offsets, results, strict=True):
            narrow = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
            dtype = narrow.get(matrix.dtype, matrix.dtype)
            rows, cols = matrix.shape
            factors = (
                view(memory, u, (rows, rank), dtype),
                view(memory, s, (rank,), torch.float64).to(dtype.to_real()),
                view(memory, vh, (rank, cols), dtype),
            )
            found.append(tbfast.SVD(*factors, float(row[0])))
        return found, results.numpy()

    return run


def view(memory, offset, shape, dtype):
    return memory[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


def agrees(matrix, rank, found, **options):
    expected = tbfast.rsvd(matrix, rank, **options, backend="reference")
    # The same algorithm from the same signs: only rounding differs, magnified where singular values
    # lie close together. The tolerances are those of the native backend.
    tolerance = 1e-12 if matrix.dtype in DOUBLE else 1e-4
    scale = float(expected.S[0])
    torch.testing.assert_close(found.S, expected.S, rtol=0, atol=tolerance * scale)
    ours, theirs = ((wide(d.U) * d.S.double().numpy()) @ wide(d.Vh) for d in (found, expected))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * scale)
    assert found.error == pytest.approx(expected.error, rel=1e-4, abs=ROUNDING[False])


SHAPES = [(1, 9), (9, 1), (2, 2), (17, 5), (33, 33), (60, 90), (131, 67)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factors_are_those_of_the_reference_whatever_the_shape(rsvd, dtype):
    for rank in (1, 5):
        matrices = [randn(*s, dtype=dtype, seed=s[0]) for s in SHAPES if min(s) >= rank]
        copies = [matrix.clone() for matrix in matrices]
        found, _ = rsvd(matrices, rank, blocks=3)
        for matrix, copy, factors in zip(matrices, copies, found, strict=True):
            assert torch.equal(matrix, copy)
            assert check(matrix, rank, factors) < 1.03  # small and flat spectra, the worst case
            agrees(matrix, rank, factors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        dict(oversample=0, power_iters=2, seed=2**63 + 1),
        dict(oversample=3, power_iters=0),
        dict(power_iters=3),
    ],
    ids=str,
)
def test_options_mean_what_they_mean_to_the_reference(rsvd, options, dtype):
    matrix = randn(60, 90, dtype=dtype)
    (found,), _ = rsvd([matrix], 20, **options)
    agrees(matrix, 20, found, **options)


def test_every_sign_is_that_of_the_reference(rsvd):
    # Without power iterations the factors are those of the range of A times the signs: another
    # sign in any of its 80 columns moves them by far more than rounding does.
    for side, rank, seed in [(50, 28, 0), (50, 28, (7 << 32) + 5), (100, 76, 5)]:
        matrix = randn(side, side + 9, dtype=torch.float64)
        (found,), _ = rsvd([matrix], rank, oversample=4, power_iters=0, seed=seed)
        agrees(matrix, rank, found, oversample=4, power_iters=0, seed=seed)
    expected = tbfast.rsvd(
        matrix, rank, oversample=4, power_iters=0, seed=seed + 1, backend="reference"
    )
    assert abs(expected.error - found.error) > 1e-6


def test_sketches_of_up_to_128_columns_are_as_good(rsvd):
    # Small matrices of 128 columns are too large for shared memory.
    matrix = with_spectrum(np.logspace(0, -3, 140), 140, 150)
    (found,), _ = rsvd([matrix], 120)
    assert check(matrix, 120, found) < NEARLY_OPTIMAL
    agrees(matrix, 120, found)


def test_complex_ones_leave_shared_memory_sooner(rsvd):
    matrix = randn(60, 70, dtype=torch.complex128)
    (found,), _ = rsvd([matrix], 50, oversample=14)  # 64 columns, 16 bytes each
    agrees(matrix, 50, found, oversample=14)


def test_long_sides_are_worked_on_in_slices_and_strips(rsvd):
    matrices = [randn(20, 2100), randn(2100, 20).to(torch.bfloat16), randn(40, 1100)]
    found, _ = rsvd(matrices, 4, oversample=0, power_iters=1)
    for matrix, factors in zip(matrices, found, strict=True):
        check(matrix, 4, factors)
        agrees(matrix, 4, factors, oversample=0)


def low_rank_cases(dtype):
    unit = torch.zeros(40, 60, dtype=dtype)
    unit[3, 5] = 2
    few_rows = torch.zeros(64, 50, dtype=dtype)
    few_rows[7:11] = randn(4, 50, dtype=dtype)
    return [
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matrices_of_low_rank_are_found_exactly_with_orthonormal_factors(rsvd, dtype):
    cases = low_rank_cases(dtype)
    for power_iters in (0, 1):
        found, _ = rsvd(cases, 12, power_iters=power_iters)
        for matrix, factors in zip(cases, found, strict=True):
            check(matrix, 12, factors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128], ids=str)
def test_spectra_over_many_decades_keep_small_singular_values(rsvd, dtype):
    matrix = with_spectrum(np.logspace(0, -18, 60), 60, 90, dtype)
    for power_iters in (0, 1):
        (found,), _ = rsvd([matrix], 30, power_iters=power_iters)
        check(matrix, 30, found)
        true = np.linalg.svd(wide(matrix), compute_uv=False)[:30]
        np.testing.assert_allclose(found.S, true, rtol=0, atol=CAPTURED[dtype in DOUBLE])


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e30),
        (torch.bfloat16, 1e-30),
        (torch.complex64, 1e-30),
        (torch.float64, 1e200),
        (torch.complex128, 1e-200),
    ],
    ids=str,
)
def test_huge_and_tiny_entries_change_nothing_but_the_scale(rsvd, dtype, scale):
    exact = 2.0 ** round(math.log2(scale))  # a power of two: the scaled matrix has the same digits
    plain = randn(40, 50, dtype=dtype)
    (expected, found), rows = rsvd([plain, plain * exact], 6)
    assert found.error == pytest.approx(expected.error, rel=1e-6)
    torch.testing.assert_close(found.S / exact, expected.S, rtol=1e-6, atol=0)
    for ours, theirs in ((found.U, expected.U), (found.Vh, expected.Vh)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # rounded elsewhere
    assert rows[1, 1] == pytest.approx(rows[0, 1], rel=1e-4)


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float32, 3e38), (torch.float32, 1e-44), (torch.float64, 1e308)]
)
def test_numbers_at_the_ends_of_the_range_are_no_trouble(rsvd, dtype, value):
    matrix = torch.diag(torch.tensor([value, value / 4, 0, 0], dtype=dtype))
    (found,), _ = rsvd([matrix], 2)
    torch.testing.assert_close(found.S, torch.tensor([value, value / 4], dtype=dtype))
    assert found.error < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_views_are_read_through_their_strides(rsvd, dtype):
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
    ]
    found, _ = rsvd(views, 3)
    expected, _ = rsvd([v.clone(memory_format=torch.contiguous_format) for v in views], 3)
    for matrix, ours, theirs in zip(views, found, expected, strict=True):
        check(matrix, 3, ours)
        # Products are summed in the order of the shape; only |A|^2, which the error comes from, is
        # summed in that of the memory, in double precision.
        assert all(torch.equal(getattr(ours, f), getattr(theirs, f)) for f in ("U", "S", "Vh"))
        assert ours.error == pytest.approx(theirs.error, rel=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_matrix_that_is_not_finite_has_no_residual_and_leaves_the_others_alone(
    rsvd, dtype, value
):
    good, bad = randn(20, 30, dtype=dtype), randn(31, 17, dtype=dtype)
    bad[30, 16] = value
    found, rows = rsvd([good, bad, good], 2)
    (alone,), _ = rsvd([good], 2)
    assert np.isnan(rows[1, :2]).all()
    assert same_bits(found[0], alone)
    assert same_bits(found[2], alone)
    untouched = found[1].U.contiguous().view(torch.uint8)
    assert (untouched == 0xFF).all()


def test_alpha_of_the_tail_is_that_of_hill(rsvd):
    matrix = with_spectrum(np.arange(1, 61.0) ** -0.7, 60, 80, torch.float64)
    (found,), rows = rsvd([matrix], 12, power_iters=2)
    squares = found.S.numpy() ** 2
    # A dozen logarithms of the very singular values that are returned.
    assert rows[0, 1] == pytest.approx(1 + 12 / np.log(squares / squares[-1]).sum(), rel=1e-12)
    _, rows = rsvd([torch.zeros(9, 9), torch.eye(9), randn(9, 9)], 3)
    assert np.isnan(rows[0, 1])  # no tail without a singular value
    _, rows = rsvd([randn(9, 9)], 1)
    assert np.isnan(rows[0, 1])  # nor from a single one


def test_every_pass_reads_every_byte_once(rsvd, emulated):
    cases = [
        (randn(60, 90), 4),
        (randn(90, 1100).to(torch.float16), 4),
        (randn(20, 16, dtype=torch.complex64), 2),  # as many columns as rows: nothing to iterate
        (randn(40, 60) * 1e-30, 5),  # once more, to be scaled
        (torch.ones(40, 60, dtype=torch.float64), 5),  # and for the residual
    ]
    for matrix, expected in cases:
        before = emulated.weight_bytes()
        _, rows = rsvd([matrix], 2)
        read = (emulated.weight_bytes() - before) / (matrix.numel() * matrix.element_size())
        assert rows[0, 2] == read == expected


SHUFFLED = [(96, 64), (9, 32), (300, 30), (64, 150), (8, 8), (64, 150), (40, 40)]


def mixed():
    shuffled = [randn(*s, dtype=DTYPES[i % 6], seed=i) for i, s in enumerate(SHUFFLED)]
    return [*shuffled, torch.zeros(20, 30), torch.ones(30, 20, dtype=torch.float64)]


def test_company_the_grid_and_what_memory_held_do_not_change_a_bit(rsvd):
    matrices = mixed()
    expected, rows = rsvd(matrices, 5, blocks=1)
    for options in (dict(blocks=3), dict(blocks=7), dict(blocks=40), dict(poison=0x00)):
        found, others = rsvd(matrices, 5, **options)
        assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))
        np.testing.assert_array_equal(others, rows)
    found, _ = rsvd(matrices[::-1], 5)
    assert all(same_bits(a, b) for a, b in zip(found[::-1], expected, strict=True))
    for matrix, other in zip(matrices, expected, strict=True):
        (alone,), _ = rsvd([matrix], 5)
        assert same_bits(alone, other)


@pytest.mark.parametrize("schedule", range(1, 25))
def test_no_schedule_changes_a_bit(rsvd, schedule):
    shape = random.Random(schedule).choice([(20, 30), (40, 17), (9, 70)])
    matrices = [
        randn(*shape, dtype=DTYPES[schedule % 6], seed=schedule),
        torch.ones(6, 7),
        randn(18, 20, dtype=DTYPES[schedule % 5], seed=schedule) * 1e-25,
    ]
    expected, rows = rsvd(matrices, 3, oversample=0)
    found, others = rsvd(matrices, 3, oversample=0, schedule=schedule, blocks=1 + schedule % 4)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))
    np.testing.assert_array_equal(others, rows)


def test_what_cannot_be_decomposed_is_refused_by_name(emulated):
    def plan(*shapes, rank=2, oversample=0, power_iters=0):
        kept = [torch.zeros(shape) for shape in shapes]
        descriptors = Batch(kept, ["linear"] * len(kept)).descriptors()
        options = dict(rank=rank, oversample=oversample, power_iters=power_iters)
        return emulated.RsvdPlan(descriptors, **options)

    with pytest.raises(ValueError, match="rank is above the shorter side of matrix 1"):
        plan((8, 9), (6, 9), rank=7)
    message = r"matrix 1 of shape \(200, 300\) needs a sketch of 144 .* backend='native'"
    with pytest.raises(ValueError, match=message):
        plan((100, 300), (200, 300), rank=100, oversample=40)
    plan((128, 300), rank=100, oversample=40)  # all it has
    for bad in (dict(rank=0), dict(oversample=-1), dict(power_iters=-1)):
        with pytest.raises(ValueError, match="out of range"):
            plan((6, 9), **bad)


def test_more_blocks_than_the_device_runs_are_refused(emulated):
    matrix = randn(6, 9)
    plan = emulated.RsvdPlan(Batch([matrix]).descriptors(), rank=2, oversample=0, power_iters=0)
    emulated.emulate(multiprocessors=3)
    with pytest.raises(ValueError, match="runs 1 to 3 blocks .* asked for 4"):
        plan.launch(workspace=256, factors=256, results=256, blocks=4)
