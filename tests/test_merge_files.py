"""Merging files: layouts, invariance, and every refusal."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import tbfast
from tbfast.errors import CheckpointError

METHODS = ("select", "linear", "task", "slerp", "ties", "dare_linear", "dare_ties")
CONFIG = {"architectures": ["ToyForCausalLM"], "model_type": "toy", "torch_dtype": "float32"}


def tensors(seed=0, base=None):
    """A small model, or one tuned from another."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (64, 16), "model.norm.weight": (16,)}
    shapes |= {f"model.layers.{i}.mlp.weight": (48, 16) for i in range(12)}
    shapes |= {"model.scale": (), "model.none": (0, 4)}
    made = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    if base is None:
        return made
    kept = {n: rng.random(v.shape) < 0.3 for n, v in made.items()}
    return {
        n: np.where(kept[n], base[n], base[n] + 0.1 * v).astype(np.float32) for n, v in made.items()
    }


def write_folder(folder, content, shards=1, config=CONFIG, reverse=False):
    """A checkpoint in the layout of Hugging Face."""
    folder.mkdir(parents=True)
    names = sorted(content, reverse=reverse)
    groups = [names[i::shards] for i in range(shards)]
    weight_map = {}
    for i, group in enumerate(groups, 1):
        file = f"model-{i:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        save_file({n: content[n] for n in group}, folder / file)
        weight_map |= dict.fromkeys(group, file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"toy": 1}')
    return folder


@pytest.fixture
def models(tmp_path):
    """Base and two models as folders."""
    base = tensors()
    write_folder(tmp_path / "base", base)
    for i in (1, 2):
        write_folder(tmp_path / f"m{i}", tensors(i, base))
    return tmp_path


def merged(folder):
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(file)
    return found


def inputs(models):
    return [models / "m1", models / "m2"]


@pytest.mark.parametrize("method", METHODS)
def test_files_hold_what_merging_in_memory_gives(models, method):
    base = models / "base" if method not in ("linear", "slerp") else None
    report = tbfast.merge_checkpoints(inputs(models), models / "out", method=method, base=base)
    found, a, b, old = (merged(models / name) for name in ("out", "m1", "m2", "base"))
    assert found.keys() == a.keys()
    for name, value in found.items():
        expected = tbfast.merge_tensors(
            [a[name], b[name]], name=name, method=method, base=None if base is None else old[name]
        )
        np.testing.assert_array_equal(value, expected)
    assert report.tensors == len(a)
    assert report.bytes == (models / "out/model.safetensors").stat().st_size
    assert not list(models.glob(".*"))
    if method == "select":
        assert sum(report.picked) == pytest.approx(1)
        same = sum(int(((a[n] == old[n]) & (b[n] == old[n])).sum()) for n in a)
        assert report.unchanged == pytest.approx(same / sum(v.size for v in a.values()))


def digests(folder):
    return {
        f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob("*.safetensors")
    }


def test_layout_order_and_threads_of_the_inputs_change_no_byte(models):
    base = merged(models / "base")
    expected = None
    for variant, (shards, reverse, threads) in enumerate(
        [(1, False, 1), (3, True, 2), (5, False, 3)]
    ):
        here = models / f"v{variant}"
        for name in ("base", "m1", "m2"):
            write_folder(here / name, merged(models / name), shards, reverse=reverse)
        tbfast.merge_checkpoints(
            inputs(here),
            here / "out",
            base=here / "base",
            seed=3,
            threads=threads,
            shard_size="8KB",
        )
        found = digests(here / "out")
        expected = expected or found
        assert found == expected
    assert len(expected) > 3
    assert base.keys() == merged(here / "out").keys()


