"""The Triton backend in the interpreter: products, Lanczos runs and sums against the reference."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from tbfast.backends import native, reference, triton_launch, triton_plan, triton_spectra
from tbfast.backends import triton as backend
from tbfast.backends.philox import Purpose, signs
from tbfast.batch import Batch
from tbfast.fitting import FitOptions

pytestmark = pytest.mark.skipif(
    not triton_launch.INTERPRETED, reason="these tests run Triton's interpreter on the CPU"
)

DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
]
# Sums of float32 numbers; for bfloat16, vectors are cut into two parts of 8 bits each, which the
# interpreter truncates: 2^-15 at worst.
APPLY_TOLERANCE = dict.fromkeys(DTYPES, 1e-6) | {torch.bfloat16: 3e-5}
# Relative to the norm: the same, over the first steps, where rounding is not yet amplified.
EARLY_STEPS = 3
EARLY_TOLERANCE = dict.fromkeys(DTYPES, 2e-6) | {torch.bfloat16: 6e-5}
# The bar for alpha on the same probes.
ALPHA_TOLERANCE = 1e-4
# The interpreter computes with NumPy, which warns of what a GPU does in silence.
OVERFLOWS = "ignore:.* encountered in:RuntimeWarning"
# Float64 sums in another order.
SUM_TOLERANCE = 1e-13


def matrix(rows, cols, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn((rows, cols), generator=generator, dtype=wide).to(dtype)


def ragged(dtype):
    """1 x n, odd, aligned by rows and by columns, wide, strided, and a slice of a larger one."""
    large = matrix(60, 90, dtype, 1)
    large[40:], large[:, 70:] = float("nan"), float("nan")  # what lies around must not be touched
    return [
        matrix(1, 1, dtype),
        matrix(1, 9, dtype),
        matrix(9, 1, dtype),
        matrix(17, 5, dtype),
        matrix(136, 64, dtype),  # more than one panel, read by rows
        matrix(64, 136, dtype),  # read by columns
        matrix(64, 136, dtype).T,
        matrix(130, 57, dtype),
        large[:40, 3:70],
        matrix(40, 90, dtype, 2)[::2, ::3],
    ]


def length(weight):
    return min(weight.shape) * (2 if weight.is_complex() else 1)


def with_grid(monkeypatch, programs):
    monkeypatch.setattr(triton_launch, "programs", lambda device: programs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gram_apply_is_the_product_for_every_layout(dtype):
    weights = ragged(dtype)
    batch = Batch(weights)
    x = [matrix(3, length(w), seed=3)[None] for w in weights]
    found = backend.gram_apply(batch, x)
    for y, expected in zip(found, reference.gram_apply(batch, x), strict=True):
        assert y.dtype == torch.float32
        error = (y.double() - expected).norm() / expected.norm()
        assert error <= APPLY_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lanczos_agrees_with_the_reference_while_rounding_does_not_matter(dtype):
    weights = ragged(dtype)
    batch = Batch(weights)
    found = backend.lanczos(batch, 3, EARLY_STEPS, seed=(5 << 32) + 2**31, draw=2)
    expected = reference.lanczos(batch, 3, EARLY_STEPS, seed=(5 << 32) + 2**31, draw=2)
    for field in ("count", "first", "taken"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))
    norm = expected.diagonal.max(axis=(1, 2), keepdims=True)
    for name, fewer in (("diagonal", 0), ("off_diagonal", 1)):
        used = np.arange(EARLY_STEPS) < expected.taken[..., None] - fewer
        error = np.abs(getattr(found, name) - getattr(expected, name)) / norm * used
        assert error.max() <= EARLY_TOLERANCE[dtype]


def test_signs_are_the_bits_of_every_other_backend():
    # The vectors that the first phase wrote, before they are projected on anything.
    seed, draw, probes, n = (7 << 32) + 2**31 + 5, 3, 40, 33
    weight = torch.eye(n)
    batch = Batch({"some.name": weight})
    plan = triton_spectra._plan(batch, probes, 1)
    backend.lanczos(batch, probes, 1, seed=seed, draw=draw)
    expected = signs(seed, batch.keys[0], Purpose.PROBE, draw, 0, n, probes)
    for part, _, _ in plan.rounds:
        for entry in part.table:
            first, wanted, place = (int(entry[c]) for c in (10, 11, 12))
            group = triton_spectra.GROUPS["cuda"]
            drawn = plan.vectors[place : place + n * group].view(n, group)[:, :wanted]
            np.testing.assert_array_equal(
                np.sign(drawn.numpy()), expected[:, first : first + wanted]
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_alpha_is_that_of_native_on_the_same_probes(dtype):
    weights = [matrix(96, 48, dtype), matrix(40, 104, dtype, 1)]
    batch = Batch(weights)
    options = FitOptions("median")
    runs = [b.lanczos(batch, 4, 12, seed=1) for b in (backend, native)]
    alpha = [native.quadrature_fit(r, options).fits.alpha for r in runs]
    np.testing.assert_allclose(alpha[0], alpha[1], rtol=ALPHA_TOLERANCE)


def test_any_grid_gives_the_same_bits(monkeypatch):
    # Several slices of each matrix, more items than programs and the reverse.
    monkeypatch.setattr(triton_plan, "_SLICE", 1 << 11)
    weights = [matrix(300, 20), matrix(9, 400, torch.bfloat16), matrix(7, 5, torch.complex64)]
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-9, 9, (6000 + 3600 + 70,), generator=generator, dtype=torch.int8)
    scales = torch.rand(300 + 9 + 7, generator=generator)
    kept = torch.arange(0, 316, 13)
    results = []
    for programs in (1, 3, 50):
        with_grid(monkeypatch, programs)
        batch = Batch(weights)
        runs = backend.lanczos(batch, 2, 4)
        sums = backend.dot(batch, values, scales)
        widths = torch.tensor([20] * 300 + [400] * 9 + [10] * 7)[kept]
        moved = backend.drift(batch, kept, torch.ones(int(widths.sum())))
        results.append([runs.diagonal, runs.off_diagonal, *sums, *moved])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


def test_a_layer_has_the_same_bits_in_any_company_and_in_rounds(monkeypatch):
    weights = {"a": matrix(30, 20), "b": matrix(50, 12), "c": matrix(9, 31)}
    together = backend.lanczos(Batch(weights), 2, 3)
    alone = backend.lanczos(Batch({"b": weights["b"]}), 2, 3)
    np.testing.assert_array_equal(alone.diagonal[0], together.diagonal[1])
    monkeypatch.setattr(triton_plan, "_ROUND", 1)
    batch = Batch(weights)
    in_turn = backend.lanczos(batch, 2, 3)
    assert len(triton_spectra._plan(batch, 2, 3).rounds) == 3
    np.testing.assert_array_equal(in_turn.diagonal, together.diagonal)


def test_results_do_not_depend_on_what_memory_held():
    weights = [matrix(30, 20), matrix(7, 9, torch.complex64)]
    batch = Batch(weights)
    before = backend.lanczos(batch, 3, 4)
    plan = triton_spectra._plan(batch, 3, 4)
    for buffer in (plan.vectors, plan.tops, plan.state, plan.products):
        buffer.fill_(float("nan"))
    for buffer in (plan.going, plan.exponents, plan.flagged):
        buffer.fill_(-1)
    after = backend.lanczos(batch, 3, 4)
    np.testing.assert_array_equal(before.diagonal, after.diagonal)
    np.testing.assert_array_equal(before.off_diagonal, after.off_diagonal)


@pytest.mark.filterwarnings(OVERFLOWS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_spoils_its_own_layer_only(bad):
    for dtype in (torch.float16, torch.complex64):
        weights = [matrix(20, 16, dtype, s) for s in range(3)]
        expected = backend.lanczos(Batch(weights), 2, 3).diagonal
        weights[1][3, 4] = bad
        found = backend.lanczos(Batch(weights), 2, 3)
        assert np.isnan(found.diagonal[1, :, 0]).all()
        np.testing.assert_array_equal(found.taken[1], 1)
        np.testing.assert_array_equal(found.diagonal[[0, 2]], expected[[0, 2]])


@pytest.mark.filterwarnings(OVERFLOWS)
@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [(torch.float32, 120), (torch.float32, -130), (torch.bfloat16, 100), (torch.float64, 400)],
    ids=str,
)
def test_lanczos_is_scale_invariant_from_one_end_of_a_type_to_the_other(dtype, exponent):
    weight = matrix(24, 16, dtype)
    plain = backend.lanczos(Batch([weight]), 2, 3)
    moved = weight * 2.0**exponent
    scaled = backend.lanczos(Batch([moved]), 2, 3)
    factor = 2.0 ** (2 * exponent)
    # Numbers below 2^-126 have lost bits before we see them.
    tolerance = 1e-3 if exponent == -130 else EARLY_TOLERANCE[dtype]
    np.testing.assert_allclose(scaled.diagonal / factor, plain.diagonal, rtol=tolerance)


def test_a_run_ends_where_its_subspace_is_invariant():
    weight = torch.diag(torch.tensor([2.0, 1.0] * 12))
    zero = torch.zeros(6, 6)
    found = backend.lanczos(Batch([weight, zero]), 3, 8)
    np.testing.assert_array_equal(found.taken[0], 2)
    np.testing.assert_array_equal(found.taken[1], 1)
    np.testing.assert_array_equal(found.diagonal[1, :, 0], 0)


def test_given_start_vectors_are_used():
    weights = [matrix(20, 12), matrix(6, 9, torch.complex64)]
    batch = Batch(weights)
    starts = [matrix(2, length(w), seed=8)[None] for w in weights]
    found = backend.lanczos(batch, starts, 3)
    expected = reference.lanczos(batch, starts, 3)
    norm = expected.diagonal.max(axis=(1, 2), keepdims=True)
    assert (np.abs(found.diagonal - expected.diagonal) / norm).max() <= EARLY_TOLERANCE[
        torch.float32
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_agree_with_the_reference_for_every_layout(dtype):
    weights = ragged(dtype)
    batch = Batch(weights)
    generator = torch.Generator().manual_seed(0)
    stacks = batch.stacks()
    widths = [s.shape[2] * (2 if s.is_complex() else 1) for s in stacks for _ in range(s.shape[1])]
    values = torch.randint(-127, 128, (sum(widths),), generator=generator, dtype=torch.int8)
    scales = torch.rand(len(widths), generator=generator)
    found, expected = (b.dot(batch, values, scales) for b in (backend, reference))
    np.testing.assert_allclose(found[1], expected[1], rtol=SUM_TOLERANCE)
    bound = 127 * np.sqrt([s.numel() for s in stacks]) * np.sqrt(expected[1])
    assert (np.abs(found[0] - expected[0]) <= SUM_TOLERANCE * bound).all()
    rows = torch.arange(0, len(widths), 11)
    kept = torch.randn(sum(widths[r] for r in rows.tolist()), generator=generator)
    moved, along, size = backend.drift(batch, rows, kept)
    expected = reference.drift(batch, rows, kept)
    np.testing.assert_allclose(moved, expected[0], rtol=SUM_TOLERANCE)
    np.testing.assert_allclose(size, expected[2], rtol=SUM_TOLERANCE)
    # <W - W_0, W_0> may cancel: relative to the norms.
    bound = np.sqrt(expected[0] * expected[2])
    assert (np.abs(along - expected[1]) <= SUM_TOLERANCE * bound).all()


def test_bad_arguments_are_refused():
    weights = [matrix(4, 3), matrix(5, 3)]
    batch = Batch(weights)
    with pytest.raises(ValueError, match="same number of vectors"):
        backend.gram_apply(batch, [torch.ones(1, 2, 3), torch.ones(1, 3, 3)])
    with pytest.raises(ValueError, match=r"values must have 27 elements, got shape \(5,\)"):
        backend.dot(batch, torch.ones(5, dtype=torch.int8), torch.ones(9))
    with pytest.raises(ValueError, match=r"scales must have 9 elements, got shape \(2,\)"):
        backend.dot(batch, torch.ones(27, dtype=torch.int8), torch.ones(2))
    with pytest.raises(ValueError, match="rows must be ascending, from 0 to 8"):
        backend.drift(batch, torch.tensor([9]), torch.ones(3))


def test_weights_on_the_cpu_are_refused_by_name_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    weight = matrix(4, 3)
    batch = Batch({"fc1.weight": weight})
    message = "backend='triton' needs a CUDA device, but 'fc1.weight' is on cpu; use backend='nat"
    with pytest.raises((TypeError, ValueError), match=message):
        backend.lanczos(batch, 1, 1)


def test_a_refresh_is_one_cooperative_launch_and_falls_back_to_one_per_phase(monkeypatch):
    launches = []

    class Kernel:
        def __init__(self, refuses):
            self.refuses = refuses

        def __getitem__(self, grid):
            def launch(begin, end, counter, *_, launch_cooperative_grid=False, **constants):
                if launch_cooperative_grid and self.refuses:
                    raise RuntimeError("Triton Error [CUDA]: operation not supported")
                launches.append((begin, end, counter is not None, launch_cooperative_grid))

            return launch

    device = torch.device("cuda", 0)
    monkeypatch.setattr(triton_launch, "programs", lambda device: 132)
    monkeypatch.setattr(triton_launch, "_counters", {device: torch.zeros(1, dtype=torch.int32)})
    monkeypatch.setattr(triton_launch, "_refused", set())
    guarded = []
    monkeypatch.setattr(triton_launch, "_guard", lambda on: guarded.append(on) or nullcontext())
    triton_launch.launch_phases(Kernel(refuses=False), 5, device)
    assert launches == [(0, 5, True, True)]
    launches.clear()
    for _ in range(2):
        triton_launch.launch_phases(Kernel(refuses=True), 2, device)
    assert launches == [(0, 1, False, False), (1, 2, False, False)] * 2
    assert guarded == [device] * 3
