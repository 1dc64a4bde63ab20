"""On a GPU: every verb of cuda and triton against the reference, and what only a GPU can show.

The same kernels are tested without one by emulation (CUDA) and by the interpreter (Triton).
"""

import numpy as np
import pytest
import torch

import tbfast
from tbfast.anchors import take_anchors
from tbfast.backends import get_backend, native, reference
from tbfast.batch import Batch
from tbfast.fitting import FIT_KINDS, FitOptions
from tbfast.matrices import real_rows
from tbfast.sketching import SketchOptions
from tbfast.spectra import measure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BACKENDS = ("cuda", "triton")
DEVICE = torch.device("cuda")

DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
]
HALVES = (torch.float16, torch.bfloat16)
# 1 x n, odd, off by one from a tile, wide and tall, and more than one segment of columns.
SHAPES = [(1, 1), (1, 9), (9, 1), (17, 5), (64, 64), (130, 257), (3, 4099), (2304, 768)]

# Sums of float32 products: eps32 times the root of the longest sum, with a margin. Beside halves
# the vectors are split in two halves of 8 (11) bits each, which leaves 2^-16 of them.
APPLY_TOLERANCE, HALF_TOLERANCE = 1e-5, 3e-5
# Entries of a Jacobi matrix beside its norm, for as long as no Ritz value has converged.
EARLY_STEPS, EARLY_TOLERANCE = 8, 1e-4
ALPHA_TOLERANCE = 1e-4  # the project's, for the same probes
SUM_TOLERANCE = 1e-5  # of dot and drift: eps32 times the root of the longest row, added in double
FIT_TOLERANCE = 1e-10  # in float64 throughout


@pytest.fixture(params=BACKENDS)
def engine(request):
    return get_backend(request.param)


def random_matrix(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=generator, dtype=wide).to(dtype)


def every_layout(dtype):
    """Matrices on the CPU: by rows, by columns, as a slice of a larger one, and strided."""
    found = {}
    for rows, cols in SHAPES:
        large = random_matrix((rows + 1, cols + 3), dtype, 1)
        found[f"rows{rows}x{cols}"] = random_matrix((rows, cols), dtype)
        found[f"columns{rows}x{cols}"] = random_matrix((cols, rows), dtype).T
        found[f"slice{rows}x{cols}"] = large[1:, 3:]
        found[f"strided{rows}x{cols}"] = random_matrix((2 * rows, 3 * cols), dtype, 2)[::2, ::3]
    return found


def on_gpu(weights):
    """The same values with the same strides on the GPU."""
    moved = {}
    for name, weight in weights.items():
        place = torch.empty_strided(
            weight.shape, weight.stride(), dtype=weight.dtype, device=DEVICE
        )
        moved[name] = place.copy_(weight)
    return moved