def test_a_folder_is_one_that_libraries_load(models):
    tbfast.merge_checkpoints(inputs(models), models / "out", shard_size="10KB", dtype="bf16")
    out = models / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    sizes = 0
    for name, file in index["weight_map"].items():
        with safe_open(out / file, "pt") as opened:
            tensor = opened.get_tensor(name)
            sizes += tensor.numel() * tensor.element_size()
            assert str(tensor.dtype) == "torch.bfloat16"
            assert opened.metadata()["format"] == "pt"
    assert index["metadata"]["total_size"] == sizes
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (out / "tokenizer.json").read_text() == '{"toy": 1}'
    report = json.loads((out / "merge_report.json").read_text())
    assert report["tensors"] == len(index["weight_map"])
    shards = sorted(p.name for p in out.glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all((out / name).stat().st_size < 12_000 for name in shards)


def test_one_file_in_and_out_with_an_account_of_the_merge(models):
    files = [path / "model.safetensors" for path in inputs(models)]
    tbfast.merge_checkpoints(files, models / "out.safetensors", method="linear", weights=[3, 1])
    with safe_open(models / "out.safetensors", "np") as opened:
        account = json.loads(opened.metadata()["tbfast_merge"])
    assert account["methods"][0]["weights"] == [0.75, 0.25]
    assert account["seed"] == 0


def test_patterns_choose_what_is_merged_and_how(models):
    tbfast.merge_checkpoints(
        inputs(models),
        models / "out",
        base=models / "base",
        exclude="*embed*",
        overrides=[{"match": "*norm*", "method": "linear", "weights": [1, 3]}],
    )
    found, a, b, old = (merged(models / name) for name in ("out", "m1", "m2", "base"))
    name = "model.embed_tokens.weight"
    np.testing.assert_array_equal(found[name], old[name])
    name = "model.norm.weight"
    np.testing.assert_allclose(found[name], 0.25 * a[name] + 0.75 * b[name], rtol=1e-6)
    name = "model.layers.3.mlp.weight"
    np.testing.assert_array_equal(
        found[name], tbfast.merge_tensors([a[name], b[name]], name=name, base=old[name])
    )
    tbfast.merge_checkpoints(inputs(models), models / "only", include=["*norm*"])
    only = merged(models / "only")
    np.testing.assert_array_equal(only["model.scale"], a["model.scale"])


def test_merging_imports_neither_torch_nor_numpy_extras(models):
    code = (
        "import sys, tbfast; "
        f"tbfast.merge_checkpoints([{str(models / 'm1')!r}, {str(models / 'm2')!r}], "
        f"{str(models / 'out')!r}); print(*(m for m in ('torch', 'scipy') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# -- refusals -------------------------------------------------------------------------------------


def refused(models, message, kind=CheckpointError, **options):
    """The merge fails with one line and leaves nothing."""
    before = sorted(p.name for p in models.iterdir())
    paths = options.pop("paths", inputs(models))
    with pytest.raises(kind, match=message) as caught:
        tbfast.merge_checkpoints(paths, options.pop("out", models / "out"), **options)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in models.iterdir()) == before


def rewrite(models, change, name="m2"):
    """Change the tensors of a model."""
    content = merged(models / name)
    change(content)
    save_file(content, models / name / "model.safetensors")


def test_models_that_do_not_fit_are_refused_by_name(models):
    rewrite(models, lambda c: c.pop("model.norm.weight"))
    refused(models, r"m2' lacks 'model.norm.weight', which another model has; use on_missing")
    tbfast.merge_checkpoints(inputs(models), models / "skipped", on_missing="skip")
    assert "model.norm.weight" not in merged(models / "skipped")
    tbfast.merge_checkpoints(
        inputs(models), models / "based", on_missing="base", base=models / "base", method="linear"
    )
    a, old = merged(models / "m1"), merged(models / "base")
    np.testing.assert_allclose(
        merged(models / "based")["model.norm.weight"],
        0.5 * (a["model.norm.weight"] + old["model.norm.weight"]),
        rtol=1e-6,
    )


def test_shapes_that_differ_are_refused_with_a_hint(models):
    name = "model.embed_tokens.weight"
    rewrite(models, lambda c: c.update({name: np.zeros((72, 16), np.float32)}))
    refused(models, r"shape \[72, 16\], but .* with \[64, 16\]; the vocabularies differ")
    rewrite(models, lambda c: c.update({name: np.zeros((64, 8), np.float32)}))
    refused(models, "they are not tuned from the same model")


def test_dtypes_that_differ_need_a_wish(models):
    rewrite(models, lambda c: c.update({n: v.astype(np.float16) for n, v in c.items()}))
    refused(models, r"in F16, but .* in F32; say what to write with dtype=")
    tbfast.merge_checkpoints(inputs(models), models / "out", dtype="f32")
    found, a, b = (merged(models / name) for name in ("out", "m1", "m2"))
    for name, value in found.items():
        assert ((value == a[name]) | (value == b[name].astype(np.float32))).all()


def test_integers_are_not_averaged(models):
    for name in ("m1", "m2"):
        rewrite(models, lambda c: c.update({"ids": np.arange(6)}), name)
    tbfast.merge_checkpoints(inputs(models), models / "same", method="linear")
    np.testing.assert_array_equal(merged(models / "same")["ids"], np.arange(6))
    rewrite(models, lambda c: c.update({"ids": np.arange(1, 7)}))
    refused(models, r"differ in 'ids' \(I64\), which cannot be averaged", method="linear")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("method", ["select", "linear"])
def test_nan_is_refused_with_its_place_or_let_through(models, bad, method):
    def spoil(content):
        content["model.layers.2.mlp.weight"][3, 5] = bad

    rewrite(models, spoil)
    refused(
        models,
        r"m2/model.safetensors' holds NaN or infinity in 'model.layers.2.mlp.weight', first at "
        "element 53; repair it",
        method=method,
    )
    with pytest.warns(UserWarning, match="first at element 53"):
        tbfast.merge_checkpoints(inputs(models), models / "warned", on_nan="warn", method=method)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tbfast.merge_checkpoints(inputs(models), models / "allowed", on_nan="allow", method=method)


def test_overflow_of_the_output_is_refused(models):
    rewrite(models, lambda c: c.update({"model.scale": np.array(1e30, np.float32)}))
    refused(models, "'model.scale' overflows F16 at element 0", dtype="f16", method="linear")


def test_configurations_that_differ_are_refused(models):
    (models / "m2/config.json").write_text(json.dumps(CONFIG | {"model_type": "other"}))
    refused(models, "has model_type='other' in its config.json, but")


def test_tied_and_untied_models_are_not_mixed_unasked(models):
    for name, is_tied in (("m1", True), ("m2", False)):
        config = CONFIG | {"tie_word_embeddings": is_tied}
        (models / name / "config.json").write_text(json.dumps(config))
    head = np.ones((64, 16), np.float32)
    rewrite(models, lambda c: c.update({"lm_head.weight": head}))
    refused(models, r"is not tied and has 'lm_head.weight', but .* is tied and has no")
    tbfast.merge_checkpoints(inputs(models), models / "untied", tied="untie", method="linear")
    embedding = merged(models / "m1")["model.embed_tokens.weight"]
    found = merged(models / "untied")
    np.testing.assert_allclose(found["lm_head.weight"], (embedding + 1) / 2, rtol=1e-6)
    assert json.loads((models / "untied/config.json").read_text())["tie_word_embeddings"] is False
    tbfast.merge_checkpoints(inputs(models), models / "dropped", tied="drop")
    assert "lm_head.weight" not in merged(models / "dropped")
    assert json.loads((models / "dropped/config.json").read_text())["tie_word_embeddings"] is True


def test_tied_tensors_that_are_stored_twice_get_the_same_draws(models):
    for name in ("m1", "m2"):
        config = CONFIG | {"tie_word_embeddings": True}
        (models / name / "config.json").write_text(json.dumps(config))
        rewrite(
            models, lambda c: c.update({"lm_head.weight": c["model.embed_tokens.weight"]}), name
        )
    tbfast.merge_checkpoints(inputs(models), models / "out")
    found = merged(models / "out")
    np.testing.assert_array_equal(found["lm_head.weight"], found["model.embed_tokens.weight"])


def test_outputs_that_would_harm_are_refused(models):
    refused(models, "is or holds the input", ValueError, out=models / "m1", overwrite=True)
    refused(models, "lies in it", ValueError, out=models / "m1/merged")
    refused(models, "exists; choose another output", FileExistsError, out=models / "base")
    refused(models, "there is no folder", FileNotFoundError, out=models / "no/such/out")
    tbfast.merge_checkpoints(inputs(models), models / "base", overwrite=True)
    assert (models / "base/merge_report.json").exists()
    assert not list(models.glob(".*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": ["one"]}, "need two or more models"),
        ({"dtype": "f64"}, "dtype must be None or one of f16, bf16, f32; got 'f64'"),
        ({"shard_size": "5 apples"}, "shard_size must be a size like '5GB'"),
        ({"tied": "yes"}, "tied must be one of"),
        ({"on_nan": "no"}, "on_nan must be one of"),
        ({"threads": 0}, "threads must be 1 or more"),
        ({"on_missing": "base"}, "needs base="),
        ({"overrides": [{"method": "linear"}]}, "an override needs match="),
        ({"overrides": [{"match": "*", "alpha": 1}]}, "unknown option 'alpha' of the override"),
    ],
)
def test_options_out_of_range_are_refused(models, options, message):
    refused(models, message, ValueError, **options)


