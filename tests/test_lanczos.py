"""gram_apply and lanczos: against LAPACK, the reference, and themselves run differently."""

import numpy as np
import pytest
import torch

from tbfast import _native
from tbfast.backends import native, reference_lanczos
from tbfast.batch import Batch

# Sums of float32 products: eps32 times the root of the longest sum (1e3 terms here), with a margin.
APPLY_TOLERANCE = 1e-5
# Entries of a Jacobi matrix beside its norm. Once a Ritz value has converged the rest of a run
# depends on rounding, so runs are compared only for as long as none has: 8 steps.
EARLY_STEPS, EARLY_TOLERANCE = 8, 1e-4

DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
]
# 1 x n, odd, off by one from a tile, more than one panel and more than one slice of 2^20 entries.
SHAPES = [(1, 1), (1, 9), (9, 1), (17, 5), (5, 17), (64, 64), (130, 257), (257, 130), (3, 4099)]


def random_matrix(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=generator, dtype=wide).to(dtype)


def every_layout(shape, dtype):
    """The same kind of matrix by rows, by columns, as a slice of a larger one, and strided."""
    rows, cols = shape
    large = random_matrix((2 * rows, 3 * cols + 1), dtype, 1)
    large[rows:] = float("nan")  # what lies around a slice must not be touched
    large[:, 2 * cols :] = float("nan")
    strided = random_matrix((2 * rows, 3 * cols), dtype, 2)
    return [
        random_matrix(shape, dtype),
        random_matrix((cols, rows), dtype).T,
        large[:rows, cols : 2 * cols],
        strided[::2, ::3],
    ]


def length(matrix):
    return min(matrix.shape) * (2 if matrix.is_complex() else 1)


def product(matrix, x):
    """WᴴW x (WWᴴ x of a wide matrix) in complex128, from the definition."""
    w = matrix.to(torch.complex128)
    gram = w.mH @ w if w.shape[0] >= w.shape[1] else w @ w.mH
    if not matrix.is_complex():
        return (gram.real @ x.double().T).T
    z = torch.view_as_complex(x.double().unflatten(1, (-1, 2)).contiguous())
    return torch.view_as_real((gram @ z.T).T.contiguous()).flatten(1)


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gram_apply_is_the_product_for_every_dtype_layout_and_isa(dtype, isa, monkeypatch):
    monkeypatch.setenv("TBFAST_ISA", isa)
    matrices = [m for shape in SHAPES for m in every_layout(shape, dtype)]
    batch = Batch(matrices)
    for vectors in (1, 4, 6):
        x = [random_matrix((1, vectors, length(m)), torch.float32, 3) for m in matrices]
        found = native.gram_apply(batch, x)
        plain = reference_lanczos.gram_apply(batch, x)
        for matrix, start, y, r in zip(matrices, x, found, plain, strict=True):
            expected = product(matrix, start[0])
            scale = float(expected.norm())
            assert float((r[0] - expected).norm()) <= 1e-12 * scale
            assert float((y[0].double() - expected).norm()) <= APPLY_TOLERANCE * scale


