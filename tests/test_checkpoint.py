"""Checkpoints: every format, read lazily."""

import os
from pathlib import Path

import pytest
import torch
from checkpoint_files import make_tensors, shard
from safetensors.torch import save_file

from tbfast import checkpoint as checkpoint_module
from tbfast.checkpoint import open_checkpoint


@pytest.fixture
def tensors():
    return make_tensors()


def assert_holds(checkpoint, expected):
    assert set(checkpoint) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint[name], tensor)
        assert checkpoint[name].dtype == tensor.dtype


def test_a_safetensors_file_gives_its_tensors_with_numbers_in_order(tmp_path, tensors):
    save_file(tensors, tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    assert list(checkpoint) == ["layer.0.weight", "layer.2.weight", "layer.10.weight"]
    assert not checkpoint.keeps_order
    assert len(checkpoint) == 3
    assert_holds(checkpoint, tensors)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("nested", [(), ("state_dict",), ("model",), ("model", "module")])
def test_a_torch_file_gives_its_tensors_in_the_order_of_the_dict(tmp_path, tensors, suffix, nested):
    content = {**tensors, "step": 3}
    for key in nested:
        content = {key: content, "epoch": 1}
    path = tmp_path / f"m{suffix}"
    torch.save(content, path)
    checkpoint = open_checkpoint(str(path))
    assert list(checkpoint) == list(tensors)
    assert checkpoint.keeps_order
    assert_holds(checkpoint, tensors)


def test_a_torch_file_of_the_old_format_loads(tmp_path, tensors):
    path = tmp_path / "m.pt"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    assert_holds(open_checkpoint(path), tensors)


def test_a_folder_of_safetensors_files_is_one_checkpoint(tmp_path, tensors):
    for index, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, tmp_path / f"part-{index}.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert_holds(open_checkpoint(tmp_path), tensors)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_index_leads_to_its_shards(tmp_path, tensors, suffix):
    index = shard(tmp_path, tensors, suffix)
    assert_holds(open_checkpoint(index), tensors)
    assert_holds(open_checkpoint(tmp_path), tensors)


def test_an_index_is_preferred_to_files_that_repeat_its_tensors(tmp_path, tensors):
    shard(tmp_path, tensors)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / "all.safetensors")
    assert_holds(open_checkpoint(tmp_path), tensors)


def test_the_index_of_safetensors_is_preferred_to_that_of_pickles(tmp_path, tensors):
    shard(tmp_path, {name: tensor + 1 for name, tensor in tensors.items()}, "bin", "pytorch_model")
    shard(tmp_path, tensors)
    assert_holds(open_checkpoint(tmp_path), tensors)


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_shards_may_be_links_to_elsewhere_as_in_a_download_cache(tmp_path, tensors):
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    folder.mkdir()
    shard(folder, tensors)
    for file in folder.glob("*.safetensors"):
        file.rename(blobs / file.name)
        file.symlink_to(Path("..") / "blobs" / file.name)
    assert_holds(open_checkpoint(folder), tensors)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_the_file_is_mapped_anew_so_that_read_pages_are_given_back(
    tmp_path, tensors, suffix, monkeypatch
):
    path = tmp_path / f"m.{suffix}"
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    opened = []
    real = checkpoint_module._open_file
    monkeypatch.setattr(
        checkpoint_module, "_open_file", lambda file: opened.append(file) or real(file)
    )
    monkeypatch.setattr(checkpoint_module, "_REMAP_BYTES", 3 * 4 * 4)  # one tensor
    checkpoint = open_checkpoint(path)
    for name in [*checkpoint, *checkpoint]:
        assert torch.equal(checkpoint[name], tensors[name])
    # Once for the names; then a second tensor exceeds the limit and the third opens again.
    assert len(opened) == 1 + 3


def test_an_unknown_name_is_a_key_error(tmp_path, tensors):
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(KeyError):
        open_checkpoint(tmp_path / "m.safetensors")["absent"]


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "bfloat16", "complex64", "int8"])
def test_every_dtype_comes_back_as_it_was_stored(tmp_path, name):
    tensor = torch.ones(2, 3).to(getattr(torch, name))
    save_file({"w": tensor}, tmp_path / "m.safetensors")
    read = open_checkpoint(tmp_path / "m.safetensors")["w"]
    assert read.dtype == tensor.dtype
    assert torch.equal(read.to(torch.complex64), tensor.to(torch.complex64))
