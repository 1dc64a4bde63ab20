"""The command line as a user meets it: output, files, exit status, one line per failure."""

import json
import os
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tbfast
from tbfast.backends import BACKENDS
from tbfast.cli import main
from tbfast.fitting import FIT_KINDS


@pytest.fixture
def checkpoint(tmp_path):
    generator = torch.Generator().manual_seed(0)
    names = ("embed_tokens.weight", "layers.0.q.weight", "layers.1.q.weight", "layers.1.q.tiny")
    shapes = ((80, 60), (60, 60), (60, 120), (4, 4))
    tensors = {
        name: torch.randn(*shape, generator=generator)
        for name, shape in zip(names, shapes, strict=True)
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    return str(path)


def failure(capsys, *arguments):
    """The one line of a run that fails on its input."""
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tbfast: error: ")
    assert err.count("\n") == 1
    return err


# --- analyze ------------------------------------------------------------------------------------


def test_analyze_prints_the_report_as_plain_text_into_a_pipe(checkpoint, capsys):
    assert main(["analyze", checkpoint]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tbfast.analyze(checkpoint)}\n"
    assert "\x1b" not in out
    assert err == ""


def test_analyze_writes_every_form_it_is_asked_for(checkpoint, tmp_path, capsys):
    files = {form: tmp_path / f"r.{form}" for form in ("json", "csv", "html", "svg")}
    options = [f"--{'plot' if form == 'svg' else form}={path}" for form, path in files.items()]
    assert main(["analyze", checkpoint, "--quiet", *options]) == 0
    assert capsys.readouterr() == ("", "")
    report = tbfast.analyze(checkpoint)
    assert json.loads(files["json"].read_text()) == json.loads(report.to_json())
    assert files["csv"].read_text().count("\n") == 1 + len(report)
    assert files["html"].read_text().startswith("<!DOCTYPE html>")
    assert "<svg" in files["svg"].read_text()


def test_json_to_a_dash_is_all_that_is_printed(checkpoint, capsys):
    assert main(["analyze", checkpoint, "--json", "-"]) == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 4


def test_the_options_reach_the_analysis(checkpoint, capsys):
    def layers(*options):
        assert main(["analyze", checkpoint, "--json=-", *options]) == 0
        return json.loads(capsys.readouterr().out)["layers"]

    assert [
        x["name"] for x in layers("--include=layers.*", "--exclude=*0*", "--exclude=*tiny")
    ] == ["layers.1.q.weight"]
    assert layers("--fit=tail", "--k=12")[0]["n_tail"] == 12
    assert layers("--xmin-pos=4")[0]["n_tail"] == 45
    assert layers("--min-eigs=4")[-1]["alpha"] is not None
    assert layers("--fit=ks", "--backend=reference", "--seed=3", "--method=exact")


def test_an_analysis_in_which_every_layer_failed_is_shown_and_succeeds(tmp_path, capsys):
    save_file({"w": torch.full((60, 60), float("nan"))}, tmp_path / "m.safetensors")
    assert main(["analyze", str(tmp_path)]) == 0
    assert "not finite" in capsys.readouterr().out


def test_the_choices_are_those_of_the_library(capsys):
    with pytest.raises(SystemExit):
        main(["analyze", "--help"])
    out = capsys.readouterr().out
    assert f"{{{','.join(FIT_KINDS)}}}" in out
    assert f"{{{','.join(BACKENDS)}}}" in out


class Terminal:
    """Standard output that says it is a terminal."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass

    def isatty(self):
        return True


@pytest.mark.parametrize("columns", [80, 160])
def test_a_terminal_gets_colour_and_no_line_wider_than_it(checkpoint, monkeypatch, columns):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main(["analyze", checkpoint]) == 0
    plain = "".join(part.partition("m")[2] for part in f"m{terminal.text}".split("\x1b["))
    assert max(map(len, plain.splitlines())) <= columns
    for name in tbfast.analyze(checkpoint).alphas:
        assert name in plain
    assert ("stable rank" in plain) == (columns == 160)
    assert "too few eigenvalues" in plain
    largest = max(tbfast.analyze(checkpoint), key=lambda x: x.alpha if x.reason is None else 0)
    assert f"\x1b[1;33m{largest.name}" in terminal.text


# --- failures -----------------------------------------------------------------------------------


def test_a_missing_checkpoint_is_one_line_with_its_name(capsys):
    assert "'none.safetensors' does not exist" in failure(capsys, "analyze", "none.safetensors")


def test_patterns_that_match_nothing_are_one_line(checkpoint, capsys):
    assert "zzz" in failure(capsys, "analyze", checkpoint, "--include", "zzz")


def test_a_sketch_from_the_command_line_says_so(checkpoint, capsys):
    assert main(("analyze", str(checkpoint), "--method", "sketch", "--json", "-")) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert {layer["method"] for layer in layers if layer["n_eigs"] > 20} == {"sketch"}


@pytest.mark.parametrize("option", ["--json", "--csv", "--html", "--plot"])
def test_an_output_without_a_folder_is_refused_before_the_work(tmp_path, capsys, option):
    # The checkpoint is missing as well: the output is judged first.
    place = tmp_path / "absent" / "r.png"
    assert "no folder" in failure(capsys, "analyze", "none.safetensors", option, str(place))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(
    os.name == "nt" or (hasattr(os, "geteuid") and os.geteuid() == 0), reason="root may write"
)
def test_an_output_that_may_not_be_written_is_refused_before_the_work(tmp_path, capsys):
    tmp_path.chmod(0o500)
    line = failure(capsys, "analyze", "none.safetensors", "--csv", str(tmp_path / "r.csv"))
    assert "permission" in line


def test_a_picture_of_an_unknown_kind_is_refused_before_the_work(tmp_path, capsys):
    place = str(tmp_path / "r.gif")
    assert ".png" in failure(capsys, "analyze", "none.safetensors", "--plot", place)


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="does not exist"):
        main(["analyze", "none.safetensors", "--debug"])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unheard-of"],
        ["analyze"],
        ["analyze", "m.safetensors", "--fit=mean"],
        ["analyze", "m.safetensors", "--xmin-pos=1"],
        ["analyze", "m.safetensors", "--k=1"],
        ["analyze", "m.safetensors", "--k=many"],
        ["analyze", "m.safetensors", "--min-eigs=-1"],
        ["analyze", "m.safetensors", "--backend=abacus"],
        ["analyze", "m.safetensors", "--inc=x"],
    ],
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: tbfast" in capsys.readouterr().err


def test_an_interrupt_is_one_line_and_exits_with_130(checkpoint, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("tbfast.analyzer.analyze", interrupt)
    assert main(["analyze", checkpoint]) == 128 + signal.SIGINT
    assert capsys.readouterr() == ("", "tbfast: interrupted\n")


@pytest.mark.skipif(os.name == "nt", reason="pipes break otherwise on Windows")
def test_a_reader_that_leaves_is_no_error(checkpoint):
    command = [sys.executable, "-m", "tbfast", "analyze", checkpoint]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_names_beyond_the_encoding_of_the_output_are_escaped(tmp_path):
    save_file({"gewichtß😀": torch.eye(60) + 0.1}, tmp_path / "m.safetensors")
    done = subprocess.run(
        [sys.executable, "-m", "tbfast", "analyze", str(tmp_path)],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=True,
    )
    assert rb"gewicht\xdf\U0001f600" in done.stdout


# --- version, doctor ----------------------------------------------------------------------------


def test_the_program_and_the_module_print_the_version():
    command = [sys.executable, "-m", "tbfast", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"tbfast {tbfast.__version__}\n"


def test_the_installed_program_is_the_main_function():
    (entry,) = metadata.entry_points(group="console_scripts", name="tbfast")
    assert entry.load() is main


def doctor(capsys):
    status = main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    width = len(lines[0]) - len(lines[0].removeprefix("tbfast").lstrip())
    return status, {line[:width].strip(): line[width:] for line in lines}


def test_doctor_names_versions_backends_and_what_is_missing(capsys, monkeypatch):
    monkeypatch.delenv("TBFAST_BACKEND", raising=False)
    monkeypatch.setenv("TBFAST_TYPO", "1")
    status, found = doctor(capsys)
    assert status == 0
    assert found["tbfast"] == tbfast.__version__
    assert found["torch"] == torch.__version__
    assert found["backend reference"].startswith("yes")
    assert found["backend native"].startswith("yes")
    assert found["backend cuda"].startswith("no; ")
    assert int(found["threads"]) >= 1
    assert found["instruction set"]
    assert found["pandas"] == metadata.version("pandas")
    assert found["TBFAST_BACKEND"] == "not set"
    assert "no such variable" in found["TBFAST_TYPO"]


def test_doctor_says_how_to_get_what_is_not_installed(capsys, monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert "pip install matplotlib" in doctor(capsys)[1]["matplotlib"]


def test_doctor_fails_where_the_kernels_do_not_load(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tbfast._native", None)
    status, found = doctor(capsys)
    assert status == 1
    assert "tbfast._native" in found["kernels"]
    assert "reinstall" in found["kernels"]


def test_doctor_fails_on_a_variable_out_of_range(monkeypatch):
    done = subprocess.run(
        [sys.executable, "-m", "tbfast", "doctor"],
        capture_output=True,
        text=True,
        env={**os.environ, "TBFAST_ISA": "abacus"},
        check=False,
    )
    assert done.returncode == 1
    assert "TBFAST_ISA" in next(x for x in done.stdout.splitlines() if x.startswith("kernels"))
    assert done.stderr == ""


@pytest.mark.parametrize("form", ["--json", "--csv", "--html", "--plot"])
def test_no_output_overwrites_the_checkpoint(checkpoint, tmp_path, capsys, form):
    before = Path(checkpoint).read_bytes()
    picture = tmp_path / "link.png"
    picture.symlink_to(checkpoint)
    message = failure(capsys, "analyze", str(checkpoint), form, str(picture))
    assert "the name is taken by the checkpoint" in message
    assert Path(checkpoint).read_bytes() == before


def test_two_outputs_need_two_names(checkpoint, tmp_path, capsys):
    same = str(tmp_path / "report")
    message = failure(capsys, "analyze", str(checkpoint), "--json", same, "--csv", same)
    assert "another output" in message


def test_a_pipe_may_take_an_output(checkpoint, tmp_path):
    command = [sys.executable, "-m", "tbfast", "analyze", str(checkpoint), "--quiet"]
    result = subprocess.run(
        [*command, "--csv", "/dev/stdout"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("name,")
