"""The fits of the GPU kernels, emulated: against the reference, and the same bits always."""

import dataclasses

import numpy as np
import pytest
import torch

from tbfast.backends import reference, reference_slq
from tbfast.batch import Batch
from tbfast.fitting import FIT_KINDS, MAX_ALPHA, FitOptions, Reason

COLUMNS = ("alpha", "xmin", "ks", "start", "n_tail", "reason")
SKETCH_COLUMNS = ("n_zeros", "max_eigenvalue", "sum_eigenvalues", "sketch_error")
WHOLE = ("start", "n_tail", "reason", "n_zeros")
# Both in float64: some eps, times the sum of logarithms over the excess, here below 1e3.
TOLERANCE = 1e-12
# Nodes agree to some eps of the largest; the smallest that is not zero is 1e-5 of it.
SKETCH_TOLERANCE = 1e-10

SCHEDULES = range(20)


@pytest.fixture
def gpu(emulated):
    """The emulated device with room for 7 blocks."""
    emulated.emulate(schedule=0, multiprocessors=7)
    yield emulated
    emulated.emulate()


def number_of(options):
    values = dataclasses.asdict(options)
    return values | {"kind": FIT_KINDS.index(options.kind), "max_alpha": MAX_ALPHA}


def launched(plan, shape, blocks, **inputs):
    """What a launch writes; its memory and its results hold NaN before."""
    image = plan.image()
    workspace = np.full(plan.workspace_bytes, 0xFF, np.uint8)
    workspace[: image.size] = image
    results = np.full(shape, np.nan)
    copies = {name: array.copy() for name, array in inputs.items()}
    addresses = {name: array.ctypes.data for name, array in copies.items()}
    plan.launch(
        **addresses, workspace=workspace.ctypes.data, results=results.ctypes.data, blocks=blocks
    )
    for name, array in inputs.items():
        np.testing.assert_array_equal(copies[name], array)
    return results


def fit(gpu, spectra, options, blocks=0):
    offsets = np.cumsum([0, *map(len, spectra)])
    plan = gpu.FitPlan(offsets, **number_of(options))
    return launched(plan, (len(spectra), 6), blocks, values=np.concatenate(spectra))


def quadrature_fit(gpu, runs, options, blocks=0):
    _, probes, steps = runs.diagonal.shape
    sizes = dict(probes=probes, steps=steps, eps=runs.eps)
    plan = gpu.QuadraturePlan(runs.first, runs.count, **sizes, **number_of(options))
    inputs = dict(diagonal=runs.diagonal, off_diagonal=runs.off_diagonal, taken=runs.taken)
    return launched(plan, (len(runs.first) - 1, 10), blocks, **inputs)


def check_fits(found, expected, tolerance):
    for column, name in enumerate(COLUMNS):
        value, wanted = found[:, column], getattr(expected, name)
        if name in WHOLE:
            np.testing.assert_array_equal(value, wanted, name)
        else:  # a distance is of the size of 1
            atol = tolerance if name == "ks" else 0
            np.testing.assert_allclose(value, wanted, tolerance, atol, err_msg=name)


def ragged_spectra():
    rng = np.random.default_rng(0)
    spectra = [np.sort(rng.lognormal(0, s, n)) for n, s in [(1, 1), (2, 1), (33, 1), (500, 2)]]
    spectra += [np.sort(rng.pareto(1.5, n) + 1) for n in (255, 256, 257, 600)]
    spectra += [np.empty(0), np.full(40, 3.0), np.array([1.0, np.nan]), np.array([2.0, np.inf])]
    spectra += [np.logspace(-250, 5, 300), np.repeat([1.0, 2.0, 4.0], 30)]
    return spectra


