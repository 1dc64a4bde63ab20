"""What the tests of the examples share: how one is run, and a small encoder and texts for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

EXAMPLES = Path(__file__).parents[1] / "examples"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TBFAST_NUM_THREADS": "1", "MPLBACKEND": "Agg"}


def run(script: str, *arguments: object, fails: bool = False, cwd: Path | None = None) -> str:
    """What an example prints: on stdout, or on stderr if it is to fail."""
    return execute(str(EXAMPLES / script), *arguments, fails=fails, cwd=cwd)


def execute(*arguments: object, fails: bool = False, cwd: Path | None = None) -> str:
    """What Python prints: on stdout, or on stderr if it is to fail."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **ONE_THREAD},
        cwd=cwd,
        check=False,
    )
    assert done.returncode == int(fails), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if fails else done.stdout


WORDS = [
    "the",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "mat",
    "hill",
    "un",
    "##aff",
    "##able",
    "cafe",
    ",",
    "!",
]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]

# Sixteen texts on two kinds of pets.
_ENDS = ("mat", "hill", "the mat", "the hill", "mat !", "hill !", "mat ,", "hill ,")
PETS = [(f"the {pet} sat on {end}", pet) for pet in ("cat", "dog") for end in _ENDS]


def write_bert(folder: Path) -> Path:
    """A checkpoint of two random blocks, width 64, with the names of a Hugging Face BERT."""
    config = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 24,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
    }
    generator = torch.Generator().manual_seed(0)
    weights = {}

    def add(name: str, *shape: int) -> None:
        weights[f"bert.{name}.weight"] = torch.randn(shape, generator=generator) / 8
        if "_embeddings" not in name:
            weights[f"bert.{name}.bias"] = torch.randn(shape[0], generator=generator) / 8

    add("embeddings.word_embeddings", len(VOCABULARY), 64)
    add("embeddings.position_embeddings", 24, 64)
    add("embeddings.token_type_embeddings", 2, 64)
    add("embeddings.LayerNorm", 64)
    for block in range(2):
        layer = f"encoder.layer.{block}"
        for part in ("attention.self.query", "attention.self.key", "attention.self.value"):
            add(f"{layer}.{part}", 64, 64)
        add(f"{layer}.attention.output.dense", 64, 64)
        add(f"{layer}.attention.output.LayerNorm", 64)
        add(f"{layer}.intermediate.dense", 96, 64)
        add(f"{layer}.output.dense", 64, 96)
        add(f"{layer}.output.LayerNorm", 64)
    add("pooler.dense", 64, 64)
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return folder
