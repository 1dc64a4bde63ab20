"""Lanczos tridiagonals to alpha: quadrature, estimated spectra, and a standard error that holds."""

import math

import numpy as np
import pytest
import scipy.linalg

from tbfast import _native
from tbfast.backends import native, reference, reference_slq
from tbfast.fitting import FIT_KINDS, FitOptions, Reason
from tbfast.tridiagonals import Tridiagonals

EPS32 = 2.0**-23
EPS64 = 2.0**-52
MEDIAN = FitOptions()


def lanczos(gram, starts, steps):
    """Jacobi matrices of each start (float64, orthogonalised twice) and the steps taken."""
    probes = len(starts)
    diagonal, off_diagonal = np.zeros((2, probes, steps))
    taken = np.zeros(probes, dtype=np.int32)
    size = np.linalg.norm(gram, 2)
    for p, start in enumerate(starts):
        basis = [start / np.linalg.norm(start)]
        for j in range(steps):
            w = gram @ basis[j]
            diagonal[p, j] = basis[j] @ w
            taken[p] = j + 1
            for _ in range(2):
                w = w - np.array(basis).T @ (np.array(basis) @ w)
            off_diagonal[p, j] = np.linalg.norm(w)
            if off_diagonal[p, j] <= 1e-10 * size or len(basis) == len(gram):
                break
            basis.append(w / off_diagonal[p, j])
    return diagonal, off_diagonal, taken


def run_layers(layers, starts, steps, eps=EPS64):
    """Tridiagonals of layers, each a list of Gram matrices; ``starts(n)`` gives (probes, n)."""
    grams = [gram for layer in layers for gram in layer]
    parts = [lanczos(gram, starts(len(gram)), steps) for gram in grams]
    diagonal, off_diagonal, taken = (np.stack(part) for part in zip(*parts, strict=True))
    return Tridiagonals(
        diagonal=diagonal,
        off_diagonal=off_diagonal,
        taken=taken,
        first=np.cumsum([0] + [len(layer) for layer in layers]),
        count=np.array([len(gram) for gram in grams]),
        eps=eps,
    )


def signs(probes, seed=0):
    rng = np.random.default_rng(seed)
    return lambda n: rng.choice([-1.0, 1.0], (probes, n))


def haar(n, rng):
    q, r = np.linalg.qr(rng.standard_normal((n, n)))
    return q * np.sign(np.diag(r))


def gram_of(values, rng):
    vectors = haar(len(values), rng)
    return (vectors * values) @ vectors.T


def gaussian_gram(n, ratio, rng):
    w = rng.standard_normal((int(ratio * n), n))
    return w.T @ w


def exact_alpha(gram, options=MEDIAN, zero=1e-10):
    values = np.linalg.eigvalsh(gram)
    return float(reference.fit([values[values > zero * values[-1]]], options).alpha[0])


@pytest.mark.parametrize("size", [1, 2, 3, 20, 60, 200])
@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
def test_gauss_nodes_and_weights_are_eigenvalues_and_squared_first_components(size, scale):
    rng = np.random.default_rng(size)
    diagonal, off_diagonal = rng.standard_normal(size), rng.uniform(0.1, 1, size - 1)
    nodes, weights = _native.gauss_quadrature(scale * diagonal, scale * off_diagonal)
    values, vectors = scipy.linalg.eigh_tridiagonal(diagonal, off_diagonal)
    # LAPACK and ours are both backward stable: some eps times the norm, here about 3.
    np.testing.assert_allclose(nodes / scale, values, atol=3e-14)
    # Squared components are as good as the gaps, which are above 1e-4 here.
    np.testing.assert_allclose(weights, vectors[0] ** 2, atol=1e-11)


def test_gauss_quadrature_copes_with_a_matrix_that_falls_apart():
    diagonal, off_diagonal = np.array([2.0, 1.0, 0.0, 0.0, 1.0]), np.array([1.0, 0.0, 0.0, 1.0])
    nodes, weights = _native.gauss_quadrature(diagonal, off_diagonal)
    block = np.linalg.eigh([[2.0, 1.0], [1.0, 1.0]])
    np.testing.assert_allclose(nodes @ weights, 2.0, rtol=1e-15)  # e_1' J e_1
    for value, vector in zip(block[0], block[1].T, strict=True):
        assert weights[np.isclose(nodes, value, rtol=1e-14)].sum() == pytest.approx(vector[0] ** 2)
    np.testing.assert_array_equal(_native.gauss_quadrature(np.zeros(3), np.zeros(2))[0], 0)


