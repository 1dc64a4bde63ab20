"""What merges refuse or warn of beside damaged files: numbers that are no weights, wrong sums."""

import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tbfast
from tbfast.errors import CheckpointError
from tbfast.merging.dtypes import DTYPES
from tbfast.merging.header import read_header, write_header

ARITHMETIC = ("linear", "slerp", "task", "ties", "dare_linear", "dare_ties")
OTHERS = [dtype for dtype in DTYPES.values() if not dtype.computes]


def model(folder, tensors):
    """A folder with weights of any dtype, given as name -> (dtype, shape, bytes)."""
    folder.mkdir(exist_ok=True)
    header = write_header(((name, DTYPES[d], shape) for name, (d, shape, _) in tensors.items()), {})
    file = folder / "model.safetensors"
    file.write_bytes(header + b"".join(data for *_, data in tensors.values()))
    return folder


def refused(paths, out, message, **options):
    with pytest.raises(CheckpointError, match=message) as caught:
        tbfast.merge_checkpoints(paths, out, **options)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not list(out.parent.glob(".*"))


@pytest.mark.parametrize("method", ARITHMETIC)
@pytest.mark.parametrize("dtype", OTHERS, ids=lambda dtype: dtype.name)
def test_what_cannot_be_averaged_has_to_agree_in_every_bit(tmp_path, dtype, method):
    data = bytes(i % 2 for i in range(12 * dtype.width))
    weight = ("F32", (2,), np.ones(2, np.float32).tobytes())
    same = {"q": (dtype.name, (3, 4), data), "w": weight}
    paths = [model(tmp_path / name, same) for name in ("a", "b")]
    base = model(tmp_path / "base", {**same, "q": (dtype.name, (3, 4), bytes(len(data)))})
    options = {"method": method, "base": base if method not in ("linear", "slerp") else None}
    tbfast.merge_checkpoints(paths, tmp_path / "same.safetensors", **options)
    entry = read_header(tmp_path / "same.safetensors").entries["q"]
    found = (tmp_path / "same.safetensors").read_bytes()
    assert entry.dtype == dtype
    assert found[entry.begin : entry.begin + entry.bytes] == data
    # One bit of the last element
    model(tmp_path / "b", {**same, "q": (dtype.name, (3, 4), data[:-1] + bytes([data[-1] ^ 1]))})
    message = (
        rf"a' and the others differ in 'q' \({dtype.name}\), which cannot be averaged; exclude"
    )
    refused(paths, tmp_path / "out", message, **options)
    tbfast.merge_checkpoints(paths, tmp_path / "out", **options, exclude="q")
    tbfast.merge_checkpoints(paths, tmp_path / "selected", method="select")


QUANTISED = {
    "gptq": ("m.q.qweight", "I32", "m.q.scales", "F16"),
    "gptq zeros": ("m.q.qweight", "I32", "m.q.qzeros", "I32"),
    "fp8": ("m.q.weight", "F8_E4M3", "m.q.weight_scale_inv", "F32"),
    "bitsandbytes 8 bit": ("m.q.weight", "I8", "m.q.SCB", "F32"),
    "bitsandbytes 4 bit": ("m.q.weight", "U8", "m.q.weight.absmax", "F32"),
    "mxfp4": ("m.up_proj_blocks", "U8", "m.up_proj_scales", "U8"),
}


