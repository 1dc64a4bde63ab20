"""Every verb of every backend against the reference, and the same bits however it is run."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import tbfast
from tbfast import _native
from tbfast.backends import exact, get_backend, native, reference
from tbfast.batch import Batch
from tbfast.fitting import FIT_KINDS, FitOptions

# Both in float64; the vector exponential is good to 1e-15 and a distance is at most 1.
KS_TOLERANCE = 1e-13
# Across instruction sets only fused multiply-adds differ.
ISA_TOLERANCE = 1e-12

DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
]
SHAPES = [(1, 1, 1), (1, 1, 9), (1, 9, 1), (3, 17, 5), (2, 5, 17), (1, 64, 64), (1, 300, 257)]


def random_stack(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=generator, dtype=wide).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_eigenvalues_agree_with_the_reference(shape, dtype):
    stack = random_stack(shape, dtype)
    copy = stack.clone()
    [found] = native.eigenvalues([stack])
    [expected] = reference.eigenvalues([stack])
    assert found.dtype == torch.float64
    # The tolerance that exact.py promises for every eigenvalue (precision.FULL_TOLERANCE).
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(stack, copy, rtol=0, atol=0)


@pytest.mark.parametrize("kind", FIT_KINDS)
def test_native_fit_agrees_with_the_reference_on_ragged_spectra(kind):
    rng = np.random.default_rng(0)
    spectra = [np.sort(rng.lognormal(0, s, n)) for n, s in [(1, 1), (2, 1), (33, 1), (500, 2)]]
    spectra += [np.empty(0), np.full(40, 3.0), np.array([1.0, np.nan])]
    options = FitOptions(kind, k=30)
    found, expected = native.fit(spectra, options), reference.fit(spectra, options)
    np.testing.assert_array_equal(found.reason, expected.reason)
    np.testing.assert_array_equal(found.start, expected.start)
    np.testing.assert_array_equal(found.n_tail, expected.n_tail)
    np.testing.assert_array_equal(found.xmin, expected.xmin)
    np.testing.assert_allclose(found.alpha, expected.alpha, rtol=1e-10)
    np.testing.assert_allclose(found.ks, expected.ks, atol=KS_TOLERANCE)


def test_ks_distance_holds_over_the_whole_range_of_exponents():
    # Tails over 250 decades reach the end of the vector exponential's range.
    values = np.logspace(-250, 5, 1000)
    for kind in ("median", "ks"):
        found, expected = (b.fit([values], FitOptions(kind)) for b in (native, reference))
        np.testing.assert_allclose(found.ks, expected.ks, atol=KS_TOLERANCE)


@pytest.mark.parametrize("isa", _native.isas())
def test_every_instruction_set_gives_the_same_fit(isa, monkeypatch):
    rng = np.random.default_rng(1)
    spectra = [np.sort(rng.pareto(1.5, n) + 1) for n in (31, 32, 33, 1000)]
    monkeypatch.setenv("TBFAST_ISA", isa)
    assert _native.isa() == isa
    found, expected = (b.fit(spectra, FitOptions("ks")) for b in (native, reference))
    np.testing.assert_array_equal(found.start, expected.start)
    np.testing.assert_allclose(found.alpha, expected.alpha, rtol=ISA_TOLERANCE)


def test_unknown_instruction_set_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("TBFAST_ISA", "mmx")
    with pytest.raises(ValueError, match="TBFAST_ISA must be one of auto, scalar.* got 'mmx'"):
        _native.isa()


@pytest.mark.parametrize("text", ["0", "-1", "two", "1e3"])
def test_bad_thread_count_is_refused_by_name(text, monkeypatch):
    monkeypatch.setenv("TBFAST_NUM_THREADS", text)
    with pytest.raises(ValueError, match=f"TBFAST_NUM_THREADS .* got '{text}'"):
        _native.num_threads()


def test_threads_order_and_company_do_not_change_a_bit(monkeypatch):
    shapes = [(1, 96, 64), (9, 32, 24), (1, 300, 300), (1, 64, 500), (4, 8, 8)]
    stacks = [random_stack(s, torch.float32, i) for i, s in enumerate(shapes)]
    shares = [0.5, 1.0, 0.5, 0.5, 1.0]
    runs = []
    for threads in ("1", "2", "4"):
        monkeypatch.setenv("TBFAST_NUM_THREADS", threads)
        spectra = native.eigenvalues(stacks, shares)
        fits = native.fit([s.numpy() for s in spectra], FitOptions("ks"))
        runs.append((spectra, fits.alpha))
    backwards = native.eigenvalues(stacks[::-1], shares[::-1])[::-1]
    alone = [native.eigenvalues([s], [share])[0] for s, share in zip(stacks, shares, strict=True)]
    for spectra, alpha in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(spectra, runs[0][0], strict=True))
        np.testing.assert_array_equal(alpha, runs[0][1])
    for again in (backwards, alone):
        assert all(torch.equal(a, b) for a, b in zip(again, runs[0][0], strict=True))


def test_torch_keeps_its_threads_beside_the_pool():
    code = """
