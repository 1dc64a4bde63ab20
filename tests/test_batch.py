"""The table of a ragged batch: what it takes, what it refuses, and what it notices."""

import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from tbfast.backends import native
from tbfast.batch import Batch
from tbfast.matrices import as_matrices


def apply_to_ones(batch):
    """WᴴW 1 of every matrix: a fingerprint of what the batch reads."""
    stacks = batch.stacks()
    x = [torch.ones(len(s), 1, min(s.shape[1:]) * (2 if s.is_complex() else 1)) for s in stacks]
    return native.gram_apply(batch, x)


def expected_of(stack):
    wide = stack.to(torch.complex128)
    tall = wide if wide.shape[1] >= wide.shape[2] else wide.mH
    ones = torch.ones(len(tall), tall.shape[2], 1, dtype=torch.complex128)
    if not stack.is_complex():
        return (tall.mH @ (tall @ ones)).mT.real
    ones = ones * (1 + 1j)  # all real coordinates are one
    return torch.view_as_real((tall.mH @ (tall @ ones))[..., 0]).flatten(1)[:, None]


def check(batch):
    for stack, found in zip(batch.stacks(), apply_to_ones(batch), strict=True):
        expected = expected_of(stack)
        # float32 sums of fewer than 1e3 products
        atol = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=atol)


def test_every_kind_of_weight_is_read_where_it_lies():
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, (3, 2))
    weights = {
        "linear": torch.randn(20, 30),
        "transposed": torch.randn(20, 30).T,
        "conv": conv.weight,
        "channels_last": torch.randn(8, 5, 3, 3).contiguous(memory_format=torch.channels_last),
        "conv1d": torch.randn(8, 5, 7).transpose(0, 1),
        "spectral": torch.randn(6, 7, 4, 3, dtype=torch.complex64),
        "packed": torch.randn(3 * 11, 9),
        "experts": torch.randn(4, 10, 12).transpose(1, 2),
        "strided": torch.randn(40, 60)[::2, ::3],
        "reversed_order": torch.randn(30, 20, 2).permute(2, 0, 1),
        "half": torch.randn(16, 16).half(),
    }
    kinds = ["linear", "linear", "conv", "conv", "conv", "spectral", "packed", "experts"]
    kinds += ["linear", "experts", "linear"]
    batch = Batch(weights, kinds)
    matrices = sum(len(as_matrices(w, k)) for w, k in zip(weights.values(), kinds, strict=True))
    assert len(batch.table()) == matrices
    check(batch)


def test_of_model_takes_each_parameter_once_even_if_tied():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Conv2d(3, 4, 3))
    model[1].weight = model[0].weight
    batch = Batch.of_model(model, exclude="2.*")
    assert batch.names == ("0.weight",)
    assert len(Batch.of_model(model)) == 2


def test_tied_weights_in_a_list_are_measured_under_each_name():
    weight = torch.randn(30, 20)
    first, second = apply_to_ones(Batch({"a": weight, "b": weight}))
    assert torch.equal(first, second)


def test_the_table_is_kept_until_memory_strides_or_dtype_change():
    layer = nn.Linear(12, 12)
    batch = Batch({"w": layer.weight})
    table = batch.table()
    with torch.no_grad():
        layer.weight.mul_(2)  # in place: same memory, new numbers
    assert batch.table() is table
    check(batch)
    layer.weight.data = torch.randn(12, 12)
    moved = batch.table()
    assert moved is not table
    check(batch)
    layer.weight.data = layer.weight.data.T
    turned = batch.table()
    assert turned is not moved
    check(batch)
    layer.weight.data = layer.weight.data.double()
    assert batch.table() is not turned
    check(batch)


def test_a_changed_shape_is_an_error_that_names_the_layer():
    layer = nn.Linear(12, 10)
    batch = Batch({"head.weight": layer.weight})
    layer.weight.data = torch.randn(10, 13)
    with pytest.raises(ValueError, match=r"head.weight had the shape \(10, 12\) .* has \(10, 13\)"):
        batch.table()


def test_a_batch_keeps_nothing_alive_and_says_what_is_gone():
    kept, dropped = torch.randn(5, 5), torch.randn(6, 6)
    batch = Batch({"kept": kept, "dropped": dropped})
    watch = weakref.ref(dropped)
    del dropped
    gc.collect()
    assert watch() is None
    with pytest.raises(RuntimeError, match="dropped was freed after this Batch was made; keep a"):
        batch.table()