def trained(count=6, size=300):
    """Weights with the heavy tails of training."""
    return {
        f"w{i}": random_matrix((size + 20 * i, size), torch.float32, i)
        * torch.logspace(0, -1 - i / 4, size)
        for i in range(count)
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gram_apply_agrees_with_the_reference_for_every_dtype_and_layout(engine, dtype):
    weights = every_layout(dtype)
    here = on_gpu(weights)
    parts = 2 if dtype.is_complex else 1
    for vectors in (1, 8, 11):
        x = [
            random_matrix((1, vectors, parts * min(w.shape)), torch.float32, 3)
            for w in weights.values()
        ]
        found = engine.gram_apply(Batch(here), [v.to(DEVICE) for v in x])
        expected = reference.gram_apply(Batch(weights), x)
        tolerance = HALF_TOLERANCE if dtype in HALVES else APPLY_TOLERANCE
        for name, y, plain in zip(weights, found, expected, strict=True):
            error = float((y.cpu().double() - plain).norm()) / float(plain.norm())
            assert error <= tolerance, (name, vectors, error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lanczos_agrees_with_the_reference_while_rounding_does_not_matter(engine, dtype):
    weights = {n: w for n, w in every_layout(dtype).items() if min(w.shape) >= 64}
    here = on_gpu(weights)
    found = engine.lanczos(Batch(here), 3, EARLY_STEPS, seed=5, draw=2)
    expected = reference.lanczos(Batch(weights), 3, EARLY_STEPS, seed=5, draw=2)
    np.testing.assert_array_equal(found.taken, expected.taken)
    np.testing.assert_array_equal(found.count, expected.count)
    norm = expected.diagonal.max(axis=(1, 2), keepdims=True)
    assert (np.abs(found.diagonal - expected.diagonal) / norm).max() <= EARLY_TOLERANCE
    last = np.s_[..., :-1]
    error = np.abs(found.off_diagonal[last] - expected.off_diagonal[last]) / norm
    assert error.max() <= EARLY_TOLERANCE


@pytest.mark.parametrize("kind", FIT_KINDS)
def test_quadrature_fit_agrees_with_the_reference_on_the_same_runs(engine, kind):
    weights = trained()
    runs = native.lanczos(Batch(weights), 8, 20, seed=1)
    options = FitOptions(kind, k=30)
    found, expected = engine.quadrature_fit(runs, options), reference.quadrature_fit(runs, options)
    np.testing.assert_array_equal(found.fits.reason, expected.fits.reason)
    np.testing.assert_allclose(found.fits.alpha, expected.fits.alpha, rtol=1e-8)
    np.testing.assert_allclose(found.max_eigenvalue, expected.max_eigenvalue, rtol=FIT_TOLERANCE)


def test_alpha_agrees_with_the_cpu_on_the_same_probes(engine):
    weights = trained()
    here = on_gpu(weights)
    found = engine.quadrature_fit(engine.lanczos(Batch(here), 8, 20, seed=2), FitOptions())
    expected = native.quadrature_fit(native.lanczos(Batch(weights), 8, 20, seed=2), FitOptions())
    np.testing.assert_allclose(found.fits.alpha, expected.fits.alpha, rtol=ALPHA_TOLERANCE)


@pytest.mark.parametrize("kind", FIT_KINDS)
def test_fit_agrees_with_the_reference_on_ragged_spectra(engine, kind):
    rng = np.random.default_rng(0)
    spectra = [np.sort(rng.lognormal(0, s, n)) for n, s in [(1, 1), (2, 1), (33, 1), (5000, 2)]]
    spectra += [np.empty(0), np.full(40, 3.0), np.array([1.0, np.nan])]
    options = FitOptions(kind, k=30)
    found, expected = engine.fit(spectra, options), reference.fit(spectra, options)
    np.testing.assert_array_equal(found.reason, expected.reason)
    np.testing.assert_array_equal(found.start, expected.start)
    np.testing.assert_allclose(found.alpha, expected.alpha, rtol=FIT_TOLERANCE)
    np.testing.assert_allclose(found.ks, expected.ks, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rsvd_finds_the_singular_values_of_matrices_of_low_rank(engine, dtype):
    rank, weights = 6, {}
    wide = torch.complex128 if dtype.is_complex else torch.float64
    for i, (rows, cols) in enumerate([(40, 200), (200, 40), (129, 65)]):
        left, right = random_matrix((rows, rank), dtype, i), random_matrix((rank, cols), dtype, -i)
        weights[str(i)] = (left.to(wide) @ right.to(wide)).to(dtype)
    here = on_gpu(weights)
    found = engine.rsvd(Batch(here), rank, oversample=8, power_iters=1, seed=4)
    expected = reference.rsvd(Batch(weights), rank, oversample=8, power_iters=1, seed=4)
    for weight, ours, theirs in zip(weights.values(), found, expected, strict=True):
        (u, s, vh, error), (_, sigma, _, plain) = ours, theirs
        # Float32 throughout, whatever the weights: a small multiple of its eps.
        scale = float(sigma[0])
        assert float((s.cpu().double() - sigma).abs().max()) <= 2e-5 * scale
        assert abs(error - plain) <= 1e-4
        left = weight.to(wide) - (u.cpu().to(wide) * s.cpu()) @ vh.cpu().to(wide)
        assert float(left.norm() / weight.to(wide).norm()) <= plain + 1e-5


def test_dot_and_drift_agree_with_the_reference(engine):
    weights = {**trained(), "c": random_matrix((30, 41), torch.complex64)}
    here = on_gpu(weights)
    stacks = [real_rows(w[None]) for w in weights.values()]
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(
        -127, 128, (sum(s.numel() for s in stacks),), dtype=torch.int8, generator=generator
    )
    scales = torch.rand(sum(len(s) for s in stacks), generator=generator)
    found = engine.dot(Batch(here), values.to(DEVICE), scales.to(DEVICE))
    inner, square = reference.dot(Batch(weights), values, scales)
    np.testing.assert_allclose(found[1], square, rtol=SUM_TOLERANCE)
    # An inner product is small beside the norms of its factors.
    norms = np.sqrt(square) * float(values.double().norm() * scales.max())
    assert (np.abs(found[0] - inner) <= SUM_TOLERANCE * norms).all()

    rows = torch.arange(0, sum(len(s) for s in stacks), 7)
    all_rows = [row.float() for stack in stacks for row in stack]
    kept = torch.cat([1.01 * all_rows[int(row)] for row in rows])
    moved = engine.drift(Batch(here), rows.to(DEVICE), kept.to(DEVICE))
    for ours, theirs in zip(moved, reference.drift(Batch(weights), rows, kept), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)  # differences of 1 % of float32


def test_eigenvalues_agree_with_the_reference(engine):
    stacks = [random_matrix((2, 30, 50), torch.float32), random_matrix((1, 80, 80), torch.float64)]
    found = engine.eigenvalues([s.to(DEVICE) for s in stacks])
    for ours, theirs in zip(found, reference.eigenvalues(stacks), strict=True):
        # precision.FULL_TOLERANCE, which every backend promises
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_spoils_its_own_layer_alone(engine, bad):
    weights = on_gpu(trained())
    options = FitOptions()
    clean = engine.quadrature_fit(engine.lanczos(Batch(weights), 8, 20), options).fits
    weights["w2"][17, 5] = bad
    spoiled = engine.quadrature_fit(engine.lanczos(Batch(weights), 8, 20), options).fits
    assert np.isnan(spoiled.alpha[2])
    others = np.arange(len(weights)) != 2
    np.testing.assert_array_equal(spoiled.alpha[others], clean.alpha[others])


def test_runs_and_company_change_no_bit(engine):
    weights = on_gpu(trained())
    runs = [engine.lanczos(Batch(weights), 8, 20, seed=9) for _ in range(3)]
    for again in runs[1:]:
        np.testing.assert_array_equal(again.diagonal, runs[0].diagonal)
        np.testing.assert_array_equal(again.off_diagonal, runs[0].off_diagonal)
    alone = engine.lanczos(Batch({"w3": weights["w3"]}), 8, 20, seed=9)
    np.testing.assert_array_equal(alone.diagonal[0], runs[0].diagonal[3])


def test_weights_on_the_cpu_are_refused_by_name(engine):
    weights = trained(1)
    with pytest.raises(ValueError, match=r"needs a CUDA device, but 'w0' is on cpu"):
        engine.lanczos(Batch(weights), 2, 4)


def test_weights_are_only_read(engine):
    weights = on_gpu(trained())
    copies = {name: weight.clone() for name, weight in weights.items()}
    engine.quadrature_fit(engine.lanczos(Batch(weights), 8, 20), FitOptions())
    engine.rsvd(Batch(weights), 4, oversample=8, power_iters=1, seed=0)
    assert all(torch.equal(weights[name], copies[name]) for name in weights)


def test_a_training_on_the_gpu_gets_factors():
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(96, 96) for _ in range(4)]).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters())
    balancer = tbfast.attach(optimizer, model, budget=None, skip_first=False, skip_last=False)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(16, 96, device=DEVICE)).square().mean().backward()
        optimizer.step()
    assert len(balancer.factors) == 4
    assert all(np.isfinite(factor) for factor in balancer.factors.values())


