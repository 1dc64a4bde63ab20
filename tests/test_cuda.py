"""The CUDA kernels, emulated on the CPU: products, Lanczos runs and alpha against the reference."""

import numpy as np
import pytest
import torch

from tbfast.backends import native, reference
from tbfast.batch import Batch
from tbfast.fitting import FIT_KINDS, FitOptions
from tbfast.sketching import SketchOptions

DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
]
# 1 x n, odd, off by one from a panel, several slices, and more than one segment of 256 columns, to
# which the emulated kernels are compiled; rows contiguous, then columns.
SHAPES = [(1, 9), (9, 1), (17, 5), (64, 40), (37, 70), (272, 264), (264, 530), (520, 48)]

# Sums of float32 products, relative to the norm: eps32 times the root of the longest sum.
FLOAT_TOLERANCE = 1e-6
# bfloat16 weights take x and T x as two parts of 8 bits each: 2^-17 of them is lost, at random.
BF16_TOLERANCE = 2**-17
# What the issue asks of the same probes. The worst seen is 2e-6.
ALPHA_TOLERANCE = 1e-4


def random_matrix(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=generator, dtype=wide).to(dtype)


def every_layout(dtype):
    """By rows, by columns, with a larger stride, with both strides, misaligned; and a stack."""
    weights = []
    for seed, (rows, cols) in enumerate(SHAPES):
        weights.append(random_matrix((rows, cols), dtype, seed))
        weights.append(random_matrix((cols, rows), dtype, seed).T)
    weights.append(random_matrix((40, 80), dtype, 9)[:, 8:72])
    weights.append(random_matrix((40, 80), dtype, 10)[::2, ::3])
    weights.append(random_matrix((40, 80), dtype, 11)[:, 1:73])
    weights.append(random_matrix((16, 12, 3, 3), dtype, 12))
    return weights


def vectors_for(weights, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(
            stack.shape[0],
            count,
            min(stack.shape[1:]) * (2 if stack.is_complex() else 1),
            generator=generator,
        )
        for stack in Batch(weights).stacks()
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_agree_with_the_reference(cuda, dtype):
    weights = every_layout(dtype)
    copies = [weight.clone() for weight in weights]
    x = vectors_for(weights, 9)
    batch = Batch(weights)
    tolerance = BF16_TOLERANCE if dtype == torch.bfloat16 else FLOAT_TOLERANCE
    for found, expected in zip(
        cuda.gram_apply(batch, x), reference.gram_apply(batch, x), strict=True
    ):
        assert (found.double() - expected).norm() <= tolerance * expected.norm()
    for weight, copy in zip(weights, copies, strict=True):
        torch.testing.assert_close(weight, copy, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.complex64], ids=str)
def test_random_signs_are_those_of_the_cpu(cuda, dtype):
    # The first coefficient is s W^T W s / n: with W of one row, any wrong sign shows.
    weights = [random_matrix((1, 40), dtype, 1).T @ random_matrix((1, 40), dtype, 2)]
    weights += [random_matrix((12, 10, 3), dtype, 3)]
    batch = Batch({"layer.weight": weights[0], "conv.weight": weights[1]})
    for probes, draw in ((1, 0), (3, 7), (130, 2**24 - 1)):
        found = cuda.lanczos(batch, probes, 2, seed=2**63 + 5, draw=draw)
        expected = reference.lanczos(batch, probes, 2, seed=2**63 + 5, draw=draw)
        scale = expected.diagonal[..., 0].max()
        np.testing.assert_allclose(
            found.diagonal[..., 0], expected.diagonal[..., 0], atol=1e-6 * scale, rtol=1e-5
        )