import threading, torch
torch.set_num_threads(3)
from tbfast import eigenvalues
eigenvalues([torch.randn(40, 40) for _ in range(5)])
from tbfast.backends.threads import parallel_map
workers = parallel_map(lambda _: torch.get_num_threads(), range(8), lambda _: 1.0)
assert set(workers) == {1}, workers
seen = []
thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
thread.start(); thread.join()
print(torch.get_num_threads(), *seen)
"""
    env = {**os.environ, "TBFAST_NUM_THREADS": "2"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
    assert out.stdout.split() == [b"3", b"3"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_forked_child_measures_with_threads_of_its_own():
    code = """
import os, torch
from tbfast import eigenvalues
stacks = [torch.eye(30) * i for i in range(1, 5)]
eigenvalues(stacks)
child = os.fork()
if child == 0:
    os._exit(0 if float(eigenvalues(stacks)[3][0]) == 16 else 1)
raise SystemExit(os.waitpid(child, 0)[1])
"""
    # -W ignore: Python warns of any fork in a process with threads.
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_missing_backend_says_what_to_install(name, monkeypatch):
    # As where the extension has not been built, and where triton is not installed.
    missing = {"cuda": "tbfast._cuda", "triton": "triton"}[name]
    for loaded in [m for m in sys.modules if m.startswith(("tbfast.backends.cuda", missing))]:
        monkeypatch.delitem(sys.modules, loaded)
    for loaded in [m for m in sys.modules if m.startswith("tbfast.backends.triton")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.delattr(tbfast, "_cuda", raising=False)
    find_spec = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name)
    )
    with pytest.raises(RuntimeError, match=f"backend='{name}' is not available.*use backend="):
        get_backend(name)


def test_an_old_triton_is_refused_with_the_remedy(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.3.1+rocm")
    with pytest.raises(
        RuntimeError, match=r"needs Triton 3\.4 or newer, found 3\.3\.1\+rocm; update"
    ):
        get_backend("triton")


def test_unknown_backend_is_refused_and_the_environment_is_heard(monkeypatch):
    with pytest.raises(ValueError, match="backend must be one of auto, .* got 'mkl'"):
        get_backend("mkl")
    assert get_backend("auto") is native
    monkeypatch.setenv("TBFAST_BACKEND", "reference")
    assert get_backend("auto") is reference
    monkeypatch.setenv("TBFAST_BACKEND", "mkl")
    with pytest.raises(ValueError, match="got 'mkl'"):
        get_backend("auto")


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 2, 3, 15, 16, 17, 31, 32, 33, 65, 200])
def test_symmetric_eigenvalues_are_lapacks(n, dtype, isa, monkeypatch):
    monkeypatch.setenv("TBFAST_ISA", isa)
    rng = np.random.default_rng(n)
    matrices = np.stack(
        [
            (lambda w: w @ w.T)(rng.standard_normal((n, n))),
            (lambda w: w + w.T)(rng.standard_normal((n, n))),  # indefinite
            np.diag(rng.integers(0, 3, n).astype(float)),  # splits at once, with ties
            np.ones((n, n)),
            np.diag(10.0 ** -np.linspace(0, 12, n)) + 1e-14 * np.ones((n, n)),  # graded
        ]
    ).astype(dtype)
    upper_only = np.triu(matrices) + np.tril(np.full((n, n), np.nan, dtype), -1)
    found = _native.symmetric_eigenvalues(upper_only)
    # Backward stability: eps of the dtype times the norm, times a bound that grows with n as
    # LAPACK's does; the worst seen is 18, for the matrix of ones with n = 200 in float32.
    for values, matrix in zip(found, matrices.astype(np.float64), strict=True):
        scale = np.abs(matrix).sum(1).max() * np.finfo(dtype).eps
        np.testing.assert_allclose(
            values, np.linalg.eigvalsh(matrix), rtol=0, atol=(5 + n / 4) * scale
        )
        assert np.all(np.diff(values) >= 0)


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("n", [1, 2, 3, 4, 17, 24, 64])
def test_hermitian_eigenvalues_are_lapacks(n, isa, monkeypatch):
    monkeypatch.setenv("TBFAST_ISA", isa)
    rng = np.random.default_rng(n)
    noise = rng.standard_normal((2, n, n, 2)).view(complex)[..., 0]
    graded = 10.0 ** -np.linspace(0, 12, n)
    matrices = np.stack(
        [
            noise[0] @ noise[0].conj().T,
            noise[1] + noise[1].conj().T,  # indefinite
            np.diag(rng.integers(0, 3, n).astype(complex)),  # splits at once, with ties
            np.outer(noise[0, 0], noise[0, 0].conj()),  # of rank one
            noise[0] * np.sqrt(np.outer(graded, graded)) @ np.diag(graded**0.5),
            np.zeros((n, n), complex),
            1e-160 * noise[1] + np.eye(n),  # squares that underflow
            (noise[0] @ noise[0].T).real.astype(complex),
            noise[1] @ noise[1].conj().T,  # one more than fit into a vector of any kind
        ]
    )
    matrices = np.triu(matrices) + np.triu(matrices, 1).conj().swapaxes(1, 2)
    matrices[:, range(n), range(n)] = matrices[:, range(n), range(n)].real
    upper_only = np.triu(matrices) + np.tril(np.full((n, n), np.nan), -1)
    found = _native.hermitian_eigenvalues(upper_only)
    # Backward stability, as above.
    for values, matrix in zip(found, matrices, strict=True):
        scale = np.abs(matrix).sum(1).max() * np.finfo(np.float64).eps
        np.testing.assert_allclose(
            values, np.linalg.eigvalsh(matrix), rtol=0, atol=(5 + n / 4) * scale
        )
        assert np.all(np.diff(values) >= 0)
    # A matrix does not notice those that it is worked on with.
    for values, matrix in zip(found, upper_only, strict=True):
        np.testing.assert_array_equal(_native.hermitian_eigenvalues(matrix[None])[0], values)


def test_symmetric_eigenvalues_take_square_matrices_of_one_of_two_types():
    with pytest.raises(ValueError, match="shape .count, n, n."):
        _native.symmetric_eigenvalues(np.ones((2, 3, 4)))
    with pytest.raises(TypeError):
        _native.symmetric_eigenvalues(np.ones((1, 3, 3), dtype=np.int64))
    assert _native.symmetric_eigenvalues(np.ones((0, 3, 3))).shape == (0, 3)


def test_native_checks_the_shape_of_its_arguments():
    options = dict(kind=0, xmin_pos=2.0, smooth=0.0, k=2, bins=1, peak_compat=False)
    call = lambda offsets, **more: _native.fit(  # noqa: E731
        np.ones(4), np.array(offsets), **{**options, **more}, max_alpha=1e5, threads=1
    )
    for offsets in ([], [0, 3], [1, 4], [0, 5], [0, 3, 2, 4]):
        with pytest.raises(ValueError, match="offsets"):
            call(offsets)
    for bad in (dict(kind=4), dict(xmin_pos=1.0), dict(k=1), dict(bins=0)):
        with pytest.raises(ValueError, match="out of range"):
            call([0, 4], **bad)


def test_small_matrices_of_many_stacks_are_batched_and_given_back():
    stacks = [random_stack((count, 30, 20), torch.float32, count) for count in (300, 1, 7)]
    stacks.insert(1, random_stack((2, 20, 30), torch.float32))
    stacks[3][4, 5, 6] = float("nan")
    batches = exact._batches(stacks, range(4))
    assert len(batches) > 1
    assert sum(len(batch.owners) for batch in batches) == 310
    found = native.eigenvalues(stacks)
    for stack, values, expected in zip(stacks, found, reference.eigenvalues(stacks), strict=True):
        assert values.shape == (len(stack) * 20,)
        torch.testing.assert_close(values, expected, rtol=1e-6, atol=0, equal_nan=True)


# 1 x n, n x 1, odd, one more than a panel of any kernel, more rows than a slice of 256.
RAGGED = [(1, 9), (9, 1), (17, 5), (33, 40), (300, 24)]
# float32 sums; bfloat16 weights take vectors as two parts of 8 bits: 2^-15 of them may be lost.
PRODUCT_TOLERANCE = dict.fromkeys(DTYPES, 1e-6) | {torch.bfloat16: 3e-5}
# Over two steps, before rounding is amplified.
STEP_TOLERANCE = dict.fromkeys(DTYPES, 2e-6) | {torch.bfloat16: 6e-5}


@pytest.fixture(params=["native", "cuda", "triton"])
def engine(request):
    """Each fast backend: compiled for the CPU, on the emulator, in Triton's interpreter."""
    if request.param == "cuda":
        return request.getfixturevalue("cuda")
    if request.param == "triton":
        pytest.importorskip("triton")
    return get_backend(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_engine_gives_the_products_and_runs_of_the_reference(engine, dtype):
    weights = [random_stack((1, *shape), dtype)[0] for shape in RAGGED]
    batch = Batch(weights)
    starts = [
        random_stack((s.shape[0], 2, n), torch.float32)
        for s, n in zip(
            batch.stacks(),
            [min(shape) * (2 if dtype.is_complex else 1) for shape in RAGGED],
            strict=True,
        )
    ]
    pairs = zip(engine.gram_apply(batch, starts), reference.gram_apply(batch, starts), strict=True)
    for found, expected in pairs:
        assert (found.double() - expected).norm() <= PRODUCT_TOLERANCE[dtype] * expected.norm()
    runs, expected = (b.lanczos(batch, 3, 2, seed=9, draw=4) for b in (engine, reference))
    np.testing.assert_array_equal(runs.taken, expected.taken)
    scale = expected.diagonal.max(axis=(1, 2), keepdims=True)
    assert (np.abs(runs.diagonal - expected.diagonal) / scale).max() <= STEP_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_engine_gives_the_sums_and_factors_of_the_reference(engine, dtype):
    weights = [random_stack((1, *shape), dtype)[0] for shape in RAGGED]
    batch = Batch(weights)
    lines = torch.tensor([w.shape[1] * (2 if dtype.is_complex else 1) for w in weights])
    lines = torch.repeat_interleave(lines, torch.tensor([len(w) for w in weights]))
    values = torch.arange(int(lines.sum())).remainder(255).sub(127).to(torch.int8)
    scales = torch.linspace(0.5, 2, len(lines))
    rows = torch.arange(0, len(lines), 7)
    kept = torch.ones(int(lines[rows].sum()))
    for verb, given in (("dot", (values, scales)), ("drift", (rows, kept))):
        sums, expected = (getattr(b, verb)(batch, *given) for b in (engine, reference))
        # Of float64, in another order: relative to the largest, as terms may cancel.
        for found, right in zip(sums, expected, strict=True):
            np.testing.assert_allclose(found, right, rtol=0, atol=1e-12 * np.abs(expected).max())
    options = dict(oversample=2, power_iters=1, seed=5)
    weight = random_stack((1, 40, 24), dtype)[0]
    wide = Batch([weight])
    [(_, s, _, left)] = engine.rsvd(wide, 4, **options)
    [(_, expected, _, wanted)] = reference.rsvd(wide, 4, **options)
    precise = dtype in (torch.float64, torch.complex128)
    np.testing.assert_allclose(s, expected, rtol=1e-10 if precise else 1e-5)
    assert left == pytest.approx(wanted, rel=1e-10 if precise else 1e-5)


@pytest.mark.parametrize("kind", FIT_KINDS)
def test_every_engine_gives_the_fits_of_the_reference(engine, kind):
    rng = np.random.default_rng(0)
    spectra = [np.sort(rng.lognormal(0, s, n)) for n, s in [(1, 1), (2, 1), (33, 1), (70, 2)]]
    options = FitOptions(kind, k=20)
    found, expected = engine.fit(spectra, options), reference.fit(spectra, options)
    np.testing.assert_array_equal(found.start, expected.start)
    np.testing.assert_allclose(found.alpha, expected.alpha, rtol=1e-10)
    weights = [random_stack((1, 60, 40), torch.float64, seed)[0] for seed in range(2)]
    runs = reference.lanczos(Batch(weights), 2, 6)
    found, expected = (b.quadrature_fit(runs, options) for b in (engine, reference))
    # Eigensolvers in float64, on the same Jacobi matrices.
    np.testing.assert_allclose(found.fits.alpha, expected.fits.alpha, rtol=1e-8)
    np.testing.assert_allclose(found.sketch_error, expected.sketch_error, rtol=1e-6)


def test_every_engine_gives_the_eigenvalues_of_the_reference(engine):
    stacks = [random_stack((2, 20, 12), dtype) for dtype in (torch.float32, torch.complex128)]
    for found, expected in zip(
        engine.eigenvalues(stacks), reference.eigenvalues(stacks), strict=True
    ):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=0)