def test_a_training_within_its_budget_follows_the_weights_on_the_gpu():
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(96, 96) for _ in range(4)]).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters())
    balancer = tbfast.attach(optimizer, model, skip_first=False, skip_last=False)
    for _ in range(60):
        optimizer.zero_grad()
        model(torch.randn(16, 96, device=DEVICE)).square().mean().backward()
        optimizer.step()
    assert all(np.isfinite(alpha) for alpha in balancer.alphas.values())
    assert all(np.isfinite(error) for error in balancer.errors.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_anchors_on_the_gpu_follow_as_on_the_cpu(backend):
    weights = trained(3)
    moved = {name: weight + 0.01 * weight.roll(1, 0) for name, weight in weights.items()}
    weights_there, moved_there = on_gpu(weights), on_gpu(moved)
    there = take_anchors(Batch(weights_there), FitOptions(), probes=4, backend=backend)
    plain = take_anchors(Batch(weights), FitOptions(), probes=4, backend="native")
    for verb in ("stale", "lin", "aligned"):
        found = getattr(there, verb)(Batch(moved_there))
        expected = getattr(plain, verb)(Batch(moved))
        np.testing.assert_allclose(found.alpha, expected.alpha, rtol=ALPHA_TOLERANCE)


def test_layers_on_the_cpu_and_the_gpu_are_measured_together():
    weights = trained(2)
    here, there = weights["w0"], weights["w1"].to(DEVICE)
    for method in ("exact", "sketch"):
        found = measure([here, there], ["linear"] * 2, FitOptions(), method=method)
        expected = measure(list(weights.values()), ["linear"] * 2, FitOptions(), method=method)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.fit.alpha == pytest.approx(theirs.fit.alpha, rel=ALPHA_TOLERANCE)


SKETCH = SketchOptions(probes=8, steps=20, seed=3)


class Training:
    """Weights on the GPU, their refresh, and how many kernels were launched."""

    def __init__(self):
        from tbfast import _cuda

        self.weights = on_gpu(trained())
        self.batch = Batch(self.weights)
        self.cuda, self.launch_count = get_backend("cuda"), _cuda.launch_count
        self.refresh = self.cuda.Refresh(self.batch, FitOptions(), SKETCH)

    def by_verbs(self, draw):
        """Alpha by the verbs, which wait."""
        runs = self.cuda.lanczos(self.batch, SKETCH.probes, SKETCH.steps, seed=3, draw=draw)
        return self.cuda.quadrature_fit(runs, FitOptions()).fits.alpha

    def latest(self):
        draw, table = self.refresh.latest()
        return draw, table.fits.alpha


@pytest.fixture
def training():
    return Training()


def test_a_refresh_of_all_layers_is_one_launch_and_gives_what_the_verbs_give(training):
    before = training.launch_count()
    assert training.refresh.latest() is None
    assert training.refresh.start(0)
    assert training.launch_count() == before + 1
    torch.cuda.synchronize()
    draw, alpha = training.latest()
    assert draw == 0
    np.testing.assert_array_equal(alpha, training.by_verbs(0))


def test_results_come_one_step_late_and_nothing_waits_for_them(training):
    expected = [training.by_verbs(draw) for draw in (0, 1)]
    training.refresh.start(0)
    torch.cuda.synchronize()
    torch.cuda._sleep(1 << 30)  # cycles: about half a second before the kernel may start
    training.refresh.start(1)
    draw, alpha = training.latest()
    assert draw == 0
    np.testing.assert_array_equal(alpha, expected[0])
    torch.cuda.synchronize()
    draw, alpha = training.latest()
    assert draw == 1
    np.testing.assert_array_equal(alpha, expected[1])


def test_no_more_than_three_launches_are_under_way(training):
    training.refresh.start(0)
    torch.cuda.synchronize()
    torch.cuda._sleep(1 << 30)
    assert [training.refresh.start(draw) for draw in (1, 2, 3, 4)] == [True, True, True, False]
    torch.cuda.synchronize()
    assert training.latest()[0] == 3
    assert training.refresh.start(5)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_refresh_allocates_nothing_and_never_waits(training):
    training.refresh.start(0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    try:
        torch.cuda.set_sync_debug_mode("error")
        training.refresh.start(1)
        training.refresh.latest()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_replays_of_a_graph_take_the_next_draw_and_see_new_weights(training):
    expected = [training.by_verbs(draw) for draw in (0, 1, 2)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = training.refresh.capture()
    for alpha in expected:
        graph.replay()
        torch.cuda.synchronize()
        np.testing.assert_array_equal(rows[:, 0].numpy(), alpha)
    training.weights["w0"].mul_(torch.logspace(0, -2, 300, device=DEVICE))
    graph.replay()
    torch.cuda.synchronize()
    np.testing.assert_array_equal(rows[:, 0].numpy(), training.by_verbs(3))


@pytest.mark.parametrize("blocks", [1, 2, 7, 33])
def test_neither_the_grid_nor_what_memory_held_changes_a_bit(training, blocks):
    planned = training.refresh._plan()
    rows = [torch.empty(6, 10, dtype=torch.float64).pin_memory() for _ in range(2)]
    planned.launch(mode="alpha", out=rows[0], seed=3)
    torch.cuda.synchronize()
    image = torch.from_numpy(planned.plan.image()).to(DEVICE)
    planned.workspace.fill_(0xFF)  # all bits set is NaN
    planned.workspace[: len(image)] = image
    least = planned.plan.least_blocks
    planned.launch(mode="alpha", out=rows[1], seed=3, blocks=max(blocks, least))
    torch.cuda.synchronize()
    assert torch.equal(*rows)
