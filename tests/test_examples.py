"""The examples run as a reader would run them, on data made here."""

from __future__ import annotations

import csv
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

EXAMPLES = Path(__file__).parents[1] / "examples"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TBFAST_NUM_THREADS": "1", "MPLBACKEND": "Agg"}


def run(script: str, *arguments: object, fails: bool = False) -> str:
    """What an example prints: on stdout, or on stderr if it is to fail."""
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **ONE_THREAD}, check=False
    )
    assert done.returncode == int(fails), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if fails else done.stdout


def test_training_loop_prints_alpha_and_factor_of_every_tuned_layer_both_ways():
    lines = run("training_loop.py").splitlines()
    assert [line.split(":")[0] for line in lines if "loss" in line] == ["attach", "scheduler"]
    for part in (lines[1:5], lines[6:]):
        assert [line.split()[0] for line in part] == [f"{i}.weight" for i in (2, 4, 6, 8)]
        factors = [float(line.split("×")[1]) for line in part]
        assert min(factors) == 0.5  # the ends of the published range
        assert max(factors) == 1.5


# Darcy flow --------------------------------------------------------------------------------


def spectral_convolution(modes: tuple[int, int]) -> nn.Module:
    torch.manual_seed(3)
    layer = runpy.run_path(str(EXAMPLES / "darcy" / "fno.py"))["SpectralConv2d"](2, modes)
    layer.weight = nn.Parameter(torch.randn(2, 2, *modes, dtype=torch.complex128))
    return layer


def test_spectral_convolution_is_the_sum_over_its_fourier_modes():
    layer = spectral_convolution((6, 4))
    field = torch.randn(3, 2, 12, 9, dtype=torch.float64)
    nx, ny = field.shape[2:]
    spectrum = np.fft.fft2(field.numpy()) / (nx * ny)
    weight = layer.weight.detach().numpy()
    x, y = np.meshgrid(np.arange(nx), np.arange(ny), indexing="ij")
    expected = np.zeros(field.shape)
    for row, kx in enumerate(range(-3, 3)):
        for column, ky in enumerate(range(4)):
            mixed = np.einsum("bi,io->bo", spectrum[:, :, kx, ky], weight[:, :, row, column])
            wave = np.exp(2j * np.pi * (kx * x / nx + ky * y / ny))
            # ky and -ky are a conjugate pair: together twice the real part of one.
            expected += (1 if ky == 0 else 2) * (mixed[..., None, None] * wave).real
    # Two float64 sums over 108 points and 24 modes of order 1.
    np.testing.assert_allclose(layer(field).detach().numpy(), expected, rtol=0, atol=1e-12)


def test_spectral_convolution_of_a_smooth_field_does_not_depend_on_the_grid():
    layer = spectral_convolution((4, 3))
    fine = layer(torch.randn(1, 2, 24, 24, dtype=torch.float64))  # now only low modes
    on_fine, on_coarse = layer(fine), layer(fine[..., ::2, ::2])
    # Rounding of float64 sums over 576 points.
    torch.testing.assert_close(on_fine[..., ::2, ::2], on_coarse, rtol=0, atol=1e-12)


def test_fno_maps_fields_of_any_grid():
    fno = runpy.run_path(str(EXAMPLES / "darcy" / "fno.py"))["FNO2d"]()
    assert fno(torch.rand(2, 16, 16)).shape == (2, 16, 16)
    assert fno(torch.rand(1, 32, 24)).shape == (1, 32, 24)