def test_a_weight_without_memory_is_refused_by_name():
    weight = torch.randn(5, 5)
    batch = Batch({"w": weight})
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="w has given up its memory; gather it"):
        batch.table()


class Wrapper(torch.Tensor):
    """A tensor subclass without memory of its own, as quantised and distributed ones are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def fake_tensor():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(3, 3)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (lambda: Wrapper(torch.ones(3, 3)), TypeError, "w is a Wrapper, a wrapper without plain"),
        (fake_tensor, TypeError, "w is a FakeTensor, a wrapper"),
        (lambda: torch.ones(3, 3, device="meta"), TypeError, "w is on the meta device"),
        (lambda: torch.ones(3, 3).to_sparse(), TypeError, "w is of layout torch.sparse_coo; use"),
        (lambda: torch.ones(3, 3, dtype=torch.int32), TypeError, "w must be floating point or"),
        (lambda: [[1.0]], TypeError, "w must be a torch.Tensor, got list"),
        (lambda: torch.ones(3), ValueError, r"w must have two or more dimensions, .* got \(3,\)"),
        (lambda: torch.ones(0, 3), ValueError, r"none of them 0; got \(0, 3\)"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(weight, error, message):
    tensor = weight()
    with pytest.raises(error, match=message):
        Batch({"w": tensor}, ["linear"])


def test_a_functional_tensor_is_refused_by_name():
    def build(x):
        Batch({"w": x})
        return x

    with pytest.raises(TypeError, match="w is a functional tensor; measure outside"):
        torch.func.vmap(build)(torch.ones(2, 3, 3))


def test_parameters_and_plain_subclasses_are_taken():
    class Tagged(torch.Tensor):
        pass

    for weight in (nn.Parameter(torch.randn(4, 5)), torch.randn(4, 5).as_subclass(Tagged)):
        assert len(Batch({"w": weight}).table()) == 1


def test_an_empty_batch_gives_empty_results():
    batch = Batch({})
    assert len(batch) == 0
    assert len(batch.table()) == 0
    runs = native.lanczos(batch, 4, 10)
    assert runs.diagonal.shape == (0, 4, 10)
    assert runs.first.tolist() == [0]


def test_kinds_must_match_the_weights():
    weights = {"a": torch.ones(3, 3), "b": torch.ones(3, 3)}
    with pytest.raises(ValueError, match="got 2 weights but 1 kinds"):
        Batch(weights, ["linear"])


def test_threads_build_and_run_one_batch_side_by_side():
    weights = {str(i): torch.randn(40 + i, 30) for i in range(8)}
    batch = Batch(weights)
    alone = native.lanczos(batch, 4, 10)
    failures = []

    def work(seed):
        try:
            for _ in range(10):
                mine = Batch(weights)
                for b in (mine, batch):
                    runs = native.lanczos(b, 4, 10, seed=seed)
                    if seed == 0:
                        np.testing.assert_array_equal(runs.diagonal, alone.diagonal)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed % 2,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_other_python_threads_run_while_a_batch_does():
    # The interpreter must be free: a counter advances during one long call.
    weight = torch.randn(3000, 1500)
    batch = Batch({"w": weight})
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.wait(0.001):
            ticks.append(1)

    thread = threading.Thread(target=tick)
    thread.start()
    native.lanczos(batch, 8, 60)
    stop.set()
    thread.join()
    assert len(ticks) > 3


def test_indices_beyond_2_to_the_31_are_reached(tmp_path):
    # A sparse file of 2^31 float32 plus a few rows: only the pages that are touched exist.
    rows, cols = 2**22 + 3, 512
    path = tmp_path / "weights"
    with open(path, "wb") as file:
        file.truncate(4 * rows * cols)
    mapped = torch.from_file(str(path), shared=True, size=rows * cols).view(rows, cols)
    mapped[-1] = 2.0
    mapped[-2, 1] = 3.0
    for view in (mapped[-16:], mapped[-16:, ::2].T, mapped[:: 2**22 + 2]):
        check(Batch({"w": view}))
    # The same element from both ends of a stride that needs 64 bits.
    assert view.stride(0) * (view.shape[0] - 1) >= 2**31