@pytest.mark.parametrize("layout", QUANTISED)
def test_quantised_weights_are_selected_only_if_their_scales_agree(tmp_path, layout):
    weight, integer, scale, dtype = QUANTISED[layout]
    width, paths = DTYPES[integer].width, []
    for number, name in enumerate(("a", "b")):
        integers = (integer, (4, 4), bytes(range(number, 16 * width + number)))
        scales = (dtype, (4,), bytes([number] * 4 * DTYPES[dtype].width))
        paths.append(model(tmp_path / name, {weight: integers, scale: scales}))
    message = (
        rf"the others differ in '{scale}' \({dtype}\), which quantised weights depend on; merge"
    )
    refused(paths, tmp_path / "out", message)
    refused(paths, tmp_path / "out", "which cannot be averaged", method="linear")
    model(tmp_path / "b", {weight: integers, scale: (dtype, (4,), bytes(len(scales[2])))})
    report = tbfast.merge_checkpoints(paths, tmp_path / "out")
    assert sum(report.picked) == 1
    tbfast.merge_checkpoints(paths, tmp_path / "first", weights=[1, 0])


def test_scales_that_are_weights_of_their_own_are_selected(tmp_path):
    for number, name in enumerate(("a", "b")):
        index = ("I64", (2, 2), bytes(32))  # of positions
        scale = ("F32", (4,), np.full(4, number, np.float32).tobytes())
        names = {"m.relative_position_index": index, "m.logit_scale": scale, "n.scale": scale}
        model(tmp_path / name, names)
    tbfast.merge_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "out", weights=[0, 1])
    tbfast.merge_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "half")
    assert load_file(tmp_path / "out/model.safetensors")["m.logit_scale"].tolist() == [1] * 4


@pytest.fixture
def models(tmp_path):
    for number, name in enumerate(("a", "b", "base")):
        content = {f"w{i}": np.full((2, 3), number + i, np.float32) for i in range(9)}
        (tmp_path / name).mkdir()
        save_file(content, tmp_path / name / "model.safetensors")
    return tmp_path


def inputs(models):
    return [models / "a", models / "b"]


@pytest.mark.parametrize("stated", [215, 217.5, "216", [216]])
def test_a_wrong_total_size_of_an_index_is_a_warning(models, stated):
    index = models / "b/model.safetensors.index.json"
    weight_map = {f"w{i}": "model.safetensors" for i in range(9)}
    index.write_text(json.dumps({"metadata": {"total_size": stated}, "weight_map": weight_map}))
    message = r"index.json' gives its tensors .* bytes, but they have 216; is one missing\?"
    with pytest.warns(UserWarning, match=message):
        tbfast.merge_checkpoints(inputs(models), models / "out")
    for metadata in ({"total_size": 216}, {}, None, []):  # right, or not said: warnings are errors
        index.write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))
        tbfast.merge_checkpoints(inputs(models), models / "out", overwrite=True)


def test_links_to_files_are_followed_and_folders_are_no_shards(models):
    index = models / "b/model.safetensors.index.json"
    weight_map = {f"w{i}": "shard.safetensors" for i in range(9)}
    index.write_text(json.dumps({"weight_map": weight_map}))
    (models / "blob").write_bytes((models / "b/model.safetensors").read_bytes())
    (models / "b/model.safetensors").unlink()
    link = models / "b/shard.safetensors"
    link.symlink_to("../blob")  # as download caches are made
    tbfast.merge_checkpoints(inputs(models), models / "out")
    link.unlink()
    link.mkdir()
    refused(inputs(models), models / "again", "names the shard 'shard.safetensors', which is miss")
    link.rmdir()
    link.symlink_to("nowhere")
    refused(inputs(models), models / "again", "names the shard 'shard.safetensors', which is miss")


def test_a_header_above_the_cap_is_refused_before_it_is_read(tmp_path):
    file = tmp_path / "large.safetensors"
    file.write_bytes((100_000_001).to_bytes(8, "little"))
    os.truncate(file, 100_000_100)  # a hole
    with pytest.raises(CheckpointError, match="claims a header of 100000001 bytes, more than the"):
        read_header(file)