def trained(dtype, sizes=((96, 64), (64, 120), (33, 33))):
    """Matrices with the heavy tails of training."""
    weights = {}
    for i, (rows, cols) in enumerate(sizes):
        decay = torch.logspace(0, -1 - i / 4, cols, dtype=torch.float64)
        weights[f"w{i}"] = (random_matrix((rows, cols), torch.float64, i) * decay).to(dtype)
    weights["conv"] = random_matrix((20, 24, 3, 3), dtype, 7)
    return weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alpha_is_that_of_the_cpu_engine_on_the_same_probes(cuda, dtype):
    weights = trained(dtype)
    batch = Batch(weights)
    expected = native.quadrature_fit(native.lanczos(batch, 4, 14, seed=3, draw=2), FitOptions())
    refresh = cuda.Refresh(batch, FitOptions(), SketchOptions(4, 14, 3))
    assert refresh.latest() is None
    assert refresh.start(2)
    draw, found = refresh.latest()
    assert draw == 2
    np.testing.assert_allclose(found.fits.alpha, expected.fits.alpha, rtol=ALPHA_TOLERANCE)
    # The error is the scatter of probes: itself known to a third; it must be the same formula.
    np.testing.assert_allclose(found.sketch_error, expected.sketch_error, rtol=1e-2)
    np.testing.assert_array_equal(found.n_zeros, expected.n_zeros)
    np.testing.assert_array_equal(found.fits.n_tail, expected.fits.n_tail)
    np.testing.assert_allclose(found.max_eigenvalue, expected.max_eigenvalue, rtol=1e-4)


@pytest.mark.parametrize("kind", FIT_KINDS)
def test_every_fit_follows_the_runs_in_the_same_launch(cuda, emulated, kind):
    weights = trained(torch.float32)
    batch, options = Batch(weights), FitOptions(kind, k=10)
    expected = native.quadrature_fit(native.lanczos(batch, 3, 10, seed=1), options)
    refresh = cuda.Refresh(batch, options, SketchOptions(3, 10, 1))
    before = emulated.launch_count()
    refresh.start(0)
    assert emulated.launch_count() == before + 1
    _, found = refresh.latest()
    np.testing.assert_allclose(found.fits.alpha, expected.fits.alpha, rtol=ALPHA_TOLERANCE)


def test_runs_end_where_an_invariant_subspace_is_found(cuda):
    weights = {
        "levels": torch.diag(torch.tensor([1.0, 2.0, 3.0] * 5)),
        "rank": random_matrix((40, 4), torch.float32) @ random_matrix((4, 30), torch.float32, 1),
        "one": torch.ones(20, 20),
        "full": random_matrix((30, 20), torch.float32, 2),
    }
    batch = Batch(weights)
    found, expected = (b.lanczos(batch, 5, 8, seed=1) for b in (cuda, native))
    np.testing.assert_array_equal(found.taken, expected.taken)
    assert found.taken[0].max() <= 4
    assert found.taken[1].max() <= 6
    assert found.taken[3].min() == 8