@pytest.mark.parametrize(
    "options",
    [
        FitOptions("median"),
        FitOptions("median", xmin_pos=3.5, smooth=0.05),
        FitOptions("ks"),
        FitOptions("peak"),
        FitOptions("peak", bins=7, peak_compat=True),
        FitOptions("peak", bins=1000),
        FitOptions("tail", k=30),
    ],
    ids=str,
)
def test_every_fit_of_ragged_spectra_agrees_with_the_reference(gpu, options):
    spectra = ragged_spectra()
    check_fits(fit(gpu, spectra, options), reference.fit(spectra, options), TOLERANCE)


@pytest.mark.parametrize("kind", ["ks", "peak"])
def test_the_bound_on_distances_does_not_change_the_winner(gpu, kind):
    rng = np.random.default_rng(1)
    # The tail begins anywhere, not only at the candidates that are scored first.
    spectra = []
    for start in range(40, 56):
        tail = np.sort(rng.pareto(2.0, 150) + 1)
        spectra.append(np.concatenate([np.sort(rng.uniform(0.2, 0.99, start)), tail]))
    expected = reference.fit(spectra, FitOptions(kind))
    assert (expected.start % 16 != 0).any()
    check_fits(fit(gpu, spectra, FitOptions(kind)), expected, TOLERANCE)


def test_of_equally_full_bins_of_the_histogram_the_first_is_the_peak(gpu):
    for bins in (1, 3, 10, 97, 300):
        # The ends and the middle of every bin: on an edge, rounding would decide.
        logs = -1.3 + 3.4 * np.array([0, *((np.arange(bins) + 0.5) / bins), 1])
        spectra = [10**logs, 10 ** np.sort(np.append(logs, logs[-2]))]
        options = FitOptions("peak", bins=bins)
        check_fits(fit(gpu, spectra, options), reference.fit(spectra, options), TOLERANCE)


def test_a_value_on_the_edge_of_a_bin_is_where_numpy_puts_it(gpu):
    exponents = np.array([0, 15, 15, 15, 15, 22])
    # Of 22 bins the 15th begins at 15, but 15 / 22 * 22 rounds to 14.999...
    counts, edges = np.histogram(exponents, bins=22)
    assert edges[counts.argmax()] == 15 > exponents[1] / 22 * 22
    found = fit(gpu, [10.0**exponents], FitOptions("peak", bins=22))
    assert found[0, 1] == 1e15


def layers():
    """Weights whose spectra differ in kind; the kernel and the stack are several matrices each."""
    rng = np.random.default_rng(2)
    sides = [np.linalg.qr(rng.standard_normal((rows, 40)))[0] for rows in (60, 40)]
    stack = rng.standard_normal((30, 36, 2, 2))
    stack[:, :, 0, 1] = 0
    weights = {
        "gaussian": rng.standard_normal((80, 300)),
        "power law": sides[0] @ np.diag(np.arange(1.0, 41) ** -0.7) @ sides[1],
        "rank 20": rng.standard_normal((90, 20)) @ rng.standard_normal((20, 70)),
        "kernel": rng.standard_normal((40, 48, 3, 3)),
        "stack with a zero matrix": stack,
        "identity": np.eye(50),
        "two levels": np.diag(np.repeat([1.0, 3.0], 25)),
        "fewer eigenvalues than steps": rng.standard_normal((9, 5)),
        "row": rng.standard_normal((1, 30)),
        "zeros": np.zeros((20, 12)),
    }
    return {name: torch.from_numpy(weight) for name, weight in weights.items()}


def lanczos_runs(probes=6, steps=10, eps=2.0**-23):
    """Runs of all layers; the kernel has 2,200 points, too many for one mean and for one chunk.

    The steps are few enough that no two runs find the same node of a stack: where it ends a curve
    the definition leaves the order of the runs, which is rounding, to decide.
    """
    weights = layers()
    return dataclasses.replace(reference.lanczos(Batch(weights), probes, steps, seed=3), eps=eps)