@pytest.fixture(scope="module")
def darcy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Folder of made-up data; folder of a small experiment on them, and what it printed."""
    folder = tmp_path_factory.mktemp("darcy")
    generator = torch.Generator().manual_seed(0)
    for name, samples, grid in (("train_16", 80, 16), ("test_16", 4, 16), ("test_32", 4, 32)):
        a = torch.rand(samples, grid, grid, generator=generator) > 0.5
        u = a.float().cumsum(1).cumsum(2) / grid**2 + 0.1
        torch.save({"x": a, "y": u}, folder / f"darcy_{name}.pt")
    out = folder / "out"
    settings = ("--sizes", 8, 16, "--rates", 1e-2, 2e-2, "--steps", 3, "--seeds", 2)
    printed = run("darcy/run.py", "--data", folder, "--out", out, *settings, "--workers", 1)
    return folder, out, printed


def test_darcy_compares_all_variants_and_writes_what_it_printed(darcy: tuple[Path, Path, str]):
    _, out, printed = darcy
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    variants = ("plain", "published", "ours", "fixed")
    assert len(results) == len(variants) * 2 * 2 * 2  # sizes, rates, seeds

    # The comparison worked out again from the single runs.
    def best(variant: str, size: int) -> tuple[float, np.ndarray]:
        runs = [r for r in results if (r["job"]["variant"], r["job"]["size"]) == (variant, size)]
        at = {rate: [r for r in runs if r["job"]["rate"] == rate] for rate in (1e-2, 2e-2)}
        rate = min(at, key=lambda rate: np.mean([r["validation"] for r in at[rate]]))
        chosen = sorted(at[rate], key=lambda r: r["job"]["seed"])
        return rate, np.array([r["test"] for r in chosen])

    table = (out / "table.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:10]]
    pairs = [(size, variant) for size in (8, 16) for variant in variants]
    for (size, variant), row in zip(pairs, rows, strict=True):
        rate, errors = best(variant, size)
        assert row[0] == str(size)
        assert float(row[2].rstrip("*")) == rate
        assert row[3] == f"{errors.mean():.4f} ± {errors.std(ddof=1):.4f}"
        difference = 100 * (errors / best("plain", size)[1] - 1)
        error = difference.std(ddof=1) / np.sqrt(2)
        gain = f"{difference.mean():+.1f} % ± {error:.1f}"
        assert row[4] == ("–" if variant == "plain" else gain)
    assert "two standard errors" in table.lower()
    assert "two standard errors" in " ".join(printed.split()).lower()
    for name in ("error.png", "alpha.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")

    # Who was balanced, and the control's ratios: the means of "ours" by layer type.
    balanced = {r["job"]["variant"]: set(r["factors"]) for r in results}
    real = {*(f"conv.{i}.weight" for i in range(4)), "project.weight"}
    assert balanced["plain"] == set()
    assert balanced["published"] == real
    assert balanced["ours"] == real | {f"spectral.{i}.weight" for i in range(4)}
    small = [r for r in results if r["job"]["size"] == 8]
    ratios = next(r["job"]["ratios"] for r in small if r["job"]["variant"] == "fixed")
    ours = [r["factors"] for r in small if r["job"]["variant"] == "ours"]
    for kind in ("spectral", "conv"):
        mean = np.mean([run[f"{kind}.{i}.weight"] for run in ours for i in range(4)])
        assert ratios[f"{kind}.*.weight"] == pytest.approx(mean, rel=1e-12)  # order of a sum


def test_darcy_errors_depend_on_the_run_alone(darcy: tuple[Path, Path, str]):
    folder, out, _ = darcy
    again = folder / "again"  # other runs before it in its process
    settings = ("--sizes", 8, "--rates", 1e-2, "--steps", 3, "--seeds", 1, "--workers", 1)
    run("darcy/run.py", "--data", folder, "--out", again, *settings)

    def errors(path: Path) -> dict[str, list[float]]:
        found = {}
        for r in json.loads((path / "results.json").read_text(encoding="utf-8")):
            if (r["job"]["size"], r["job"]["rate"], r["job"]["seed"]) == (8, 1e-2, 0):
                found[r["job"]["variant"]] = [r[key] for key in ("validation", "test", "fine")]
        del found["fixed"]  # its ratios come from all runs of "ours"
        return found

    assert errors(again) == errors(out)


def test_missing_darcy_data_are_named_with_the_remedy(tmp_path: Path):
    load = runpy.run_path(str(EXAMPLES / "darcy" / "data.py"))["load"]
    with pytest.raises(FileNotFoundError, match=r"darcy_train_16\.pt is missing.*fetch\.py"):
        load(tmp_path)


# Fine-tuning -------------------------------------------------------------------------------

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


@pytest.fixture
def bert_folder(tmp_path: Path) -> Path:
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
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return folder


def test_encoder_equals_the_transformer_of_torch(bert_folder: Path):
    bert = runpy.run_path(str(EXAMPLES / "finetune_text" / "bert.py"))
    encoder = bert["load_encoder"](bert_folder).double().eval()
    ids, mask = bert["WordPiece"](bert_folder / "vocab.txt")(["the cat sat !", "dog"], 16)
    x = encoder.words(ids) + encoder.positions.weight[: ids.shape[1]] + encoder.segments.weight[0]
    x = encoder.norm(x)
    for block in encoder.blocks:
        oracle = nn.TransformerEncoderLayer(
            64, 4, 96, activation="gelu", layer_norm_eps=1e-12, batch_first=True
        )
        parts = [block.query, block.key, block.value]
        state = {
            "self_attn.in_proj_weight": torch.cat([part.weight for part in parts]),
            "self_attn.in_proj_bias": torch.cat([part.bias for part in parts]),
        }
        theirs = ("self_attn.out_proj", "norm1", "linear1", "linear2", "norm2")
        ours = (block.project, block.project_norm, block.up, block.down, block.down_norm)
        for name, part in zip(theirs, ours, strict=True):
            state |= {f"{name}.weight": part.weight, f"{name}.bias": part.bias}
        oracle.double().eval().load_state_dict(state)
        # Hidden states of padding are not compared: one of torch's paths zeroes them.
        x = oracle(x, src_key_padding_mask=~mask)
    expected = torch.stack([x[0, mask[0]].mean(0), x[1, mask[1]].mean(0)])
    # float64, two blocks of order-1 values.
    torch.testing.assert_close(encoder(ids, mask), expected, rtol=0, atol=1e-12)


def test_tokenizer_takes_the_longest_pieces_and_knows_case_accents_and_punctuation(
    bert_folder: Path,
):
    bert = runpy.run_path(str(EXAMPLES / "finetune_text" / "bert.py"))
    tokenizer = bert["WordPiece"](bert_folder / "vocab.txt")

    def pieces(text: str) -> list[str]:
        return [VOCABULARY[index] for index in tokenizer.pieces(text)]

    assert pieces("The unaffable CAT!") == ["the", "un", "##aff", "##able", "cat", "!"]
    assert pieces("café,dog\tzebra") == ["cafe", ",", "dog", "[UNK]"]
    ids, mask = tokenizer(["the cat", "the cat sat on the mat"], 6)
    assert [VOCABULARY[i] for i in ids[1]] == ["[CLS]", "the", "cat", "sat", "on", "[SEP]"]
    assert mask.tolist() == [[True] * 4 + [False] * 2, [True] * 6]


@pytest.fixture
def texts() -> list[tuple[str, str]]:
    ends = ("mat", "hill", "the mat", "the hill", "mat !", "hill !", "mat ,", "hill ,")
    return [(f"the {pet} sat on {end}", pet) for pet in ("cat", "dog") for end in ends]


def test_finetuning_reads_csv_and_reports_both_accuracies(
    bert_folder: Path, texts: list[tuple[str, str]], tmp_path: Path
):
    path = tmp_path / "pets.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *texts])
    options = ("--shots", 3, "--epochs", 2, "--variant", "tempbalance")
    printed = run("finetune_text/run.py", "--data", path, "--model", bert_folder, *options)
    assert "tempbalance: 2 classes, 6 training texts" in printed
    assert "% of 6" in printed  # validation: 3 of each class
    assert "% of 4" in printed  # test: what is left
    # The query of block 0, the first analysed layer, is not tuned; the other 11 are.
    assert printed.count("×0.") + printed.count("×1.") == 11


def test_finetuning_reads_jsonl_with_other_column_names(
    bert_folder: Path, texts: list[tuple[str, str]], tmp_path: Path
):
    path = tmp_path / "pets.jsonl"
    lines = [json.dumps({"body": text, "pet": pet}) for text, pet in texts]
    path.write_text("\n".join(lines), encoding="utf-8")
    options = ("--text", "body", "--label", "pet", "--shots", 2, "--epochs", 1)
    variant = ("--variant", "model-balancing")
    printed = run(
        "finetune_text/run.py", "--data", path, "--model", bert_folder, *options, *variant
    )
    assert "model-balancing: 2 classes, 4 training texts" in printed
    # One factor per block: all tuned matrices of a row share it.
    rows = [line.split("×")[1:] for line in printed.splitlines() if "×" in line][1:]
    assert [len({cell.split()[0] for cell in row}) for row in rows] == [1, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.csv", b"words,kind\na,b\n", "no.csv, row 1 has no 'text' or no 'label'"),
        ("cut.jsonl", b'{"text": "a", "label": "b"}\n{"text": "a', "cut.jsonl, line 2 is not JSON"),
        ("list.jsonl", b"[1, 2]\n", "list.jsonl, row 1 has no 'text'"),
        ("empty.csv", b"", "empty.csv holds no rows"),
        ("byte.csv", b"text,label\n\xff,a\n", "byte.csv is not UTF-8"),
    ],
)
def test_a_bad_file_is_refused_by_name(name: str, content: bytes, message: str, tmp_path: Path):
    read_texts = runpy.run_path(str(EXAMPLES / "finetune_text" / "texts.py"))["read_texts"]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_texts(path, "text", "label")


def test_too_few_texts_of_a_class_end_the_program_in_one_line(tmp_path: Path):
    path = tmp_path / "few.csv"
    path.write_text("text,label\na,b\nc,d\n", encoding="utf-8")
    printed = run("finetune_text/run.py", "--data", path, fails=True)
    assert "'b' has 1 different texts, but --shots 8 needs more than 16" in printed
    assert len(printed.splitlines()) == 1
