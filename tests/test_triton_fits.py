"""The Triton backend in the interpreter: spectra, fits and factors against the reference."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from tbfast.backends import reference, triton_launch
from tbfast.backends import triton as backend
from tbfast.backends.philox import Purpose, signs
from tbfast.backends.triton_rsvd import _signs
from tbfast.batch import Batch
from tbfast.fitting import FIT_KINDS, FitOptions
from tbfast.tridiagonals import Tridiagonals

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
OPTIONS = [
    FitOptions("median"),
    FitOptions("median", xmin_pos=3.3, smooth=0.1),
    FitOptions("tail", k=30),
    FitOptions("ks"),
    FitOptions("peak"),
    FitOptions("peak", bins=37, peak_compat=True),
]
# Two eigensolvers in float64: eps times the condition of the smallest node, 1e-4 here, and of the
# gaps between nodes, which the weights hang on.
SKETCH_TOLERANCE = 1e-9
# Both in float64, on factors of order 1.
FACTOR_TOLERANCE = 1e-12


def stack(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=generator, dtype=wide).to(dtype)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: o.kind)
def test_fits_agree_with_the_reference_on_ragged_spectra(options):
    rng = np.random.default_rng(0)
    spectra = [np.sort(rng.lognormal(0, s, n)) for n, s in [(1, 1), (2, 1), (33, 1), (500, 2)]]
    spectra += [np.empty(0), np.full(40, 3.0), np.array([1.0, np.nan])]
    found, expected = backend.fit(spectra, options), reference.fit(spectra, options)
    for field in ("reason", "start", "n_tail", "xmin"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))
    np.testing.assert_allclose(found.alpha, expected.alpha, rtol=1e-10)
    np.testing.assert_allclose(found.ks, expected.ks, atol=1e-13)


def test_spectra_longer_than_a_chunk_are_fitted_whole(monkeypatch):
    from tbfast.backends import triton_fit

    tiles = {"C": 64, "CB": 32, "JB": 32}
    monkeypatch.setattr(triton_fit, "TILES", tiles)
    values = np.sort(np.random.default_rng(1).pareto(1.5, 150) + 1)
    for kind in FIT_KINDS:
        found, expected = (b.fit([values], FitOptions(kind, k=90)) for b in (backend, reference))
        np.testing.assert_array_equal(found.start, expected.start)
        np.testing.assert_allclose(found.alpha, expected.alpha, rtol=1e-10)
        np.testing.assert_allclose(found.ks, expected.ks, atol=1e-13)


@pytest.fixture(scope="module")
def runs():
    """Layers with a bulk, a power law, two matrices, zeros, and a weight that is not finite."""
    power = stack((60, 40), torch.float64) * torch.arange(1, 41) ** -1.5
    low_rank = stack((50, 30), torch.float64, 1)
    low_rank[:, 8:] = 0
    broken = stack((9, 9), torch.float64, 2)
    broken[0, 0] = float("nan")
    weights = {
        "bulk": stack((80, 36), torch.float64, 3),
        "power": power,
        "pair": stack((2, 30, 20), torch.float64, 4),
        "low_rank": low_rank,
        "broken": broken,
        "zero": torch.zeros(12, 12, dtype=torch.float64),
        "identity": torch.eye(12, dtype=torch.float64),
    }
    kinds = ["experts" if w.ndim == 3 else "linear" for w in weights.values()]
    return reference.lanczos(Batch(weights, kinds), 2, 6)


@pytest.mark.parametrize("kind", FIT_KINDS)
def test_quadrature_fits_agree_with_the_reference(runs, kind):
    options = FitOptions(kind, k=10)
    found, expected = (b.quadrature_fit(runs, options) for b in (backend, reference))
    for field in ("reason", "start", "n_tail"):
        np.testing.assert_array_equal(getattr(found.fits, field), getattr(expected.fits, field))
    np.testing.assert_array_equal(found.n_zeros, expected.n_zeros)
    for field in ("alpha", "xmin", "ks"):
        one, other = getattr(found.fits, field), getattr(expected.fits, field)
        np.testing.assert_allclose(one, other, rtol=SKETCH_TOLERANCE)
    for field in ("max_eigenvalue", "sum_eigenvalues"):
        np.testing.assert_allclose(getattr(found, field), getattr(expected, field), rtol=1e-12)
    np.testing.assert_allclose(found.sketch_error, expected.sketch_error, rtol=1e-6)


def test_one_probe_and_any_grid_and_company_change_no_bit(runs, monkeypatch):
    def some(matrices, layers):
        rows = slice(*matrices)
        return Tridiagonals(
            runs.diagonal[rows, :1],
            runs.off_diagonal[rows, :1],
            runs.taken[rows, :1],
            np.array(layers),
            runs.count[rows],
            runs.eps,
        )

    both, alone = some((0, 2), [0, 1, 2]), some((1, 2), [0, 1])
    expected = reference.quadrature_fit(both, FitOptions())
    tables = []
    for programs, part in ((1, both), (5, both), (3, alone)):
        monkeypatch.setattr("tbfast.backends.triton_launch.programs", lambda device, p=programs: p)
        monkeypatch.setattr("tbfast.backends.triton_slq.programs", lambda device, p=programs: p)
        tables.append(backend.quadrature_fit(part, FitOptions()))
    np.testing.assert_allclose(tables[0].fits.alpha, expected.fits.alpha, rtol=SKETCH_TOLERANCE)
    np.testing.assert_allclose(tables[0].sketch_error, expected.sketch_error, rtol=1e-6)
    for field in ("alpha", "xmin", "ks"):
        values = [getattr(table.fits, field) for table in tables]
        np.testing.assert_array_equal(values[0], values[1])
        assert values[2][0] == values[0][1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eigenvalues_agree_with_the_reference(dtype):
    shapes = [(1, 1, 1), (1, 1, 9), (1, 9, 1), (3, 17, 5), (2, 5, 17), (1, 64, 64), (1, 90, 77)]
    stacks = [stack(shape, dtype, seed) for seed, shape in enumerate(shapes)]
    copies = [s.clone() for s in stacks]
    found, expected = backend.eigenvalues(stacks), reference.eigenvalues(stacks)
    for values, true, before, after in zip(found, expected, copies, stacks, strict=True):
        assert values.dtype == torch.float64
        # What exact.py promises for every eigenvalue (precision.FULL_TOLERANCE).
        torch.testing.assert_close(values, true, rtol=1e-6, atol=0)
        torch.testing.assert_close(before, after, rtol=0, atol=0)


def test_small_eigenvalues_and_huge_and_broken_weights_are_those_of_the_reference():
    graded = stack((30, 20), torch.float64) * torch.logspace(0, -9, 20, dtype=torch.float64)
    broken = stack((2, 6, 4), torch.float32)
    broken[1, 2, 3] = float("inf")
    stacks = [graded[None], 1e200 * graded[None], broken, torch.zeros(1, 5, 3)]
    found, expected = backend.eigenvalues(stacks), reference.eigenvalues([stacks[0], *stacks[2:]])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    # The reference's own squares overflow there.
    assert torch.isinf(found[1]).any() or torch.isnan(found[1]).all()
    torch.testing.assert_close(found[2], expected[1], equal_nan=True)
    torch.testing.assert_close(found[3], expected[2])


def test_random_signs_of_sketches_are_those_of_every_other_backend():
    seed = (7 << 32) + 2**31 + 5
    found = _signs(70, 150, seed, torch.device("cpu"))
    np.testing.assert_array_equal(found, signs(seed, 0, Purpose.SKETCH, 0, 0, 70, 150))


@pytest.mark.parametrize("power_iters", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factors_are_those_of_the_reference(dtype, power_iters):
    weights = [stack(s, dtype, i) for i, s in enumerate([(40, 60), (60, 40), (7, 90), (40, 60)])]
    weights += [torch.zeros(30, 20, dtype=dtype), torch.ones(30, 20, dtype=dtype)]
    weights[3][0, 0] = float("nan")
    batch = Batch(weights)
    options = {"oversample": 8, "power_iters": power_iters, "seed": 5}
    found, expected = (b.rsvd(batch, 6, **options) for b in (backend, reference))
    for weight, (u, s, vh, error), (_, values, _, true) in zip(
        weights, found, expected, strict=True
    ):
        if not torch.isfinite(weight).all():
            assert np.isnan(error)
            continue
        largest = max(float(values[0]), 1e-300)
        assert float((s - values).abs().max()) <= FACTOR_TOLERANCE * largest
        assert error == pytest.approx(true, abs=FACTOR_TOLERANCE)
        for basis in (u, vh.mH):
            eye = torch.eye(6, dtype=u.dtype)
            assert float((basis.mH @ basis - eye).abs().max()) <= FACTOR_TOLERANCE
        wide = weight.to(u.dtype)
        left = float(torch.linalg.norm(wide - (u * s) @ vh))
        assert left <= (true + FACTOR_TOLERANCE) * max(float(torch.linalg.norm(wide)), 1.0)