def only(runs, layer):
    first, last = runs.first[layer], runs.first[layer + 1]
    parts = {
        name: getattr(runs, name)[first:last]
        for name in ("diagonal", "off_diagonal", "taken", "count")
    }
    return dataclasses.replace(runs, **parts, first=np.array([0, last - first]))


@pytest.mark.parametrize("probes", [1, 6])
@pytest.mark.parametrize("kind", FIT_KINDS)
def test_fits_of_lanczos_runs_agree_with_the_reference(gpu, kind, probes):
    runs, options = lanczos_runs(probes), FitOptions(kind, k=5)
    assert (runs.taken < runs.diagonal.shape[2]).any()  # some ended early
    found = quadrature_fit(gpu, runs, options)
    expected = reference_slq.quadrature_fit(runs, options)
    check_fits(found, expected.fits, SKETCH_TOLERANCE)
    for column, name in enumerate(SKETCH_COLUMNS, start=len(COLUMNS)):
        rtol = 0 if name in WHOLE else SKETCH_TOLERANCE
        np.testing.assert_allclose(found[:, column], getattr(expected, name), rtol, err_msg=name)
    assert (found[:, 6] > 0).sum() >= 2  # some have zeros


def test_a_run_that_is_not_finite_costs_its_layer_and_no_other(gpu):
    runs, options = lanczos_runs(), FitOptions()
    clean = quadrature_fit(gpu, runs, options)
    matrix = runs.first[3] + 4
    for value in (np.nan, np.inf):
        for table, place in ((runs.diagonal, 0), (runs.off_diagonal, 5)):
            before = table[matrix, 2, place]
            table[matrix, 2, place] = value
            found = quadrature_fit(gpu, runs, options)
            table[matrix, 2, place] = before
            assert found[3, 5] == Reason.NOT_FINITE
            assert np.isnan(found[3, [0, 1, 2, 7, 8, 9]]).all()
            np.testing.assert_array_equal(np.delete(found, 3, 0), np.delete(clean, 3, 0))


def test_numbers_behind_the_end_of_a_run_are_not_read(gpu):
    runs, options = lanczos_runs(), FitOptions("ks")
    clean = quadrature_fit(gpu, runs, options)
    for index in np.ndindex(*runs.taken.shape):
        runs.diagonal[index][runs.taken[index] :] = np.nan
        runs.off_diagonal[index][runs.taken[index] - 1 :] = np.nan
    np.testing.assert_array_equal(quadrature_fit(gpu, runs, options), clean)


@pytest.mark.parametrize("scale", [2.0**-600, 2.0**600])
def test_scaling_a_weight_leaves_alpha_alone(gpu, scale):
    runs = lanczos_runs()
    scaled = dataclasses.replace(
        runs, diagonal=runs.diagonal * scale, off_diagonal=runs.off_diagonal * scale
    )
    found, clean = (quadrature_fit(gpu, r, FitOptions()) for r in (scaled, runs))
    # ln scale = 416: a logarithm errs by 6e-14, and alpha by that over its excess, here above 0.1.
    np.testing.assert_allclose(found[:, 0], clean[:, 0], rtol=1e-11)
    np.testing.assert_array_equal(found[:, 7], clean[:, 7] * scale)


def test_a_layers_result_does_not_depend_on_its_company(gpu):
    runs, options = lanczos_runs(), FitOptions("peak")
    together = quadrature_fit(gpu, runs, options)
    for layer in range(len(together)):
        alone = quadrature_fit(gpu, only(runs, layer), options)
        np.testing.assert_array_equal(alone[0], together[layer])
    spectra = ragged_spectra()
    table = fit(gpu, spectra, options)
    for row, spectrum in enumerate(spectra):
        np.testing.assert_array_equal(fit(gpu, [spectrum], options)[0], table[row])


