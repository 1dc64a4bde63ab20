"""``diff_checkpoints`` and ``tbfast diff``, against NumPy in float64."""

import json
import math

import numpy as np
import pytest
from safetensors.numpy import save_file

import tbfast
from tbfast.cli import main
from tbfast.errors import CheckpointError
from tbfast.merging.diff import total

DTYPES = (np.float16, np.float32, np.float64)


@pytest.fixture
def models(tmp_path):
    """A base and three models; each tensor is larger than a chunk or tiny."""
    rng = np.random.default_rng(0)
    base = {t.__name__: rng.standard_normal((300, 400)).astype(t) for t in DTYPES}
    base |= {"tiny": rng.standard_normal(30).astype(np.float32), "ids": np.arange(7)}
    save_file(base, tmp_path / "base.safetensors")
    for model in range(3):
        tuned = {}
        for name, old in base.items():
            change = 0.1 * rng.standard_normal(old.shape)
            kept = rng.random(old.shape) < 0.2 * (model + 1)
            tuned[name] = np.where(kept, old, old + change).astype(old.dtype)
        tuned["ids"] = base["ids"] + (np.arange(7) < model)
        save_file(tuned, tmp_path / f"m{model}.safetensors")
    return tmp_path


def inputs(models):
    return [models / f"m{model}.safetensors" for model in range(3)]


def content(file):
    from safetensors.numpy import load_file

    return load_file(file)


@pytest.mark.parametrize("threads", [1, 3])
def test_counts_norms_and_angles_are_numpys(models, threads):
    found = tbfast.diff_checkpoints(inputs(models), models / "base.safetensors", threads=threads)
    base, tuned = content(models / "base.safetensors"), [content(m) for m in inputs(models)]
    assert [d.name for d in found] == sorted(base)
    for diff in found:
        old = base[diff.name].astype(np.float64).ravel()
        new = np.array([t[diff.name].ravel() for t in tuned])
        changed = new != base[diff.name].ravel()
        assert diff.shape == base[diff.name].shape
        assert diff.changed == changed.mean(1).tolist()
        assert diff.unchanged == (~changed.any(0)).mean()
        assert diff.nan_count == [0, 0, 0]
        if diff.name == "ids":
            assert diff.norms == diff.cosines == []
            continue
        delta = new.astype(np.float64) - old
        # Differences of float32 numbers up to 4: 2^-22 each, of 0.1
        norms = np.linalg.norm(delta, axis=1)
        np.testing.assert_allclose(diff.norms, norms, rtol=1e-5)
        cosines = (delta @ delta.T) / np.outer(norms, norms)
        np.testing.assert_allclose(diff.cosines, cosines, atol=1e-5)
        assert diff.cosine == pytest.approx(cosines[np.tril_indices(3, -1)].mean(), abs=1e-5)


def test_all_tensors_together(models):
    found = tbfast.diff_checkpoints(inputs(models), models / "base.safetensors")
    every = total(found)
    assert every.elements == sum(d.elements for d in found)
    assert every.changed[1] == pytest.approx(
        sum(d.changed[1] * d.elements for d in found) / every.elements
    )
    assert every.cosines[0][0] == pytest.approx(1)


def test_numbers_that_are_not_finite_are_counted_and_spoil_their_tensor_alone(models):
    tuned = content(models / "m1.safetensors")
    tuned["float32"][5, 7:10] = [np.nan, np.inf, -np.inf]
    save_file(tuned, models / "m1.safetensors")
    found = {
        d.name: d for d in tbfast.diff_checkpoints(inputs(models), models / "base.safetensors")
    }
    assert found["float32"].nan_count == [0, 3, 0]
    assert math.isnan(found["float32"].norms[1])
    assert math.isfinite(found["float32"].norms[0])
    assert found["float64"].nan_count == [0, 0, 0]


def test_models_of_other_shapes_or_dtypes_are_refused(models):
    tuned = content(models / "m2.safetensors")
    save_file(tuned | {"tiny": np.zeros(4, np.float32)}, models / "m2.safetensors")
    with pytest.raises(
        CheckpointError, match=r"m2.*has 'tiny' as \[4\] of F32, the base as \[30\]"
    ):
        tbfast.diff_checkpoints(inputs(models), models / "base.safetensors")
    with pytest.raises(ValueError, match="need 1 to 32 models"):
        tbfast.diff_checkpoints([], models / "base.safetensors")


def test_tensors_that_not_all_have_are_a_warning_and_none_in_common_an_error(models):
    base, one = models / "base.safetensors", inputs(models)[0]
    save_file(content(one) | {"w10": np.ones(3, np.float32), "w9": np.ones(3)}, one)
    with pytest.warns(UserWarning, match="left out: 2 tensors that are not in all .* 'w9'"):
        found = tbfast.diff_checkpoints([one], base)
    assert len(found) == len(content(base))
    save_file({"other": np.ones(3, np.float32)}, one)
    with pytest.raises(CheckpointError, match="have no name of a tensor in common; is it tuned"):
        tbfast.diff_checkpoints([one], base)


def test_the_command_prints_a_table_or_json(models, capsys):
    base = ["--base", str(models / "base.safetensors")]
    names = [str(m) for m in inputs(models)]
    assert main(["diff", *names, *base]) == 0
    printed = capsys.readouterr().out
    assert "float16" in printed
    assert "300x400" in printed
    assert printed.count("%") > 20
    assert main(["diff", names[0], *base, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[-1]["name"] == "all"
    assert rows[0]["cosine"] is None  # of one model
    assert main(["diff", names[0], "--base", str(models / "none")]) == 1
    assert "does not exist" in capsys.readouterr().err
