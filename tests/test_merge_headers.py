"""Headers of safetensors files that lie: each is refused, by name, before anything is allocated."""

import json
import random
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import save_file

from tbfast.errors import CheckpointError
from tbfast.merging.header import read_header

MODEL = {f"layers.{i}.weight": np.zeros((48, 16), np.float32) for i in range(14)}


def file_of(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    return size.to_bytes(8, "little") + text + data


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes, too few for a header"),
        (b"\0" * 7, "has 7 bytes"),
        (b"\0" * 8, "claims a header of 0 bytes"),
        (
            file_of(b"{}", length=2**60),
            "claims a header of 1152921504606846976 bytes, but the file",
        ),
        (file_of(b"\xff\xfe"), "no valid JSON"),
        (file_of(b"[" * 100_000), "no valid JSON"),
        (file_of(b"[]"), "header that is no object"),
        (file_of(b'{"a": 1, "a": 2}'), "the key 'a' is there twice"),
        (file_of({"__metadata__": {"a": 1}}), "does not map strings to strings"),
        (file_of({"a": [1]}), "describes 'a' by other fields"),
        (file_of({"a": entry([1], 0, 4, "F31")}, b"1234"), "dtype 'F31', which cannot be merged"),
        (file_of({"a": entry([1], 0, 4, "F4")}, b"1234"), "dtype 'F4', which cannot be merged"),
        (file_of({"a": entry([True], 0, 4)}, b"1234"), r"with shape \[True\]"),
        (file_of({"a": entry([-1], 0, 4)}, b"1234"), r"with shape \[-1\]"),
        (file_of({"a": entry([1.0], 0, 4)}, b"1234"), r"with shape \[1.0\]"),
        (file_of({"a": entry([2**63], 0, 4)}, b"1234"), "with shape"),
        (file_of({"a": entry([2**62, 2**62], 0, 4)}, b"1234"), "gives 'a' 4 bytes"),
        (file_of({"a": entry([2], 4, 0)}, b"1234"), "gives 'a' -4 bytes"),
        (file_of({"a": entry([1], 4, 8)}, b"12345678"), "leaves a hole after 'the header'"),
        (
            file_of({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, b"123456"),
            "'b' begin at byte .* which overlaps 'a'",
        ),
        (file_of({"a": entry([2], 0, 8)}, b"1234"), "is truncated: its header describes"),
        (file_of({"a": entry([1], 0, 4)}, b"12345678"), "is too long: its header describes"),
    ],
)
def test_damaged_and_hostile_files_are_refused(tmp_path, content, message):
    file = tmp_path / "bad.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def fault_of(file):
    """What is wrong with a file, if anything."""
    try:
        read_header(file)
    except CheckpointError as error:
        return str(error)
    return None


def test_mutated_headers_give_one_error_and_no_large_allocation(tmp_path):
    save_file(MODEL, tmp_path / "good.safetensors")
    good = (tmp_path / "good.safetensors").read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    rng = random.Random(0)
    file = tmp_path / "bad.safetensors"
    refusals = 0
    read_header(tmp_path / "good.safetensors")  # what is imported on the way is not counted
    tracemalloc.start()
    try:
        for _ in range(10_000):
            content = bytearray(good)
            for _ in range(rng.choice([1, 1, 2, 8])):
                content[rng.randrange(header)] = rng.randrange(256)
            if rng.random() < 0.2:
                del content[rng.randrange(len(content)) :]
            file.write_bytes(content)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            message = fault_of(file)
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak < 2 * len(good) + 2**16  # tables of the interpreter, once
            if message is not None:
                refusals += 1
                assert "\n" not in message
                assert str(file) in message
    finally:
        tracemalloc.stop()
    assert refusals > 5000  # the others name tensors otherwise, or are spaces