@pytest.mark.parametrize("kind", FIT_KINDS)
def test_grids_of_1_3_and_7_blocks_give_the_same_bits(gpu, kind):
    spectra, runs, options = ragged_spectra(), lanczos_runs(), FitOptions(kind, k=20)
    tables = [fit(gpu, spectra, options, blocks) for blocks in (1, 3, 7)]
    sketches = [quadrature_fit(gpu, runs, options, blocks) for blocks in (1, 3, 7)]
    for more in (1, 2):
        np.testing.assert_array_equal(tables[more], tables[0])
        np.testing.assert_array_equal(sketches[more], sketches[0])


@pytest.mark.parametrize("seed", SCHEDULES)
def test_threads_that_take_turns_at_random_give_the_same_bits(gpu, seed):
    options = FitOptions(FIT_KINDS[seed % 4], k=5)
    spectra, runs = ragged_spectra(), lanczos_runs(probes=4, steps=8)
    in_order = fit(gpu, spectra, options), quadrature_fit(gpu, runs, options)
    gpu.emulate(schedule=seed + 1, multiprocessors=7)
    np.testing.assert_array_equal(fit(gpu, spectra, options, 3), in_order[0])
    np.testing.assert_array_equal(quadrature_fit(gpu, runs, options, 3), in_order[1])


def test_all_spectra_and_all_layers_take_one_launch_each(gpu):
    before = gpu.launch_count()
    fit(gpu, ragged_spectra(), FitOptions())
    assert gpu.launch_count() == before + 1
    quadrature_fit(gpu, lanczos_runs(), FitOptions())
    assert gpu.launch_count() == before + 2


def test_no_spectra_and_no_layers_take_no_launch(gpu):
    before = gpu.launch_count()
    none, options = np.zeros(1, dtype=np.int64), number_of(FitOptions())
    gpu.FitPlan(none, **options).launch(values=0, workspace=0, results=0)
    plan = gpu.QuadraturePlan(none, none[:0], probes=2, steps=4, eps=1e-7, **options)
    plan.launch(diagonal=0, off_diagonal=0, taken=0, workspace=0, results=0)
    assert gpu.launch_count() == before


def test_a_grid_that_the_device_cannot_hold_is_refused_with_its_limit(gpu):
    with pytest.raises(ValueError, match=r"blocks must lie in 1 \.\. 7.* got 8"):
        fit(gpu, ragged_spectra(), FitOptions(), blocks=8)
    with pytest.raises(ValueError, match=r"got -1"):
        quadrature_fit(gpu, lanczos_runs(), FitOptions(), blocks=-1)


@pytest.mark.parametrize(
    ("offsets", "changed", "message"),
    [
        ([0, 4, 3], {}, "offsets must be one-dimensional, rise and start at 0"),
        ([1, 4], {}, "offsets must be one-dimensional, rise and start at 0"),
        ([0, 4], {"kind": 4}, "fit option out of range"),
        ([0, 4], {"xmin_pos": float("nan")}, "fit option out of range"),
        ([0, 4], {"bins": 0}, "fit option out of range"),
    ],
)
def test_a_plan_of_impossible_fits_is_refused(gpu, offsets, changed, message):
    options = number_of(FitOptions()) | changed
    with pytest.raises(ValueError, match=message):
        gpu.FitPlan(np.array(offsets), **options)


@pytest.mark.parametrize(
    ("first", "count", "probes", "message"),
    [
        ([0, 3], [5, 5], 2, "first must run from 0 to the number of matrices"),
        ([0, 2], [5, 0], 2, "count must be at least 1"),
        ([0, 2], [5, 5], 0, "probes and steps must be at least 1"),
        ([2, 0], [5, 5], 2, "first must be one-dimensional, rise and start at 0"),
    ],
)
def test_a_plan_of_impossible_runs_is_refused(gpu, first, count, probes, message):
    sizes = dict(probes=probes, steps=4, eps=1e-7)
    with pytest.raises(ValueError, match=message):
        gpu.QuadraturePlan(np.array(first), np.array(count), **sizes, **number_of(FitOptions()))
