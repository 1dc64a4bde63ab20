"""``tbfast merge`` and its recipes."""

import inspect
import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tbfast
from tbfast.cli import main
from tbfast.merging.recipe import read_recipe


@pytest.fixture
def models(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("base", "a", "b"):
        content = {f"w{i}": rng.standard_normal((20, 30)).astype(np.float32) for i in range(3)}
        save_file(content, tmp_path / f"{name}.safetensors")
    return tmp_path


def paths(models):
    return [str(models / "a.safetensors"), str(models / "b.safetensors")]


def test_a_merge_from_the_command_line_is_that_of_python(models, capsys):
    base, out = str(models / "base.safetensors"), models / "out.safetensors"
    options = ["--method", "ties", "--base", base, "--weights", "1,3", "--density", "0.3"]
    assert main(["merge", *paths(models), "-o", str(out), *options]) == 0
    tbfast.merge_checkpoints(
        paths(models),
        models / "py.safetensors",
        method="ties",
        base=base,
        weights=[1, 3],
        density=0.3,
    )
    assert out.read_bytes() == (models / "py.safetensors").read_bytes()
    assert "3 tensors, 0.01 MB in 1 file" in capsys.readouterr().out


def test_the_report_can_be_read_by_programs(models, capsys):
    out = str(models / "out")
    assert main(["merge", *paths(models), "-o", out, "--json", "--seed", "4"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tensors"] == 3
    assert sum(report["picked"]) == pytest.approx(1)


def test_a_dry_run_writes_nothing_and_says_what_would_be(models, capsys):
    before = sorted(models.iterdir())
    assert main(["merge", *paths(models), "-o", str(models / "out"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "would write to" in printed
    assert "model.safetensors" in printed
    assert "MB of memory" in printed
    assert sorted(models.iterdir()) == before
    file = str(models / "mine.safetensors")
    assert main(["merge", *paths(models), "-o", file, "--dry-run"]) == 0
    assert "  mine.safetensors  " in capsys.readouterr().out
    assert sorted(models.iterdir()) == before


def test_a_warning_is_one_line_in_the_program_s_own_words(models):
    one = paths(models)[0]
    command = [sys.executable, "-m", "tbfast", "merge", one, one, "-o", str(models / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == f"tbfast: warning: model '{one}' is there twice; is it meant to be?\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--density", "0.3"], "density changes nothing: select does not use it"),
        (["--method", "linear", "--t", "0.5"], "t changes nothing: linear does not use it"),
        (
            ["--method", "slerp", "--weights", "1,2"],
            "weights changes nothing: slerp does not use it",
        ),
    ],
)
def test_an_option_that_the_method_does_not_use_is_a_warning(models, options, message):
    with pytest.warns(UserWarning, match=f"^{message}$"):
        assert main(["merge", *paths(models), "-o", str(models / "out"), *options]) == 0


def test_an_option_that_an_override_uses_is_none(models):
    tensors = [{"match": "w1", "method": "slerp"}, {"match": "w2", "density": 0.3}]
    (models / "r.json").write_text(json.dumps({"tensors": tensors}))
    command = ["merge", *paths(models), "-o", str(models / "out"), "--config"]
    message = "^density for 'w2' changes nothing: select does not use it$"
    with pytest.warns(UserWarning, match=message) as caught:
        assert main([*command, str(models / "r.json"), "--t", "0.25"]) == 0
    assert len(caught) == 1
    message = "^scale changes nothing: select and slerp do not use it$"
    (models / "r.json").write_text(json.dumps({"tensors": tensors[:1]}))
    with pytest.warns(UserWarning, match=message):
        assert main([*command, str(models / "r.json"), "--overwrite", "--scale", "2"]) == 0


def test_quiet_prints_nothing(models, capsys):
    assert main(["merge", *paths(models), "-o", str(models / "out"), "--quiet"]) == 0
    assert capsys.readouterr().out == ""


RECIPE = {
    "models": ["a.safetensors", "b.safetensors"],
    "base": "base.safetensors",
    "method": "select",
    "seed": 5,
    "tensors": [{"match": "w1", "method": "linear", "weights": [1, 0]}],
}


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_recipe_holds_the_options_and_the_command_line_wins(models, suffix):
    file = models / f"recipe.{suffix}"
    if suffix == "yaml":
        yaml = pytest.importorskip("yaml")
        file.write_text(yaml.safe_dump(RECIPE))
    else:
        file.write_text(json.dumps(RECIPE))
    out = models / "out.safetensors"
    assert main(["merge", "--config", str(file), "-o", str(out), "--seed", "6"]) == 0
    tbfast.merge_checkpoints(
        paths(models),
        models / "py.safetensors",
        base=models / "base.safetensors",
        seed=6,
        overrides=RECIPE["tensors"],
    )
    assert out.read_bytes() == (models / "py.safetensors").read_bytes()
    a = load_file(models / "a.safetensors")
    np.testing.assert_array_equal(load_file(out)["w1"], a["w1"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.json", "{", "r.json' is no valid JSON"),
        ("r.yaml", "a: [", "r.yaml' is no valid YAML"),
        ("r.json", "[]", "r.json' holds no object of options"),
        ("r.json", '{"methods": 1}', "has the unknown option 'methods'; known are base,"),
        ("r.json", "[" * 100_000, "r.json' is nested too deeply"),
        ("r.yaml", "weights: '1,2'", "r.yaml': weights must be a list of numbers, got '1,2'"),
        ("r.yaml", "seed: 1e3", "r.yaml': seed must be a whole number, got '1e3'"),
        ("r.yaml", "overwrite: 1", "r.yaml': overwrite must be true or false, got 1"),
        ("r.yaml", "models: a", "r.yaml': models must be a list of texts, got 'a'"),
        ("r.yaml", "tensors: [w]", "r.yaml': tensors must be a list of objects, got ['w']"),
        ("r.yaml", "tensors: [{t: x}]", "entry 1 of the tensors of recipe '"),
        ("r.yaml", "tensors: [{match: w, seed: 1}]", "has the unknown option 'seed'; known are de"),
        ("none.json", None, "none.json' is no file; check the path"),
        ("r.json", "\udcff", "r.json' is no valid JSON (UnicodeDecodeError: "),
        ("r.yaml", "\udcff", "r.yaml' is no valid YAML (UnicodeDecodeError: "),
    ],
)
def test_recipes_that_are_none_are_refused_in_one_line(models, capsys, name, text, message):
    pytest.importorskip("yaml")
    if text is not None:
        (models / name).write_text(text, errors="surrogateescape")
    arguments = ["merge", *paths(models), "-o", str(models / "out"), "--config", str(models / name)]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_recipe_may_hold_every_option_and_nulls(models):
    known = set(inspect.signature(tbfast.merge_checkpoints).parameters) - {"progress", "overrides"}
    file = models / "r.json"
    file.write_text(json.dumps(dict.fromkeys(known | {"tensors"})))
    assert read_recipe(file) == {}


def test_off_without_quotes_is_off_in_yaml(models):
    pytest.importorskip("yaml")
    file = models / "r.yaml"
    file.write_text("resample: off\ntensors: [{match: w, resample: off}]")
    overrides = [{"match": "w", "resample": "off"}]
    assert read_recipe(file) == {"resample": "off", "overrides": overrides}


def test_a_yaml_recipe_without_pyyaml_says_what_to_install(models, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    (models / "r.yaml").write_text("seed: 1\n")
    arguments = [
        "merge",
        *paths(models),
        "-o",
        str(models / "o"),
        "--config",
        str(models / "r.yaml"),
    ]
    assert main(arguments) == 1
    assert "needs PyYAML; 'pip install pyyaml'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["x"], ["x", "y"], ["x", "y", "-o", "z", "--method", "mean"]]
)
def test_wrong_usage_ends_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["merge", *arguments])
    assert ended.value.code == 2
    capsys.readouterr()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--weights", "1,x"], "--weights: must be numbers like 2,1,1, got '1,x'"),
        (["--resample", "on"], "--resample: must be auto or off or a whole number, got 'on'"),
    ],
)
def test_values_that_are_none_are_named(option, message, capsys):
    with pytest.raises(SystemExit):
        main(["merge", "x", "y", "-o", "z", *option])
    assert message in capsys.readouterr().err


def test_patterns_that_match_nothing_are_named(models):
    out = models / "out.safetensors"
    with pytest.raises(ValueError, match="leave no tensor to merge; names are like 'w0'"):
        tbfast.merge_checkpoints(paths(models), out, include="v*")
    with pytest.warns(UserWarning, match=r"'v\*' is the name of no tensor") as given:
        tbfast.merge_checkpoints(paths(models), out, exclude="v*")
    assert given[0].filename == __file__


def test_no_folder_of_the_name_of_another_format_is_written(models):
    with pytest.raises(ValueError, match=r"out\.bin': name a \.safetensors file or a folder"):
        tbfast.merge_checkpoints(paths(models), models / "out.bin")


def test_a_failure_is_one_line_and_status_1(models, capsys):
    assert main(["merge", paths(models)[0], str(models / "none"), "-o", str(models / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("tbfast: error: checkpoint '")
    assert "does not exist; check the path" in error
    assert error.count("\n") == 1
