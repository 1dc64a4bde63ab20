"""The GPU kernels of ``dot`` and ``drift``, in emulation, against their definition."""

import numpy as np
import pytest
import torch

from tbfast.backends import reference
from tbfast.batch import Batch
from tbfast.matrices import real_rows

# Every product and sum is in double: only the order of at most 1e5 additions differs, each of which
# errs by 1e-16 of the sum of magnitudes.
TOLERANCE = 1e-12

DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
]
# One row, one column, odd sizes, runs that end within a tile, more than one strip and one band.
SHAPES = [(1, 1), (1, 37), (37, 1), (5, 7), (96, 64), (131, 72), (40, 270)]


def random_weight(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=generator, dtype=wide).to(dtype)


def batch_of(weights):
    """A batch that keeps its weights alive."""
    batch = Batch(weights)
    batch.weights = weights
    return batch


def a_gradient(batch):
    """int8 values and the scale of each row, of all matrices of a batch."""
    rows = [real_rows(stack) for stack in batch.stacks()]
    generator = torch.Generator().manual_seed(7)
    count = sum(r.numel() for r in rows)
    values = torch.randint(-127, 128, (count,), dtype=torch.int8, generator=generator)
    return values, torch.rand(sum(len(r) for r in rows), generator=generator)


def kept_rows(batch):
    """Every third row and the last, and what they held before."""
    rows = [real_rows(stack) for stack in batch.stacks()]
    count = sum(len(r) for r in rows)
    kept = torch.tensor(sorted({*range(1, count, 3), count - 1}), dtype=torch.int64)
    pieces, first = [], 0
    for r in rows:
        mine = kept[(kept >= first) & (kept < first + len(r))] - first
        before = r[mine].float().flatten()
        pieces.append(before + 0.1 * torch.cos(torch.arange(len(before))))
        first += len(r)
    return kept, torch.cat(pieces)


def launch(emulated, plan, layers, blocks=0, schedule=0, fill=0xFF, **operands):
    """Results of one launch on a workspace that held NaN, or `fill`, everywhere."""
    workspace = torch.full((plan.workspace_bytes,), fill, dtype=torch.uint8)
    image = torch.from_numpy(plan.image())
    workspace[: len(image)] = image
    results = torch.full((layers, plan.columns), float("nan"), dtype=torch.float64)
    emulated.emulate(schedule=schedule, multiprocessors=max(blocks, 3))
    try:
        plan.launch(
            **{name: operand.data_ptr() for name, operand in operands.items()},
            workspace=workspace.data_ptr(),
            results=results.data_ptr(),
            blocks=blocks,
        )
    finally:
        emulated.emulate()
    return results.numpy()


def run_dot(emulated, batch, **how):
    values, scales = a_gradient(batch)
    plan = emulated.DotPlan(batch.descriptors(), len(batch))
    return launch(emulated, plan, len(batch), values=values, scales=scales, **how)


def run_drift(emulated, batch, **how):
    kept, before = kept_rows(batch)
    plan = emulated.DriftPlan(batch.descriptors(), len(batch), kept.tolist())
    return launch(emulated, plan, len(batch), values=before, **how)


