"""Which parts of a weight processes hold, and Lanczos on parts; in one process."""

import threading
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tbfast.backends import reference
from tbfast.batch import Batch
from tbfast.distributed import SharedLens, make_lens
from tbfast.lens import Lens
from tbfast.matrices import Layer, as_matrices
from tbfast.presets import resolve
from tbfast.sharded_lanczos import Held, lanczos
from tbfast.sharding import held_rows, own_kind, pieces, spread_of, whole
from tbfast.sketching import SketchOptions

try:
    from torch.distributed.tensor import Partial, Replicate, Shard
except ImportError:  # torch 2.4
    from torch.distributed._tensor import Partial, Replicate, Shard

SHAPES = {
    "linear": (37, 22),
    "conv": (24, 23, 3, 2),
    "spectral": (21, 26, 3),
    "packed": (66, 27),
    "experts": (5, 23, 19),
}


def spread(shape, mesh_shape, placements, rank=0):
    """How a DTensor of this shape would be spread; no process group is needed to know."""
    ranks = torch.arange(torch.tensor(mesh_shape).prod()).view(mesh_shape)
    mesh = SimpleNamespace(shape=mesh_shape, mesh=ranks)
    fake = SimpleNamespace(device_mesh=mesh, placements=placements, shape=shape)
    return spread_of("w", fake, rank)


def cuts(kind):
    """Ways to spread a weight of this kind over 3 or 6 processes, uneven and empty parts too."""
    dims = range(len(SHAPES[kind]))
    one = [((3,), (Shard(dim),)) for dim in dims]
    two = [((2, 3), (Shard(a), Shard(b))) for a, b in product(dims, dims)]
    return [*one, *two, ((2, 3), (Replicate(), Shard(0)))]


def random_weight(kind):
    generator = torch.Generator().manual_seed(0)
    dtype = torch.complex64 if kind == "spectral" else torch.float32
    scale = torch.linspace(0.1, 3, SHAPES[kind][-1])
    return torch.randn(SHAPES[kind], dtype=dtype, generator=generator) * scale


def test_rows_are_cut_as_torch_chunk_cuts():
    blocks = spread((37, 5), (4,), (Shard(0),)).blocks
    chunks = torch.arange(37).chunk(4)
    for rank, chunk in enumerate(chunks):
        assert torch.arange(37)[blocks[rank][0]].equal(chunk)


def test_a_rank_without_rows_has_no_block():
    here = spread((2, 5), (4,), (Shard(0),), rank=3)
    assert set(here.blocks) == {0, 1}
    assert not here.counts
    assert torch.empty(2, 5)[here.here].numel() == 0


def test_fully_shard_cuts_what_tensor_parallelism_has_left():
    strided = pytest.importorskip("torch.distributed.tensor.placement_types")
    cut = strided._StridedShard(0, split_factor=2)
    blocks = spread((17, 5), (4, 2), (cut, Shard(0))).blocks
    for tp, left in enumerate(torch.arange(17).chunk(2)):
        parts = left.chunk(4)
        for dp, part in enumerate(parts):
            assert torch.arange(17)[blocks[2 * dp + tp][0]].equal(part)


def test_a_copy_counts_once():
    found = spread((8, 5), (2, 2), (Replicate(), Shard(0)), rank=3)
    assert set(found.blocks) == {0, 1}
    assert not found.counts
    assert found.here == found.blocks[1]


def test_a_replicated_weight_is_not_split():
    found = spread((8, 5), (2, 2), (Replicate(), Replicate()))
    assert not found.split
    assert found.blocks == whole((8, 5), 0, 0).blocks


def test_partial_sums_are_refused_by_name():
    with pytest.raises(TypeError, match="w holds partial sums"):
        spread((8, 5), (2,), (Partial(),))


def test_an_unknown_cut_is_refused_by_name():
    strided = pytest.importorskip("torch.distributed.tensor.placement_types")
    with pytest.raises(TypeError, match="w is cut in a way"):
        spread((8, 5), (2, 2), (Shard(0), strided._StridedShard(0, split_factor=2)))


@pytest.mark.parametrize("kind", SHAPES)
def test_rows_of_a_block_are_rows_of_the_whole(kind):
    weight, layer = random_weight(kind), Layer("w", kind, SHAPES[kind])
    rows = as_matrices(weight, kind).flatten(0, 1)
    for mesh_shape, placements in cuts(kind):
        for block in spread(weight.shape, mesh_shape, placements).blocks.values():
            own = as_matrices(weight[block], own_kind(kind)).flatten(0, 1)
            columns = block[2 if kind == "experts" else 1]
            assert torch.equal(own, rows[held_rows(layer, block)][:, columns])


