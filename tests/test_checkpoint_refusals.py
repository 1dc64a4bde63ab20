"""Damaged and hostile checkpoints: every fault is one line, and nothing of them runs."""

import json
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from checkpoint_files import assert_refused, make_tensors, read_all, shard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tbfast.checkpoint import CheckpointError

DTYPES = {"F32": np.float32, "F64": np.float64, "I32": np.int32, "U8": np.uint8}


@pytest.fixture
def tensors():
    return make_tensors()


def write_safetensors(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def test_a_missing_file_is_refused_by_name(tmp_path):
    assert_refused(tmp_path / "none.safetensors", tmp_path / "none.safetensors", "does not exist")


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    assert_refused(tmp_path, tmp_path, "folder without")


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "bin"])
def test_an_empty_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"m.{suffix}"
    path.touch()
    assert_refused(path, path, "0 bytes")


def test_an_unknown_extension_is_refused_with_those_known(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"x")
    assert_refused(path, ".onnx", ".safetensors")


@pytest.mark.skipif(os.name == "nt", reason="no such file on Windows")
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "m.safetensors")
    assert_refused(tmp_path / "m.safetensors", "no file that can be read")


def test_a_truncated_safetensors_file_is_refused_with_both_sizes(tmp_path, tensors):
    path = tmp_path / "m.safetensors"
    save_file(tensors, path)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-5])
    assert_refused(path, path, "truncated", size, size - 5, "download")


def test_a_header_longer_than_the_file_is_refused_with_both_sizes(tmp_path):
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {}, length=10**6)
    assert_refused(path, "1000000", path.stat().st_size)


def test_a_file_too_short_for_a_header_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"abc")
    assert_refused(path, "no header", "3 bytes")


def test_a_header_of_more_bytes_than_the_format_allows_is_refused_unread(tmp_path):
    path = tmp_path / "m.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", 200_000_000))
        stream.truncate(200_000_100)  # sparse: takes no space
    assert_refused(path, "200000000", "100000000")


W = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "header",
    [
        b"{not json",
        b"[1, 2]",
        b"\xff\xfe",
        b"{}" + b"x" * 10,
        {"w": 3},
        {"w": {"dtype": "F32", "shape": [2, 2]}},
        {"w": {**W, "dtype": "F33"}},
        {"w": {**W, "shape": [2, 3]}},
        {"w": {**W, "shape": [-2, -2]}},
        {"w": {**W, "shape": [2**40, 2**40]}},
        {"w": {**W, "data_offsets": [16, 0]}},
        {"w": {**W, "data_offsets": [0, 2**63]}},
        {"w": {**W, "data_offsets": [0, "16"]}},
        {"v": W, "w": W},
        {"__metadata__": {"step": 1}, "w": W},
    ],
)
def test_a_safetensors_header_that_is_wrong_is_refused(tmp_path, header):
    path = tmp_path / "m.safetensors"
    write_safetensors(path, header, bytes(16))
    assert_refused(path, path)


def test_bytes_after_the_last_tensor_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {"w": W}, bytes(20))
    assert_refused(path, "too long")


@pytest.mark.parametrize(
    "place",
    ["../m.safetensors", "/m.safetensors", "a/../../m.safetensors", "..\\m.safetensors", "C:m.bin"],
)
def test_an_index_that_points_outside_its_folder_is_refused(tmp_path, tensors, place):
    save_file(tensors, tmp_path / "m.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, place)}))
    assert_refused(folder, index, "outside")
    assert_refused(index, index, "outside")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"weight_map": 3}', b'{"weight_map": {"w": 3}}', b"[" * 100_000],
)
def test_an_index_of_another_form_is_refused(tmp_path, content):
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(content)
    assert_refused(tmp_path, index, "weight_map")


