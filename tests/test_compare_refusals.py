"""compare: what is refused, and the command line."""

import json
import sys

import pytest
import torch
from torch import nn

import tbfast
from tbfast.cli import main


def train(make_optimizer, *, seed, rate):
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3)))
    optimizer = make_optimizer(model, torch.optim.SGD, lr=rate)
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    return 1.0


def compare(function=train, **options):
    return tbfast.compare(function, **{"rates": [0.1], "seeds": [0], **options})


# --- arguments, before anything runs ------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rates": []}, "rates must be one or more different numbers above 0, got []"),
        ({"rates": [0.1, 0.1]}, "rates"),
        ({"rates": [-1]}, "rates"),
        ({"seeds": 5}, "seeds must be one or more different whole numbers"),
        ({"seeds": [0.5]}, "seeds"),
        ({"goal": "low"}, "goal must be min or max, got 'low'"),
        ({"every": 0}, "variant 'published': every must be"),
        ({"variants": ["plane"]}, "no variant 'plane'; known are plain, published"),
        ({"variants": ["reverse"]}, "add 'plain'"),
        ({"variants": []}, "add 'plain'"),
        ({"variants": ["plain", "fixed"]}, "'fixed' takes its ratios from 'every-step'"),
        ({"variants": {"p": None, "f": {"fixed_from": "p"}}}, "'f' takes its ratios from 'p'"),
        ({"variants": {"p": None, "v": {"low": -1}}}, "variant 'v': need 0 < low"),
        ({"preset": "none"}, "variant 'published': preset must be"),
    ],
)
def test_a_bad_value_is_refused_before_the_first_run(options, message):
    def never(make_optimizer, *, seed, rate):
        raise AssertionError

    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        compare(never, **options)


def test_an_option_that_does_not_exist_is_refused_before_the_first_run():
    with pytest.raises(TypeError, match="variant 'v': unknown option 'lowest'"):
        compare(variants={"plain": None, "v": {"lowest": 1}})
    with pytest.raises(TypeError, match="variants must be a list of names or a dict, got 'plain'"):
        compare(variants="plain")


def test_an_out_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(NotADirectoryError, match="name a folder"):
        compare(out=tmp_path / "f")


# --- what train does wrong ----------------------------------------------------------------------


def test_an_exception_in_train_names_the_run_and_keeps_what_is_done(tmp_path):
    def stumbles(make_optimizer, *, seed, rate):
        if (make_optimizer.variant, seed, rate) == ("published", 1, 0.1):
            raise KeyError("loss")
        return train(make_optimizer, seed=seed, rate=rate)

    with pytest.raises(RuntimeError) as caught:
        compare(stumbles, variants=["plain", "published"], seeds=[0, 1], out=tmp_path)
    for part in ("variant 'published'", "seed 1", "rate 0.1", "KeyError: 'loss'", "runs.jsonl"):
        assert part in str(caught.value)
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 3
    assert json.loads(lines[-1])["run"]["variant"] == "plain"
    with pytest.raises(RuntimeError, match="pass out=FOLDER to keep"):
        compare(stumbles, variants=["plain", "published"], seeds=[0, 1])


def no_optimizer(make_optimizer, *, seed, rate):
    return 1.0


def no_step(make_optimizer, *, seed, rate):
    make_optimizer(nn.Sequential(*(nn.Linear(64, 64) for _ in range(3))), torch.optim.SGD, lr=1)
    return 1.0


def no_test(make_optimizer, *, seed, rate):
    train(make_optimizer, seed=seed, rate=rate)
    return {"validation": 1}


def no_number(make_optimizer, *, seed, rate):
    train(make_optimizer, seed=seed, rate=rate)


def other_optimizers(make_optimizer, *, seed, rate):
    train(make_optimizer, seed=seed, rate=rate)
    if make_optimizer.variant == "fixed":
        train(make_optimizer, seed=seed, rate=rate)
    return 1.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (no_optimizer, "it built no optimizer with make_optimizer"),
        (no_step, "variant 'published'.*step that one, not a copy"),
        (no_test, "a dict without 'test'; return dict\\(validation=..., test=...\\)"),
        (no_number, "it returned NoneType"),
        (other_optimizers, "optimizer 2 of the run has no ratios"),
        (lambda make_optimizer: 1, "unexpected keyword argument 'seed'"),
    ],
)
def test_a_train_that_measures_nothing_is_refused(wrong, message):
    with pytest.raises(RuntimeError, match=message):
        compare(wrong)


# --- the command line ---------------------------------------------------------------------------

SCRIPT = """
from helper import train
rates, seeds, every = [0.1, 0.2], range(2), 3
variants = {"plain": None, "mine": {"ema": 0.5}, "other": {"ema": 0.1}}
options = {"method": "exact"}
"""
HELPER = """
import torch
from torch import nn
def train(make_optimizer, *, seed, rate):
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    optimizer = make_optimizer(model, torch.optim.SGD, lr=rate)
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    return {"validation": rate, "test": rate + seed}
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.delitem(sys.modules, "helper", raising=False)
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "script.py").write_text(SCRIPT)
    return str(tmp_path / "script.py")


def failure(capsys, *arguments):
    assert main(["compare", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tbfast: error: ")
    assert err.count("\n") == 1
    return err


def test_a_script_is_compared_and_its_folder_filled(script, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compare", script, "--out", str(out)]) == 0
    text, err = capsys.readouterr()
    assert err == ""
    assert "Verdict: No difference found between plain and mine or other" in " ".join(text.split())
    assert len((out / "runs.jsonl").read_text().splitlines()) == 1 + 3 * 2 * 2
    header = json.loads((out / "runs.jsonl").read_text().splitlines()[0])
    assert header["variants"]["mine"] == {"method": "exact", "ema": 0.5}
    assert (out / "table.md").exists()


def test_the_options_win_over_the_script(script, tmp_path, capsys):
    out = str(tmp_path / "out")
    chosen = ["--rates", "0.5,1e-2", "--seeds", "7,0-1", "--variants", "plain,mine"]
    assert main(["compare", script, *chosen, "--out", out, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert record["rates"] == [0.5, 0.01]
    assert record["seeds"] == [7, 0, 1]
    assert [s["variant"] for s in record["summaries"]] == ["plain", "mine"]


def test_failures_are_one_line(script, tmp_path, capsys):
    assert "script 'none.py' does not exist" in failure(capsys, "none.py")
    assert "only plain, mine, other" in failure(capsys, script, "--variants", "reverse")
    for text, message in (
        ("x = 1", "defines no function train"),
        ("import nothing_of_this_name", "cannot load"),
        ("def train(m, *, seed, rate): 1 / 0", "defines no rates; add them, or pass --rates"),
        ("rates = seeds = [1]\ndef train(m, *, seed, rate): 1 / 0", "ZeroDivisionError"),
        ("options = 1\ndef train(): pass", "'options' of"),
    ):
        (tmp_path / "bad.py").write_text(text)
        assert message in failure(capsys, str(tmp_path / "bad.py"))
    (tmp_path / "bad.txt").write_text("")
    assert "must end in .py" in failure(capsys, str(tmp_path / "bad.txt"))


@pytest.mark.parametrize(
    "arguments", [[], ["s.py", "--rates=a"], ["s.py", "--seeds=0-x"], ["s.py", "--every=0"]]
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["compare", *arguments])
    assert caught.value.code == 2
    assert "usage: tbfast compare" in capsys.readouterr().err