@pytest.mark.parametrize("kind", SHAPES)
def test_the_pieces_of_all_blocks_make_up_the_matrices(kind):
    weight, layer = random_weight(kind), Layer("w", kind, SHAPES[kind])
    for mesh_shape, placements in cuts(kind):
        stack = torch.zeros_like(as_matrices(weight, kind))
        for block in spread(weight.shape, mesh_shape, placements).blocks.values():
            for piece in pieces(layer, block, weight[block]):
                stack[piece.matrices, piece.rows, piece.cols] += piece.values
        assert torch.equal(stack, as_matrices(weight, kind))


def run_in_parts(layer, weight, mesh_shape, placements, sketch):
    """What every process gets from Lanczos on its part; threads stand for processes."""
    world = int(torch.tensor(mesh_shape).prod())
    barrier, slots, found = threading.Barrier(world, timeout=30), [None] * world, [None] * world

    def process(rank):
        def total(x):
            slots[rank] = x
            barrier.wait()
            result = torch.stack(slots).sum(dim=0)
            barrier.wait()
            return result

        own = spread(weight.shape, mesh_shape, placements, rank)
        held = pieces(layer, own.here, weight[own.here]) if own.counts else []
        part = Held(layer, held, own.split, weight.is_complex())
        found[rank] = lanczos([part], total, sketch, torch.device("cpu"))[0]

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("kind", SHAPES)
def test_lanczos_on_parts_is_lanczos_on_the_whole(kind):
    weight, layer = random_weight(kind), Layer("w", kind, SHAPES[kind])
    sketch = SketchOptions(probes=3, steps=6, seed=5, draw=2)
    right = reference.lanczos(Batch({"w": weight}, [kind]), 3, 6, seed=5, draw=2)
    for mesh_shape, placements in cuts(kind)[:: 3 if kind != "linear" else 1]:
        for run in run_in_parts(layer, weight, mesh_shape, placements, sketch):
            # 2e-5: products in float32; later steps have seen the rounding of earlier ones.
            torch.testing.assert_close(run.diagonal, right.diagonal, rtol=2e-5, atol=1e-4)
            off, expected = run.off_diagonal[..., :-1], right.off_diagonal[..., :-1]
            torch.testing.assert_close(off, expected, rtol=2e-5, atol=1e-4)
            assert (run.taken == right.taken).all()
            assert (run.first == right.first).all()
            assert (run.count == right.count).all()


def test_lanczos_on_parts_ends_where_the_space_is_exhausted():
    weight = 2 * torch.linalg.qr(random_weight("linear"))[0]  # one eigenvalue, 4
    layer = Layer("w", "linear", SHAPES["linear"])
    for run in run_in_parts(layer, weight, (3,), (Shard(0),), SketchOptions(probes=2, steps=4)):
        assert (run.taken == 1).all()
        assert run.diagonal[..., 0] == pytest.approx(4, rel=1e-6)  # float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_part_that_is_not_finite_is_seen_by_all(value):
    weight = random_weight("linear")
    weight[-1, 3] = value
    layer = Layer("w", "linear", SHAPES["linear"])
    for run in run_in_parts(layer, weight, (3,), (Shard(0),), SketchOptions(probes=2, steps=4)):
        assert not torch.from_numpy(run.diagonal[..., 0]).isfinite().any()
        assert (run.taken == 1).all()


@pytest.fixture
def alone():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_single_process_with_a_group_has_the_plain_lens(alone):
    layer = Layer("w", "linear", SHAPES["linear"])
    options = resolve("tempbalance", {})
    assert type(make_lens([layer], options, {0: random_weight("linear")})) is Lens


def test_a_shared_lens_of_one_process_says_what_a_plain_one_says(alone):
    layers = [Layer(kind, kind, shape) for kind, shape in SHAPES.items()]
    options = resolve("tempbalance", {"probes": 2, "steps": 4})
    rows = list(range(len(layers)))
    weights = {row: random_weight(layer.kind) for row, layer in enumerate(layers)}
    shared, plain = SharedLens(layers, options), Lens(layers, options)
    shared.show(weights)
    plain.show(weights)
    kept = shared.keep(rows)
    assert all(torch.equal(a, b) for a, b in zip(kept, plain.keep(rows), strict=True))
    assert (shared.turned(rows, kept) == plain.turned(rows, kept)).all()
    for look in ("exact", "sketch"):
        assert shared.measure(rows, look, 1) == plain.measure(rows, look, 1)
    assert shared.agree(0.5) == 0.5
    assert shared.workers == plain.workers
    assert shared.keep([]) == shared.measure([], "exact", 0) == []


def test_a_copy_of_another_shape_is_refused_by_name(alone):
    lens = SharedLens([Layer("w", "linear", (4, 3))], resolve("tempbalance", {}))
    with pytest.raises(ValueError, match=r"w must have shape \(4, 3\), got \(3, 4\)"):
        lens.show({0: torch.ones(3, 4)})
