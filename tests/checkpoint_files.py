"""Checkpoints for the tests of reading them, and what a refusal must look like."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tbfast.checkpoint import CheckpointError, open_checkpoint


def make_tensors():
    generator = torch.Generator().manual_seed(0)
    return {f"layer.{index}.weight": torch.randn(3, 4, generator=generator) for index in (10, 2, 0)}


def read_all(path):
    return dict(open_checkpoint(path))


def assert_refused(path, *words):
    with pytest.raises(CheckpointError) as caught:
        read_all(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message


def shard(folder, tensors, suffix="safetensors", stem="model"):
    """The sharded layout of Hugging Face: one file per tensor and an index."""
    weight_map = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        file = f"{stem}-{index}.{suffix}"
        if suffix == "bin":
            torch.save({name: tensor}, folder / file)
        else:
            save_file({name: tensor}, folder / file)
        weight_map[name] = file
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index