def check(emulated, batch):
    found, expected = run_dot(emulated, batch), np.stack(reference.dot(batch, *a_gradient(batch)))
    # A dot product may cancel: its error is measured by the lengths of its two factors.
    values, scales = a_gradient(batch)
    longest = 127 * float(scales.max()) * np.sqrt(expected[1] * len(values))
    assert np.all(abs(found[:, 0] - expected[0]) <= TOLERANCE * longest)
    np.testing.assert_allclose(found[:, 1], expected[1], rtol=TOLERANCE)

    found = run_drift(emulated, batch)
    expected = np.stack(reference.drift(batch, *kept_rows(batch)))
    longest = np.sqrt(expected[0] * expected[2])
    assert np.all(abs(found[:, 1] - expected[1]) <= TOLERANCE * longest)
    np.testing.assert_allclose(found[:, 0], expected[0], rtol=TOLERANCE)
    np.testing.assert_allclose(found[:, 2], expected[2], rtol=TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_layers_agree_with_the_reference(emulated, dtype):
    check(emulated, batch_of([random_weight(s, dtype, i) for i, s in enumerate(SHAPES)]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contiguous_columns_agree_with_the_reference(emulated, dtype):
    check(emulated, batch_of([random_weight(s, dtype, i).T for i, s in enumerate(SHAPES)]))


def test_padded_misaligned_and_strided_weights_agree_with_the_reference(emulated):
    wide = random_weight((80, 200), torch.bfloat16, 0)
    # Rows with a gap; first addresses that are no multiple of 16 bytes; every second column; the
    # same as columns.
    views = [wide[:, :64], wide[:, 1:65], wide[3:, ::2], wide[::3]]
    check(emulated, batch_of([*views, *(view.T for view in views)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_slices_of_convolutions_agree_with_the_reference(emulated, dtype):
    kernel = random_weight((20, 12, 3, 3), dtype, 0)
    # A Fourier layer of 24 x 12 = 288 modes.
    modes = random_weight((5, 4, 24, 12), dtype, 1)
    batch = batch_of([kernel, modes, kernel.contiguous(memory_format=torch.channels_last)])
    check(emulated, batch)


def test_tiles_of_a_large_matrix_agree_with_the_reference(emulated):
    # More elements than a tile has, both along rows and down columns.
    weight = random_weight((700, 96), torch.bfloat16, 0)
    check(emulated, batch_of([weight, random_weight((96, 700), torch.bfloat16, 1).T]))


def test_extreme_weights_neither_overflow_nor_vanish(emulated):
    check(emulated, batch_of([torch.full((9, 8), s) for s in (1e-30, 1e30)]))


def test_a_layer_that_is_not_finite_is_the_only_one_to_suffer(emulated):
    weights = [random_weight((33, 24), torch.float32, i) for i in range(4)]
    clean = batch_of(weights)
    dots, drifts = run_dot(emulated, clean), run_drift(emulated, clean)
    broken = [w.clone() for w in weights]
    broken[1][31, 5] = float("nan")
    broken[3][32, 0] = float("inf")
    batch = batch_of(broken)
    kept, before = kept_rows(clean)
    plan = emulated.DriftPlan(batch.descriptors(), 4, kept.tolist())
    found = run_dot(emulated, batch), launch(emulated, plan, 4, values=before)
    for now, then in zip(found, (dots, drifts), strict=True):
        np.testing.assert_array_equal(now[[0, 2]], then[[0, 2]])
        assert not np.isfinite(now[[1, 3], 0]).any()
    assert not np.isfinite(found[0][[1, 3], 1]).any()


def a_mixed_batch():
    weights = [
        random_weight((70, 64), torch.bfloat16, 0),
        random_weight((64, 90), torch.float32, 1).T,
    ]
    weights += [random_weight((3, 5), torch.complex64, i) for i in range(6)]
    return batch_of([*weights, random_weight((400, 96), torch.float16, 2)])


@pytest.mark.parametrize("run", [run_dot, run_drift])
def test_grids_and_schedules_do_not_change_a_bit(emulated, run):
    batch = a_mixed_batch()
    expected = run(emulated, batch)
    for blocks in (1, 3, 7):
        np.testing.assert_array_equal(run(emulated, batch, blocks=blocks), expected)
    for schedule in range(1, 21):
        np.testing.assert_array_equal(run(emulated, batch, schedule=schedule), expected)


@pytest.mark.parametrize("run", [run_dot, run_drift])
def test_what_the_workspace_held_is_of_no_account(emulated, run):
    batch = a_mixed_batch()
    np.testing.assert_array_equal(run(emulated, batch, fill=0), run(emulated, batch))


def test_a_layer_does_not_notice_its_company(emulated):
    weight = random_weight((70, 64), torch.bfloat16, 0)
    values, scales = a_gradient(batch_of([weight]))
    alone = run_dot(emulated, batch_of([weight]))
    # An odd number of elements before it: its part of G is no longer aligned.
    company = batch_of([random_weight((3, 5), torch.float32, 1), weight])
    plan = emulated.DotPlan(company.descriptors(), 2)
    values = torch.cat([torch.ones(15, dtype=torch.int8), values])
    scales = torch.cat([torch.ones(3), scales])
    together = launch(emulated, plan, 2, values=values, scales=scales)
    np.testing.assert_array_equal(together[1], alone[0])


def test_one_launch_reads_every_weight_once(emulated):
    batch = a_mixed_batch()
    launches, before = emulated.launch_count(), emulated.weight_bytes()
    run_dot(emulated, batch)
    assert emulated.launch_count() - launches == 1
    weights = sum(w.numel() * w.element_size() for w in batch.tensors())
    assert emulated.weight_bytes() - before == weights

    kept, _ = kept_rows(batch)
    every = torch.cat(
        [torch.full((w.shape[0],), w.shape[1] * w.element_size()) for w in batch.tensors()]
    )
    before = emulated.weight_bytes()
    run_drift(emulated, batch)
    assert emulated.weight_bytes() - before == int(every[kept].sum())


def test_a_layer_without_kept_rows_has_not_moved(emulated):
    batch = batch_of([random_weight((4, 3), torch.float32, i) for i in range(3)])
    plan = emulated.DriftPlan(batch.descriptors(), 3, [5])
    found = launch(emulated, plan, 3, values=torch.zeros(3))
    np.testing.assert_array_equal(found[[0, 2]], 0)
    square = float(batch.tensors()[1][1].double().square().sum())
    np.testing.assert_allclose(found[1], [square, 0, 0], rtol=TOLERANCE)
    nothing = emulated.DriftPlan(batch.descriptors(), 3, [])
    np.testing.assert_array_equal(launch(emulated, nothing, 3, values=torch.zeros(1)), 0)


@pytest.mark.parametrize("rows", [[2, 1], [1, 1], [-1], [0, 12]], ids=str)
def test_rows_that_do_not_ascend_within_the_batch_are_refused(emulated, rows):
    batch = batch_of([random_weight((4, 3), torch.float32, i) for i in range(3)])
    with pytest.raises(ValueError, match="kept row"):
        emulated.DriftPlan(batch.descriptors(), 3, rows)


def test_more_blocks_than_fit_are_refused(emulated):
    plan = emulated.DotPlan(batch_of([torch.ones(3, 3)]).descriptors(), 1)
    with pytest.raises(ValueError, match="1 to 3 blocks .* asked for 4"):
        plan.launch(values=0, scales=0, workspace=0, results=0, blocks=4)