def test_gram_apply_reads_more_than_one_slice_and_panel():
    matrices = [random_matrix(s, torch.float32) for s in [(5000, 300), (300, 5000), (2047, 1025)]]
    x = [random_matrix((1, 4, length(m)), torch.float32, 3) for m in matrices]
    for matrix, start, y in zip(matrices, x, native.gram_apply(Batch(matrices), x), strict=True):
        expected = product(matrix, start[0])
        assert float((y[0].double() - expected).norm()) <= APPLY_TOLERANCE * float(expected.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lanczos_agrees_with_the_reference_while_rounding_does_not_matter(dtype):
    # float16 holds 1.0 and its powers of two; entries of order 1 lose nothing that matters here.
    matrices = [m for shape in SHAPES[5:] for m in every_layout(shape, dtype)]
    batch = Batch(matrices)
    found = native.lanczos(batch, 3, EARLY_STEPS, seed=5, draw=2)
    expected = reference_lanczos.lanczos(batch, 3, EARLY_STEPS, seed=5, draw=2)
    np.testing.assert_array_equal(found.count, expected.count)
    np.testing.assert_array_equal(found.first, expected.first)
    np.testing.assert_array_equal(found.taken, expected.taken)
    norm = expected.diagonal.max(axis=(1, 2), keepdims=True)
    used = np.arange(EARLY_STEPS) < expected.taken[..., None]
    error = np.abs(found.diagonal - expected.diagonal) / norm * used
    assert error.max() <= EARLY_TOLERANCE
    used = np.arange(EARLY_STEPS) < expected.taken[..., None] - 1
    error = np.abs(found.off_diagonal - expected.off_diagonal) / norm * used
    assert error.max() <= EARLY_TOLERANCE


@pytest.mark.parametrize("isa", _native.isas())
def test_a_complete_run_has_the_eigenvalues_of_the_matrix(isa, monkeypatch):
    monkeypatch.setenv("TBFAST_ISA", isa)
    singular = np.geomspace(1, 30, 12)
    u, v = (np.linalg.qr(np.random.default_rng(i).standard_normal((40, 12)))[0] for i in (0, 1))
    matrix = torch.from_numpy(u * singular @ v[:12].T).float()
    runs = native.lanczos(Batch([matrix]), 2, 12)
    for probe in range(2):
        a, b = runs.diagonal[0, probe], runs.off_diagonal[0, probe, :-1]
        values = np.linalg.eigvalsh(np.diag(a) + np.diag(b, 1) + np.diag(b, -1))
        exact = np.linalg.svd(matrix.double().numpy(), compute_uv=False)[::-1] ** 2
        # float32 products: eps32 of the norm, 900, times a small factor.
        np.testing.assert_allclose(values, exact, atol=2e-6 * 900)


def test_a_run_ends_where_its_subspace_is_invariant():
    orthogonal = torch.linalg.qr(random_matrix((50, 50), torch.float64)).Q.float()
    rank_two = random_matrix((60, 2), torch.float32) @ random_matrix((2, 40), torch.float32)
    zero, single = torch.zeros(20, 30), torch.full((1, 7), 2.0)
    runs = native.lanczos(Batch([orthogonal, rank_two, zero, single]), 3, 20)
    assert runs.taken[0].tolist() == [1, 1, 1]
    assert set(runs.taken[1].tolist()) == {3}  # the two, and the zeros
    assert runs.taken[2].tolist() == [1, 1, 1]
    assert np.all(runs.diagonal[2, :, 0] == 0)
    assert runs.taken[3].tolist() == [1, 1, 1]
    np.testing.assert_allclose(runs.diagonal[0, :, 0], 1, rtol=1e-5)  # eps32 * sqrt(50)
    np.testing.assert_allclose(runs.diagonal[3, :, 0], 28, rtol=1e-6)


def test_a_complex_matrix_shows_each_eigenvalue_once():
    # In real coordinates each comes twice; a ghost of the largest would show within 30 steps.
    u, v = (torch.linalg.qr(random_matrix((60, 60), torch.complex128, i)).Q for i in (0, 1))
    singular = torch.logspace(0, -2, 60, dtype=torch.float64)
    matrix = (u * singular @ v.mH).to(torch.complex64)
    runs = native.lanczos(Batch([matrix]), 3, 30)
    exact = np.sort(singular.numpy() ** 2)[::-1]
    for a, b in zip(runs.diagonal[0], runs.off_diagonal[0], strict=True):
        b = b[:29]
        ritz = np.linalg.eigvalsh(np.diag(a) + np.diag(b, 1) + np.diag(b, -1))[::-1]
        np.testing.assert_allclose(ritz[:8], exact[:8], atol=1e-5)  # float32, norm 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_that_is_not_finite_is_nan_and_leaves_the_others_alone(dtype, bad):
    good = random_matrix((70, 50), dtype)
    broken = random_matrix((50, 70), dtype)
    broken[-1, -1] = bad
    alone = native.lanczos(Batch({"good": good}), 4, 10)
    runs = native.lanczos(Batch({"good": good, "broken": broken}), 4, 10)
    np.testing.assert_array_equal(runs.diagonal[0], alone.diagonal[0])
    assert np.all(np.isnan(runs.diagonal[1, :, 0]))
    assert np.all(runs.taken[1] == 1)


@pytest.mark.parametrize("exponent", [-140, -60, -30, 30, 60, 120])
def test_lanczos_is_scale_invariant_from_one_end_of_a_type_to_the_other(exponent):
    for dtype in (torch.float32, torch.float64, torch.complex64):
        if dtype != torch.float64 and abs(exponent) > 30:
            exponent = 30 if exponent > 0 else -30
        matrix = random_matrix((90, 60), dtype)
        factor = 2.0 ** (exponent * 3)  # a power of two changes no digit
        scaled = matrix * factor
        plain, shifted = (native.lanczos(Batch({"w": m}), 4, 15) for m in (matrix, scaled))
        np.testing.assert_array_equal(shifted.taken, plain.taken)
        found = shifted.diagonal / factor / factor
        # Conversion or not, the sums run in another order: eps32 of the norm.
        atol = 2e-5 * plain.diagonal.max()
        np.testing.assert_allclose(found[..., :8], plain.diagonal[..., :8], rtol=0, atol=atol)


def test_threads_order_and_company_do_not_change_a_bit(monkeypatch):
    shapes = [(96, 64), (300, 300), (64, 500), (8, 8), (2100, 1100), (1, 5), (1100, 2100)]
    matrices = {f"layer{i}": random_matrix(s, torch.float32, i) for i, s in enumerate(shapes)}
    runs = []
    for threads in ("1", "2", "4"):
        monkeypatch.setenv("TBFAST_NUM_THREADS", threads)
        runs.append(native.lanczos(Batch(matrices), 5, 12, seed=3, draw=1))
    backwards = native.lanczos(Batch(dict(reversed(matrices.items()))), 5, 12, seed=3, draw=1)
    for other in runs[1:]:
        np.testing.assert_array_equal(other.diagonal, runs[0].diagonal)
        np.testing.assert_array_equal(other.off_diagonal, runs[0].off_diagonal)
    np.testing.assert_array_equal(backwards.diagonal[::-1], runs[0].diagonal)
    for row, (name, matrix) in enumerate(matrices.items()):
        alone = native.lanczos(Batch({name: matrix}), 5, 12, seed=3, draw=1)
        np.testing.assert_array_equal(alone.diagonal[0], runs[0].diagonal[row])


def test_seed_draw_and_name_choose_the_probes_and_more_probes_keep_the_first():
    matrix = random_matrix((40, 30), torch.float32)
    run = lambda probes=4, name="w", **key: (  # noqa: E731
        native.lanczos(Batch({name: matrix}), probes, 5, **key).diagonal
    )
    first = run()
    np.testing.assert_array_equal(run(), first)
    np.testing.assert_array_equal(run(200)[:, :4], first)
    for other in (run(seed=1), run(seed=2**40), run(draw=1), run(name="v")):
        assert not np.array_equal(other, first)


def test_given_start_vectors_are_used():
    matrix = random_matrix((40, 30), torch.float64)
    vectors = torch.linalg.eigh(matrix.T @ matrix).eigenvectors.T[None, :4].float()
    runs = native.lanczos(Batch([matrix]), [vectors], 10)
    expected = torch.linalg.svdvals(matrix).square().flip(0)[:4]
    # An eigenvector in float32 is one to 1e-7: the first entry is its eigenvalue, to eps32 of the
    # norm.
    atol = 2e-6 * float(torch.linalg.matrix_norm(matrix, 2)) ** 2
    np.testing.assert_allclose(runs.diagonal[0, :, 0], expected.numpy(), atol=atol)


def test_bad_arguments_are_refused():
    matrix = torch.ones(3, 4)
    batch = Batch([matrix])
    for bad in (dict(probes=0), dict(probes=9000), dict(steps=0), dict(draw=1 << 24)):
        with pytest.raises(ValueError, match="probes must be 1 to 8192, steps 1 or more, draw"):
            native.lanczos(batch, **{"probes": 2, "steps": 3, **bad})
    with pytest.raises(ValueError, match="starts must hold"):
        native.lanczos(batch, [torch.ones(1, 2, 4)], 3)
    with pytest.raises(ValueError, match="same number of vectors"):
        native.gram_apply(Batch([matrix] * 2), [torch.ones(1, 1, 3), torch.ones(1, 2, 3)])


def test_memory_kept_between_runs_does_not_grow():
    matrices = [random_matrix((300, 200), torch.bfloat16) for _ in range(6)]
    batch = Batch(matrices)
    native.lanczos(batch, 8, 20)
    used = _native.workspace_bytes(batch.table())
    # At most a set for each thread: basis and result, and one panel of 16 rows with its sums.
    each = 4 * (208 * 8 * 21 + 16 * (208 + 2 * (4 + 64))) + 8 * 8 * 20
    assert 0 < used <= _native.num_threads() * each
    native.lanczos(batch, 8, 20)
    assert _native.workspace_bytes(batch.table()) <= _native.num_threads() * each