def test_pickles_and_strangers_are_not_opened(models):
    (models / "m2/model.safetensors").rename(models / "m2/pytorch_model.bin")
    refused(models, r"'pytorch_model.bin' is a pickle, which may run code and is not opened")
    refused(models, "does not exist; check the path", paths=[models / "m1", models / "none"])
    (models / "x.gguf").write_bytes(b"GGUF")
    refused(models, "is no .safetensors file", paths=[models / "m1", models / "x.gguf"])
    refused(models, "path of a checkpoint is empty", paths=[models / "m1", ""])


@pytest.mark.parametrize(
    "shard", ["../out.safetensors", "/etc/passwd", "..", "", "a/b", "a\\b", "C:x", "a\0b"]
)
def test_an_index_cannot_point_outside_its_folder(models, shard):
    (models / "m2/model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": shard}})
    )
    refused(models, "which is no name of a file beside it; it is broken or hostile")


def test_indexes_that_lie_are_refused(models):
    index = models / "m2/model.safetensors.index.json"

    def wrong(weight_map, message):
        index.write_text(json.dumps({"weight_map": weight_map}))
        refused(models, message)

    names = merged(models / "m2")
    wrong({"a": "gone.safetensors"}, "names the shard 'gone.safetensors', which is missing")
    wrong(dict.fromkeys([*names, "more"], "model.safetensors"), "places 'more' in")
    wrong(dict.fromkeys(list(names)[1:], "model.safetensors"), "in a shard but not in its index")
    index.write_text("[]")
    refused(models, "is no index of shards")
    os.truncate(index, 256_000_001)  # sparse: takes no space
    refused(models, "is no index of shards .ValueError: 256000001 bytes are more than any has")
    index.unlink()
    shutil.copy(models / "m2/model.safetensors", models / "m2/more.safetensors")
    refused(models, "in 'model.safetensors' and in 'more.safetensors'")
    empty = b'{"__metadata__":{}}'
    (models / "m1/model.safetensors").write_bytes(len(empty).to_bytes(8, "little") + empty)
    refused(models, "m1' holds no tensors")


def test_a_file_that_shrinks_while_it_is_read_is_noticed(models, monkeypatch):
    from tbfast.merging import run as running

    merge = running._native.merge

    def cut(*arguments, **options):
        os.truncate(models / "m2/model.safetensors", 3000)
        return merge(*arguments, **options)

    monkeypatch.setattr(running._native, "merge", cut)
    refused(models, "was cut while it was read")


def test_an_input_that_changes_meanwhile_is_noticed(models, monkeypatch):
    from tbfast.merging import run as running

    merge = running._native.merge

    def touch(*arguments, **options):
        os.utime(models / "m2/model.safetensors", ns=(1, 1))
        return merge(*arguments, **options)

    monkeypatch.setattr(running._native, "merge", touch)
    refused(models, "an input was changed while it was merged")