def test_an_index_too_large_to_be_one_is_refused_unread(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    with index.open("wb") as stream:
        stream.truncate(256_000_001)  # sparse: takes no space
    assert_refused(tmp_path, index, "256000001 bytes", "weight_map")


@pytest.mark.parametrize("place", ["absent.safetensors", "", "a\0b.safetensors", "x" * 5000])
def test_an_index_that_names_a_missing_shard_is_refused(tmp_path, place):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": place}}))
    assert_refused(tmp_path, index, "missing")


def test_a_shard_without_the_tensor_its_index_promises_is_refused(tmp_path, tensors):
    save_file(tensors, tmp_path / "m.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"other": "m.safetensors"}}))
    assert_refused(tmp_path, "'other'", "m.safetensors", "does not hold")


def test_a_name_in_two_files_of_a_folder_is_refused(tmp_path, tensors):
    save_file(tensors, tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "b.safetensors")
    assert_refused(tmp_path, "a.safetensors", "b.safetensors", "layer.")


def test_two_indexes_in_a_folder_are_refused(tmp_path, tensors):
    shard(tmp_path, tensors, stem="a")
    shard(tmp_path, tensors, stem="b")
    assert_refused(tmp_path, "more than one index", "a.safetensors.index.json")


class Malice:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("form", ["pickle", "torch", "old torch"])
def test_a_pickle_that_is_not_weights_is_refused_and_does_not_run(tmp_path, form):
    trap = tmp_path / "trap"
    path = tmp_path / "m.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Malice(trap), protocol=2))
    else:
        content = {"w": torch.ones(2, 2), "evil": Malice(trap)}
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    assert_refused(path, path, "mkdir", "state_dict")
    assert not trap.exists()


def test_a_pickled_module_is_refused_with_the_remedy(tmp_path):
    path = tmp_path / "m.pt"
    torch.save(torch.nn.Linear(2, 2), path)
    assert_refused(path, "Linear", "save model.state_dict()")


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("kept", [0.3, 0.7, 0.99])
def test_a_truncated_torch_file_is_refused(tmp_path, tensors, old, kept):
    path = tmp_path / "m.pt"
    torch.save(tensors, path, _use_new_zipfile_serialization=not old)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    assert_refused(path, path)


@pytest.mark.parametrize(
    "content", [b"hello world", b"PK\x03\x04 no zip", b"\x80\x02.", b"\0" * 99]
)
def test_a_torch_file_of_garbage_is_refused(tmp_path, content):
    path = tmp_path / "m.bin"
    path.write_bytes(content)
    assert_refused(path, path)


@pytest.mark.parametrize("content", [[torch.ones(2, 2)], torch.ones(2, 2), 3, {}, {"lr": 0.1}])
def test_a_torch_file_without_a_dict_of_tensors_is_refused(tmp_path, content):
    path = tmp_path / "m.pt"
    torch.save(content, path)
    assert_refused(path, type(content).__name__, "state_dict")


def test_a_small_file_that_claims_a_huge_tensor_is_refused(tmp_path):
    path = tmp_path / "m.pt"
    torch.save({"w": torch.zeros(1).expand(10**6, 10**6)}, path)
    assert_refused(path, "'w'", 10**12)


# --- fuzz ---------------------------------------------------------------------------------------


def valid_file():
    header = {
        "__metadata__": {"format": "pt"},
        "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b.weight": {"dtype": "F64", "shape": [1, 2], "data_offsets": [24, 40]},
        "c": {"dtype": "I32", "shape": [2], "data_offsets": [40, 48]},
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(range(48))


def parse(data):
    """The format by its specification: what a file that loads must have held."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    body = data[8 + length :]
    return {
        name: (entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def raw_bytes(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


mutations = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 400), st.integers(0, 255)),
        st.tuples(st.just("cut"), st.integers(0, 400), st.integers(1, 60)),
        st.tuples(st.just("add"), st.integers(0, 400), st.binary(max_size=9)),
    ),
    max_size=4,
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(mutations)
def test_a_mutated_safetensors_file_loads_what_it_says_or_is_refused(tmp_path, changes):
    data = bytearray(valid_file())
    for kind, place, what in changes:
        place %= len(data) + 1
        if kind == "set" and place < len(data):
            data[place] = what
        elif kind == "cut":
            del data[place : place + what]
        elif kind == "add":
            data[place:place] = what
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    try:
        read = read_all(path)
    except CheckpointError:
        return
    expected = parse(bytes(data))
    assert set(read) == set(expected)
    for name, (dtype, shape, content) in expected.items():
        assert list(read[name].shape) == shape
        assert raw_bytes(read[name]) == content
        if dtype in DTYPES:
            assert read[name].numpy().dtype == DTYPES[dtype]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_as_an_index(tmp_path, content):
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(content)
    assert_refused(index, index)


def test_a_checkpoint_error_is_a_value_error():
    assert issubclass(CheckpointError, ValueError)