def test_five_missing_tensors_are_named_and_the_others_counted(models):
    save_file({"w0": np.ones((2, 3), np.float32)}, models / "b/model.safetensors")
    message = r"b' lacks 'w1', 'w2', 'w3', 'w4', 'w5' and 3 more, which another model has"
    refused(inputs(models), models / "out", message)
    save_file({"w7": np.ones((2, 3), np.float32)}, models / "base/model.safetensors")
    options = {"on_missing": "base", "base": models / "base"}
    message = r"b' lacks 'w1', 'w2', 'w3', 'w4', 'w5' and 2 more, which another model has"
    refused(inputs(models), models / "out", message, **options)


def test_a_base_without_a_tensor_that_is_needed_is_named(models):
    save_file({"w0": np.ones((2, 3), np.float32)}, models / "base/model.safetensors")
    message = r"base' lacks 'w1', which method='ties' needs; exclude it"
    refused(inputs(models), models / "out", message, method="ties", base=models / "base")


@pytest.mark.parametrize("method", ["select", "linear"])
def test_dtypes_that_differ_are_not_promoted_silently(models, method):
    halves = {f"w{i}": np.ones((2, 3), np.float16) for i in range(9)}
    save_file(halves, models / "b/model.safetensors")
    message = r"b/model.safetensors' has 'w0' in F16, but .* in F32; say what to write with dtype="
    refused(inputs(models), models / "out", message, method=method)


@pytest.mark.parametrize(
    ("field", "first", "second"),
    [
        ("architectures", ["A"], ["B"]),
        ("num_hidden_layers", 2, 3),
        ("hidden_size", 8, 16),
    ],
)
def test_configurations_of_other_models_are_refused(models, field, first, second):
    for name, value in (("a", first), ("b", second)):
        (models / name / "config.json").write_text(json.dumps({field: value}))
    message = rf"b' has {field}=.* in its config.json, but .* merge models of one kind"
    refused(inputs(models), models / "out", message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "slerp"}, "method='slerp' merges 2 models, got 3"),
        ({"method": "ties"}, "method='ties' needs base="),
        ({"weights": [1, 1]}, "need one weight for each of the 3 models, got 2"),
        ({"method": "dare_ties", "density": 1.5}, "density must be above 0 and at most 1, got 1.5"),
    ],
)
def test_methods_that_do_not_fit_the_models_are_refused(models, options, message):
    if options.get("method", "").startswith("dare"):
        options = {**options, "base": models / "base"}
    with pytest.raises(ValueError, match=message):
        tbfast.merge_checkpoints([*inputs(models), models / "base"], models / "out", **options)
    assert not (models / "out").exists()


def test_a_model_that_is_there_twice_or_is_the_base_is_a_warning_at_the_call(models):
    again = models / "a/../b"
    with pytest.warns(UserWarning, match=r"b' is there twice; is it meant to be\?") as caught:
        tbfast.merge_checkpoints([*inputs(models), again], models / "out")
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="a' is the base itself"):
        tbfast.merge_checkpoints(inputs(models), models / "other", base=models / "a")


def test_a_model_that_has_changed_nothing_is_a_warning_at_the_call(models):
    shutil.copytree(models / "base", models / "copy")
    paths = [*inputs(models), models / "copy"]
    message = r"copy' equals the base in every bit; is it meant to\?"
    with pytest.warns(UserWarning, match=message) as caught:
        tbfast.merge_checkpoints(paths, models / "out", base=models / "base")
    assert [warning.filename for warning in caught] == [__file__]
    tbfast.merge_checkpoints(paths, models / "without base")
    # One bit of the last byte
    file = models / "copy/model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    tbfast.merge_checkpoints(paths, models / "changed", base=models / "base")


def test_a_warning_of_nan_points_at_the_call(models):
    content = load_file(models / "b/model.safetensors")
    content["w3"][1, 1] = np.nan
    save_file(content, models / "b/model.safetensors")
    with pytest.warns(UserWarning, match="'w3', first at element 4") as caught:
        tbfast.merge_checkpoints(inputs(models), models / "out", on_nan="warn")
    assert [warning.filename for warning in caught] == [__file__]