def test_gauss_quadrature_is_exact_on_polynomials_up_to_degree_2k_minus_1():
    rng = np.random.default_rng(1)
    values, k = rng.uniform(-1, 1, 80), 9
    start = rng.standard_normal(80)
    diagonal, off_diagonal, _ = lanczos(np.diag(values), start[None], k)
    nodes, weights = _native.gauss_quadrature(diagonal[0], off_diagonal[0, : k - 1])
    mass = start**2 / (start @ start)
    for degree in range(2 * k):
        # Values in [-1, 1]: every moment is a mean of numbers below 1.
        assert weights @ nodes**degree == pytest.approx(mass @ values**degree, abs=1e-13)
    assert abs(weights @ nodes ** (2 * k) - mass @ values ** (2 * k)) > 1e-8


def test_full_runs_from_equal_weights_give_the_alpha_of_the_spectrum():
    rng = np.random.default_rng(2)
    for values in (np.exp(rng.standard_normal(24)), np.arange(1.0, 25) ** 2):
        gram, vectors = np.diag(values), np.eye(24)
        runs = run_layers([[gram]], lambda n, v=vectors: np.ones((2, n)) @ v, 24)
        found = native.quadrature_fit(runs, MEDIAN)
        exact = exact_alpha(gram)
        # Every node is an eigenvalue of weight 1/24; what is left is the curve between them, at
        # most a few of the 24 steps of the mass off.
        assert abs(found.fits.alpha[0] - exact) < 0.06 * (exact - 1)
        assert found.max_eigenvalue[0] == pytest.approx(values.max(), rel=1e-12)
        assert found.sum_eigenvalues[0] == pytest.approx(values.sum(), rel=1e-12)


def mixed_runs():
    rng = np.random.default_rng(3)
    low_rank = np.concatenate([np.zeros(70), np.exp(rng.standard_normal(50))])
    layers = [
        [gaussian_gram(100, 3, rng)],
        [gram_of(np.arange(1.0, 121) ** -1.4, rng)],
        [gaussian_gram(30, r, rng) for r in (1, 2, 4)],
        [gram_of(low_rank, rng)],
        [np.zeros((40, 40)), gaussian_gram(40, 2, rng)],
        [np.eye(64)],
        [np.zeros((20, 20))],
    ]
    # 6 probes: more nodes in the stack of three than the grid holds
    return run_layers(layers, signs(6), 16, EPS32)


@pytest.mark.parametrize("kind", FIT_KINDS)
def test_native_agrees_with_the_reference(kind):
    runs, options = mixed_runs(), FitOptions(kind, k=12)
    found = native.quadrature_fit(runs, options)
    expected = reference_slq.quadrature_fit(runs, options)
    for field in ("reason", "start", "n_tail"):
        np.testing.assert_array_equal(getattr(found.fits, field), getattr(expected.fits, field))
    np.testing.assert_array_equal(found.n_zeros, expected.n_zeros)
    # Two eigensolvers: eps times the condition of the nodes, of which the smallest is 1e-4.
    for field in ("alpha", "xmin", "ks"):
        one, other = getattr(found.fits, field), getattr(expected.fits, field)
        np.testing.assert_allclose(one, other, rtol=1e-10)
    for field in ("max_eigenvalue", "sum_eigenvalues"):
        np.testing.assert_allclose(getattr(found, field), getattr(expected, field), rtol=1e-12)
    np.testing.assert_allclose(found.sketch_error, expected.sketch_error, rtol=1e-8)


def test_neither_threads_nor_other_layers_change_a_bit(monkeypatch):
    runs = mixed_runs()
    tables = []
    for threads in ("1", "4"):
        monkeypatch.setenv("TBFAST_NUM_THREADS", threads)
        tables.append(native.quadrature_fit(runs, MEDIAN))
    alone = Tridiagonals(
        runs.diagonal[2:5],
        runs.off_diagonal[2:5],
        runs.taken[2:5],
        np.array([0, 3]),
        runs.count[2:5],
        runs.eps,
    )
    single = native.quadrature_fit(alone, MEDIAN)
    for field in ("n_zeros", "max_eigenvalue", "sum_eigenvalues", "sketch_error"):
        one, other = (getattr(table, field) for table in tables)
        np.testing.assert_array_equal(one, other)
        assert getattr(single, field)[0] == one[2]
    np.testing.assert_array_equal(tables[0].fits.alpha, tables[1].fits.alpha)
    assert single.fits.alpha[0] == tables[0].fits.alpha[2]