def test_runs_of_one_matrix_end_one_by_one(cuda):
    # An eigenvector ends at once, two of them after two steps, any other vector goes on.
    weight = torch.diag(torch.arange(1.0, 21))
    starts = torch.randn(1, 3, 20, generator=torch.Generator().manual_seed(0))
    starts[0, 0], starts[0, 2] = torch.eye(20)[4], torch.eye(20)[:2].sum(0)
    for backend in (cuda, native, reference):
        found = backend.lanczos(Batch([weight]), [starts], 10)
        assert found.taken.tolist() == [[1, 10, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_extreme_magnitudes_are_scaled(cuda, dtype):
    # By powers of two, which change no bit but the exponent.
    tiny, huge = (2.0**-400, 2.0**400) if dtype == torch.float64 else (2.0**-60, 2.0**56)
    weights = {
        f"{layout}{scale}": random_matrix((40, 32), torch.float64).mul(scale).to(dtype)[:, ::step]
        for scale in (1.0, tiny, huge)
        for layout, step in (("dense", 1), ("strided", 2))
    }
    batch = Batch(weights)
    starts = [torch.ones(1, 2, min(w.shape)) for w in weights.values()]
    found = cuda.lanczos(batch, starts, 4)
    assert (found.taken == 4).all()
    for i, scale in enumerate((tiny, tiny, huge, huge), start=2):
        # Scaling so that the largest entry is near 1 moves no rounding.
        np.testing.assert_allclose(found.diagonal[i] / scale**2, found.diagonal[i % 2], rtol=1e-6)
        np.testing.assert_allclose(
            found.off_diagonal[i, :, :-1] / scale**2, found.off_diagonal[i % 2, :, :-1], rtol=1e-6
        )


def test_a_layer_that_is_not_finite_or_zero_leaves_the_others_alone(cuda):
    weights = trained(torch.bfloat16, sizes=((64, 48), (40, 70)))
    alone = cuda.lanczos(Batch(weights), 3, 8, seed=1)
    weights |= {"nan": random_matrix((30, 20), torch.bfloat16), "zero": torch.zeros(10, 12)}
    weights["nan"][3, 4] = float("inf")
    found = cuda.lanczos(Batch(weights), 3, 8, seed=1)
    n = len(alone.diagonal)
    np.testing.assert_array_equal(found.diagonal[:n], alone.diagonal)
    fits = cuda.quadrature_fit(found, FitOptions()).fits
    assert np.isnan(fits.alpha[-2:]).all()
    assert fits.reason[-2:].tolist() == [2, 1]  # not finite; all eigenvalues are zero


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.complex64], ids=str)
def test_grid_and_schedule_and_memory_change_no_bit(cuda, emulated, monkeypatch, dtype):
    weights = {
        "small": random_matrix((40, 24), dtype, 1),
        "wide": random_matrix((24, 48), dtype, 2),
        "team": random_matrix((136 if dtype.is_complex else 272, 264), dtype, 3),
        "conv": random_matrix((8, 8, 2, 2), dtype, 4),
    }
    batch = Batch(weights)
    expected = cuda.lanczos(batch, 2, 3, seed=1)

    def same(found):
        np.testing.assert_array_equal(found.diagonal, expected.diagonal)
        np.testing.assert_array_equal(found.off_diagonal[..., :-1], expected.off_diagonal[..., :-1])

    for blocks in (4, 7, 40):
        emulated.emulate(0, blocks, 1)
        same(cuda.lanczos(batch, 2, 3, seed=1))
    for schedule in range(1, 8):  # 21 random orders over the three dtypes
        emulated.emulate(schedule, 3, 1)
        same(cuda.lanczos(batch, 2, 3, seed=1))
    emulated.emulate()
    # Little memory: one matrix after the other, still in one launch.
    monkeypatch.setattr("tbfast.backends.cuda_plans._BASIS_BYTES", 1)
    before = emulated.launch_count()
    same(cuda.lanczos(Batch(weights), 2, 3, seed=1))
    assert emulated.launch_count() == before + 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_byte_is_read_once_in_a_step(cuda, emulated, dtype):
    weights = [w for w in every_layout(dtype) if w.ndim == 2 and w.is_contiguous()]
    batch = Batch(weights)
    once = sum(weight.numel() * weight.element_size() for weight in weights)
    before = emulated.weight_bytes()
    cuda.gram_apply(batch, vectors_for(weights, 8))
    assert emulated.weight_bytes() - before == once
    long = Batch([w for w in weights if min(w.shape) > 20])
    once = sum(w.numel() * w.element_size() for w in long.tensors())
    before = emulated.weight_bytes()
    cuda.lanczos(long, 8, 5, seed=0)
    assert emulated.weight_bytes() - before == 5 * once


def test_uninitialised_memory_changes_nothing(cuda, monkeypatch):
    weights = trained(torch.float32, sizes=((64, 48), (40, 70)))
    expected = cuda.lanczos(Batch(weights), 3, 6, seed=1)
    empty = torch.empty

    def poisoned(*args, **kwargs):
        found = empty(*args, **kwargs)
        return found.fill_(255) if found.dtype == torch.uint8 else found.fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poisoned)
    found = cuda.lanczos(Batch(weights), 3, 6, seed=1)
    np.testing.assert_array_equal(found.diagonal, expected.diagonal)


def test_results_come_from_the_last_launch_that_has_finished(cuda):
    weights = trained(torch.float32, sizes=((64, 48),))
    batch = Batch(weights)
    refresh = cuda.Refresh(batch, FitOptions(), SketchOptions(2, 6))
    seen = []
    for draw in range(6):
        assert refresh.start(draw)
        seen.append(refresh.latest())
    assert [draw for draw, _ in seen] == list(range(6))
    alphas = {float(table.fits.alpha[0]) for _, table in seen}
    assert len(alphas) == 6  # other signs each time
    # Pretend that the device is three launches behind: nothing is overwritten.
    refresh._results[:, -1] = torch.tensor([4.0, -1.0, -1.0, 3.0])
    refresh._started = 7
    assert not refresh.start(9)
    assert refresh.latest()[0] == refresh._draws[0]


