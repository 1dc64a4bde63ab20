"""Every refusal of a GPU backend, through a driver that the tests make up."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from tbfast.backends import gpu_checks
from tbfast.backends.gpu_checks import (
    MAX_ELEMENTS,
    MAX_MATRICES,
    MAX_SIDE,
    check_device,
    check_driver,
    check_on_gpu,
    check_table,
    planning,
)
from tbfast.batch import Batch

GPU = torch.device("cuda", 0)
# What cudaGetErrorString says for error 35.
TOO_OLD = "CUDA driver version is insufficient for CUDA runtime version"


def a_device(**more):
    """An A100, as the binding describes it, with what the test says instead."""
    found = dict(name="NVIDIA A100", major=8, minor=0, multiprocessors=108)
    return found | dict(shared_per_block=163 << 10, cooperative=True) | more


@dataclass(frozen=True)
class Driver:
    devices: list[dict] = field(default_factory=list)
    reason: str = ""

    def device_count(self):
        return len(self.devices), self.reason

    def device(self, index):
        return self.devices[index]


def described(*matrices):
    """Descriptors of (address, rows, cols, dtype, layer), with contiguous rows."""
    rows = [(a, m, n, n, 1, dtype, layer) for a, m, n, dtype, layer in matrices]
    return np.array(rows, dtype=np.int64).reshape(-1, 7)


def test_weights_on_the_cpu_are_refused_with_the_layer_and_the_remedy():
    with pytest.raises(
        ValueError,
        match="backend='cuda' needs a CUDA device, but 'fc1.weight' is on cpu; "
        "use backend='native'",
    ):
        check_on_gpu(torch.device("cpu"), ["fc1.weight"], "cuda")
    check_on_gpu(GPU, ["fc1.weight"], "cuda")


def test_the_emulator_reads_cpu_memory_and_refuses_that_of_a_gpu():
    check_on_gpu(torch.device("cpu"), ["w"], "cuda", reads="cpu")
    with pytest.raises(ValueError, match="'w' is on cuda"):
        check_on_gpu(GPU, ["w"], "cuda", reads="cpu")


def test_an_empty_batch_on_the_cpu_is_refused_too():
    with pytest.raises(ValueError, match="backend='triton' needs .* the batch is on cpu"):
        check_on_gpu(torch.device("cpu"), [], "triton")


def test_weights_on_different_devices_make_no_batch():
    weights = {"a": torch.ones(2, 2), "b": torch.ones(2, 2, device="meta")}
    with pytest.raises(TypeError, match="b is on the meta device"):
        Batch(weights)


def test_a_usable_device_is_described():
    assert check_driver(Driver([a_device()]), 0) == a_device()


@pytest.mark.parametrize("reason", [TOO_OLD, "no CUDA-capable device is detected"])
def test_a_missing_or_old_driver_is_reported_in_its_own_words_with_a_remedy(reason):
    with pytest.raises(RuntimeError, match=f"no usable GPU: {reason}; .*update the NVIDIA driver"):
        check_driver(Driver(reason=reason), 0)


def test_no_device_without_a_reason_has_no_empty_reason():
    with pytest.raises(RuntimeError, match="no usable GPU; install"):
        check_driver(Driver(), 0)


def test_a_device_that_the_driver_does_not_have_is_named():
    with pytest.raises(RuntimeError, match="found 1 GPUs, but the weights are on cuda:3"):
        check_driver(Driver([a_device()]), 3)


@pytest.mark.parametrize(("major", "minor"), [(7, 5), (7, 0), (6, 1)])
def test_a_gpu_older_than_sm_80_is_refused_by_name(major, minor):
    old = a_device(name="Tesla T4", major=major, minor=minor)
    with pytest.raises(
        RuntimeError,
        match=rf"needs compute capability 8.0 .* cuda:1 \(Tesla T4\) has {major}.{minor}; .*native",
    ):
        check_device(old, 1)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 3), (12, 0), (13, 0)])
def test_every_gpu_from_sm_80_on_is_accepted(capability):
    check_device(a_device(major=capability[0], minor=capability[1]), 0)


def test_a_device_without_cooperative_launches_is_refused_by_name():
    with pytest.raises(RuntimeError, match=r"cooperative launches, which cuda:0 \(vGPU\)"):
        check_device(a_device(name="vGPU", cooperative=False), 0)


def test_more_matrices_than_the_table_holds_are_refused():
    row = described((256, 1, 1, 2, 0))
    check_table(np.repeat(row, MAX_MATRICES, axis=0), ["w"], "cuda")
    with pytest.raises(ValueError, match=f"up to {MAX_MATRICES} matrices at once, got 1048577"):
        check_table(np.repeat(row, MAX_MATRICES + 1, axis=0), ["w"], "cuda")


@pytest.mark.parametrize("shape", [(MAX_SIDE, 1), (1, MAX_SIDE)])
def test_a_side_of_2_to_the_31_is_refused_and_one_less_is_not(shape):
    rows, cols = shape
    with pytest.raises(ValueError, match=f"but 'long' is {rows} x {cols}"):
        check_table(described((0, 8, 8, 1, 0), (0, rows, cols, 1, 1)), ["a", "long"], "cuda")
    check_table(described((0, min(rows, MAX_SIDE - 1), 1, 1, 0)), ["a"], "cuda")


def test_the_elements_of_all_matrices_of_a_layer_count_together():
    half = (1 << 20, MAX_ELEMENTS >> 21)
    exact = [(0, *half, 1, 0), (0, *half, 1, 0)]
    check_table(described(*exact), ["w"], "triton")
    with pytest.raises(ValueError, match="backend='triton' .* but 'w' has 1099511627777"):
        check_table(described(*exact, (0, 1, 1, 1, 0)), ["w"], "triton")


@pytest.mark.parametrize(("dtype", "size"), list(enumerate([2, 2, 4, 8, 8, 16])))
def test_an_address_between_elements_is_refused_with_the_layer(dtype, size):
    check_table(described((size, 2, 2, dtype, 0)), ["w"], "cuda")
    with pytest.raises(ValueError, match=f"'v' begins at address .* element size of {size} bytes"):
        check_table(
            described((size, 2, 2, dtype, 0), (3 * size // 2, 2, 2, dtype, 1)), ["w", "v"], "cuda"
        )


def test_strided_views_of_ordinary_tensors_are_accepted():
    base = torch.ones(9, 7)
    weights = {"t": base.T, "odd": base[1:, 1::2], "last": base[8:, 6:].bfloat16()}
    batch = Batch(weights)
    check_table(batch.descriptors(), batch.names, "cuda")


def test_no_matrices_are_accepted():
    check_table(described(), [], "cuda")


def test_running_out_of_memory_names_the_bytes_and_what_to_use_less_of(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    with (
        pytest.raises(
            RuntimeError, match="needs 5000 bytes on cuda:0, where 1000 are free; use fewer probes"
        ) as caught,
        planning(5000, GPU),
    ):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    assert isinstance(caught.value.__cause__, torch.cuda.OutOfMemoryError)


def test_other_errors_of_a_plan_are_left_alone():
    with pytest.raises(KeyError), planning(1, GPU):
        raise KeyError


def test_the_element_sizes_are_those_of_the_batch_table():
    from tbfast.batch import _DTYPES

    sizes = [torch.empty(0, dtype=dtype).element_size() for dtype in _DTYPES]
    assert list(_DTYPES.values()) == list(range(len(sizes)))
    assert tuple(sizes) == gpu_checks._ELEMENT_BYTES