def test_what_has_no_tail_says_so():
    rng = np.random.default_rng(4)
    rank_one = np.outer(*[rng.standard_normal(50)] * 2)
    runs = run_layers([[3.0 * np.eye(50)], [np.zeros((50, 50))], [rank_one]], signs(4), 10)
    found = native.quadrature_fit(runs, MEDIAN)
    expected = [Reason.ALL_EQUAL, Reason.NO_EIGENVALUES, Reason.ALL_EQUAL]
    np.testing.assert_array_equal(found.fits.reason, expected)
    assert np.isnan(found.fits.alpha).all()
    assert np.isnan(found.sketch_error).all()
    np.testing.assert_array_equal(found.n_zeros[:2], [0, 50])
    # One eigenvalue, seen by weights that scatter by sqrt(2 / 4) of it.
    assert 47 <= found.n_zeros[2] <= 49
    np.testing.assert_allclose(found.max_eigenvalue[:2], [3.0, 0.0], rtol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("field", ["diagonal", "off_diagonal"])
def test_a_layer_that_is_not_finite_says_so_and_leaves_the_others_alone(bad, field):
    runs = mixed_runs()
    clean = native.quadrature_fit(runs, MEDIAN)
    getattr(runs, field)[1, 2, 3] = bad
    for backend in (native, reference_slq):
        found = backend.quadrature_fit(runs, MEDIAN)
        assert found.fits.reason[1] == Reason.NOT_FINITE
        assert np.isnan([found.fits.alpha[1], found.max_eigenvalue[1], found.sketch_error[1]]).all()
    assert found.fits.reason[0] == Reason.FITTED
    native_again = native.quadrature_fit(runs, MEDIAN)
    np.testing.assert_array_equal(native_again.fits.alpha[[0, 2, 3]], clean.fits.alpha[[0, 2, 3]])


def test_entries_beyond_the_steps_taken_are_not_read():
    runs = mixed_runs()
    clean = native.quadrature_fit(runs, MEDIAN)
    for run in np.ndindex(runs.taken.shape):
        runs.diagonal[run][runs.taken[run] :] = math.nan
        runs.off_diagonal[run][runs.taken[run] - 1 :] = math.nan
    np.testing.assert_array_equal(native.quadrature_fit(runs, MEDIAN).fits.alpha, clean.fits.alpha)


@pytest.mark.parametrize("rank", [12, 60, 150, 230])
def test_zeros_of_rank_deficient_matrices_are_dropped(rank):
    rng = np.random.default_rng(rank)
    values = np.concatenate([np.zeros(256 - rank), np.exp(rng.standard_normal(rank))])
    gram = gram_of(values, rng)
    found = native.quadrature_fit(run_layers([[gram]], signs(8), 40, EPS32), MEDIAN)
    # The mass of a share z of the eigenvalues scatters by sqrt(2 z (1 - z) / (256 * 8)): three
    # times that, and 3 % of the others, which the 40 steps do not all tell from zero.
    share = rank / 256
    slack = 3 * math.sqrt(2 * share * (1 - share) / (256 * 8)) + 0.03 * share
    assert abs(found.n_zeros[0] / 256 - (1 - share)) < slack
    exact = exact_alpha(gram)
    assert abs(found.fits.alpha[0] - exact) < 3 * found.sketch_error[0]
    # Even a known rank leaves the weights of few eigenvalues to chance.
    assert found.sketch_error[0] < (0.5 if rank > 12 else 1.5) * (exact - 1)


def test_alpha_does_not_depend_on_the_scale_and_the_rest_follows_it():
    runs = mixed_runs()
    plain = native.quadrature_fit(runs, MEDIAN)
    runs.diagonal[:] *= 2.0**80
    runs.off_diagonal[:] *= 2.0**80
    scaled = native.quadrature_fit(runs, MEDIAN)
    # ln x carries 1e-16 of 55 after scaling, and T is about 0.3.
    np.testing.assert_allclose(scaled.fits.alpha, plain.fits.alpha, rtol=1e-12)
    np.testing.assert_allclose(scaled.fits.xmin, 2.0**80 * plain.fits.xmin, rtol=1e-12)
    np.testing.assert_array_equal(scaled.max_eigenvalue, 2.0**80 * plain.max_eigenvalue)
    np.testing.assert_allclose(scaled.sketch_error, plain.sketch_error, rtol=1e-9)


def test_more_probes_bring_alpha_to_the_exact_one_and_the_error_down():
    gram = gaussian_gram(200, 2, np.random.default_rng(5))
    exact, errors = exact_alpha(gram), []
    for probes in (4, 64):
        found = native.quadrature_fit(run_layers([[gram]], signs(probes), 30), MEDIAN)
        errors.append(found.sketch_error[0])
        assert abs(found.fits.alpha[0] - exact) < 2.5 * errors[-1]
    # 4 times fewer scatter; xmin's own spacing, 1/200 of the ranks, stays.
    assert errors[1] < 0.5 * errors[0]


def test_one_probe_has_an_error_too():
    runs = run_layers([[gaussian_gram(150, 2, np.random.default_rng(6))]], signs(1), 20)
    assert 0.01 < native.quadrature_fit(runs, MEDIAN).sketch_error[0] < 1


def test_a_stack_is_the_pool_of_its_matrices():
    rng = np.random.default_rng(7)
    stack = [scale * gaussian_gram(60, 2, rng) for scale in (1.0, 10.0, 1000.0) for _ in range(4)]
    found = native.quadrature_fit(run_layers([stack], signs(8), 20), MEDIAN)
    pooled = np.sort(np.concatenate([np.linalg.eigvalsh(gram) for gram in stack]))
    exact = reference.fit([pooled], MEDIAN).alpha[0]
    assert abs(found.fits.alpha[0] - exact) < 2 * found.sketch_error[0]
    assert found.sketch_error[0] < 0.1 * (exact - 1)  # 720 eigenvalues, 8 probes: 2 to 4 %


def test_estimated_spectra_ascend_and_end_at_the_largest_ritz_value():
    rng = np.random.default_rng(8)
    x = np.sort(rng.standard_normal(50))
    curve = reference_slq._Curve(x, np.linspace(0, 0.98, 50), 1.0)
    grid, masses = reference_slq._pool([[curve]], np.ones(1))
    for n in (1, 2, 7, 1000):
        values = reference_slq._spectrum(grid, masses[0], n)
        assert (np.diff(values) >= 0).all()
        assert len(values) == n
    assert values[-1] == pytest.approx(np.exp(x[-1]), rel=1e-15)


def random_gram(case, rng):
    n = int(rng.integers(64, 200))
    ranks = np.arange(1.0, n + 1)
    if case == 0:
        return gaussian_gram(n, rng.uniform(1, 8), rng)
    if case == 1:
        return gram_of(ranks ** (-2 * rng.uniform(0.3, 1.2)), rng)
    if case == 2:  # a power law along the axes
        return np.diag(rng.permutation(ranks ** (-2 * rng.uniform(0.3, 1.2))))
    if case == 3:
        return gram_of(np.exp(2 * rng.uniform(0.2, 1.3) * rng.standard_normal(n)), rng)
    if case == 4:  # two levels
        levels = np.where(ranks < rng.uniform(0.2, 0.8) * n, 1, rng.uniform(4, 400))
        return gram_of(levels * np.exp(rng.uniform(0.04, 0.6) * rng.standard_normal(n)), rng)
    if case == 5:  # spikes above a bulk
        spikes = np.exp(rng.uniform(0, 4, 6))[:, None] * rng.standard_normal((6, n))
        return gaussian_gram(n, 2, rng) + spikes.T @ spikes
    if case == 6:
        zeros = np.arange(n) < rng.uniform(0.1, 0.7) * n
        return gram_of(np.where(zeros, 0, np.exp(rng.standard_normal(n))), rng)
    tail = rng.uniform(1, 6) * n * ranks ** (-2 * rng.uniform(0.3, 1))  # as after training
    return gaussian_gram(n, 3, rng) + gram_of(tail, rng)


@pytest.fixture(scope="module")
def held_out():
    """Tridiagonals and Gram matrix of 208 random spectra."""
    rng = np.random.default_rng(9)
    cases = []
    for case in range(208):
        gram = random_gram(case % 8, rng)
        probes, steps = int(rng.choice([2, 4, 8, 16])), int(rng.choice([10, 20, 30]))
        cases.append((run_layers([[gram]], signs(probes, case), steps, EPS32), gram))
    return cases


@pytest.mark.parametrize(
    ("options", "useful"),
    # Median of claimed over true error; a normal one gives 1.5. The fits that choose xmin jump.
    [
        (MEDIAN, 3),
        (FitOptions("tail", k=16), 4),
        (FitOptions("ks"), 10),
        (FitOptions("peak"), 10),
    ],
    ids=["median", "tail", "ks", "peak"],
)
def test_the_true_error_is_below_two_standard_errors_in_nine_of_ten_cases(
    held_out, options, useful
):
    held, ratios = [], []
    for runs, gram in held_out:
        found = native.quadrature_fit(runs, options)
        error = abs(found.fits.alpha[0] - exact_alpha(gram, options))
        held.append(error <= 2 * found.sketch_error[0])
        ratios.append(found.sketch_error[0] / max(error, 1e-12))
    assert np.mean(held) >= 0.9
    assert np.median(ratios) < useful