def test_other_uses_of_a_batch_leave_a_refresh_its_plan(cuda):
    weights = trained(torch.float32, sizes=((64, 48),))
    batch = Batch(weights)
    refresh = cuda.Refresh(batch, FitOptions(), SketchOptions(2, 6))
    planned = refresh._plan()
    cuda.lanczos(batch, 3, 5)
    other = cuda.Refresh(batch, FitOptions("tail", k=5), SketchOptions(2, 6))
    other.start(0)
    assert refresh._plan() is planned
    assert other._plan() is not planned


def test_rows_that_took_the_place_of_others_are_not_taken_for_them(cuda):
    # As when anchors are taken again: the freed tensor's memory is given out once more.
    weights = {"w": random_matrix((40, 8), torch.float32)}
    batch = Batch(weights)
    memory = np.arange(8)
    cuda.drift(batch, torch.from_numpy(memory), torch.zeros(64))
    memory += 8
    found = cuda.drift(batch, torch.from_numpy(memory), torch.zeros(64))
    np.testing.assert_allclose(found[0], [float(weights["w"][8:16].double().square().sum())])


def test_values_of_another_length_are_refused(cuda):
    weights = {"w": random_matrix((40, 8), torch.float32)}
    batch, rows = Batch(weights), torch.arange(8)
    with pytest.raises(ValueError, match=r"values must have 64 elements, got shape \(63,\)"):
        cuda.drift(batch, rows, torch.zeros(63))
    with pytest.raises(ValueError, match="values must have 320 elements"):
        cuda.dot(batch, torch.zeros(319, dtype=torch.int8), torch.ones(40))
    with pytest.raises(ValueError, match="scales must have 40 elements"):
        cuda.dot(batch, torch.zeros(320, dtype=torch.int8), torch.ones(41))


def test_replays_of_a_graph_take_the_next_draw(cuda):
    weights = trained(torch.float32, sizes=((64, 48),))
    refresh = cuda.Refresh(Batch(weights), FitOptions(), SketchOptions(2, 6, seed=1, draw=5))
    rows = [refresh.capture()[0, 0].item() for _ in range(3)]
    expected = []
    for draw in (5, 6, 7):
        refresh.start(draw)
        expected.append(refresh.latest()[1].fits.alpha[0])
    assert rows == expected


def test_a_moved_weight_is_found_again_and_a_plan_is_kept(cuda, monkeypatch):
    weight = torch.nn.Parameter(random_matrix((48, 32), torch.float32))
    batch = Batch({"w": weight})
    made = []
    plan = cuda.kernels.SpectralPlan

    def counted(*arguments, **options):
        made.append(1)
        return plan(*arguments, **options)

    monkeypatch.setattr("tbfast.backends.cuda_plans.kernels.SpectralPlan", counted)
    first = cuda.lanczos(batch, 2, 5).diagonal
    np.testing.assert_array_equal(cuda.lanczos(batch, 2, 5).diagonal, first)
    assert len(made) == 1
    weight.data = 2 * weight.data
    np.testing.assert_allclose(cuda.lanczos(batch, 2, 5).diagonal, 4 * first, rtol=1e-6)
    assert len(made) == 2


def test_a_matrix_wider_than_the_grid_is_refused(cuda, emulated):
    emulated.emulate(0, 1, 1)
    weights = [random_matrix((300, 264), torch.float32)]
    with pytest.raises(ValueError, match="needs 2 blocks at once and the device runs at most 1"):
        cuda.gram_apply(Batch(weights), vectors_for(weights, 1))


def test_vectors_must_be_as_many_for_all_layers(cuda):
    weights = trained(torch.float32)
    x = vectors_for(weights, 2)
    with pytest.raises(ValueError, match="the same number of vectors"):
        cuda.gram_apply(Batch(weights), [x[0][:, :1], *x[1:]])
