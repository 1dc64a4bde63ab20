"""The script that checks tbfast on a GPU, here without one: every step, and every failure."""

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts/gpu_check.py"
STEPS = ["machine", "build", "doctor", "tests, cuda and training", "tests, triton"]
STEPS += ["copy bandwidth", "spectra, cuda", "spectra, triton", "rsvd, cuda", "rsvd, triton"]
STEPS += ["training step", "compute-sanitizer"]


@pytest.fixture
def check(monkeypatch, tmp_path):
    """The script as a module, with what it builds in the test's folder."""
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)  # dataclasses look there
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "BUILD", tmp_path / "build")
    return module


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """Output, Markdown and rows of a dry run, as a user starts it."""
    out = tmp_path_factory.mktemp("out")
    command = [sys.executable, str(SCRIPT), "--dry-run", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    markdown = (out / "gpu-check.md").read_text(encoding="utf-8")
    with (out / "gpu-check.csv").open(newline="", encoding="utf-8") as file:
        return done.stdout, markdown, list(csv.DictReader(file))


def code(text):
    return [sys.executable, "-c", text]


def test_a_dry_run_takes_every_step_and_says_where_the_report_is(dry_run):
    printed, markdown, _ = dry_run
    taken = [line.removesuffix(" ...") for line in printed.splitlines() if line.endswith(" ...")]
    assert taken == STEPS
    assert [h for h in STEPS if f"\n## {h}: " in markdown] == STEPS
    assert "## spectra, cuda: ok" in markdown
    assert "gpu-check.md and " in printed.splitlines()[-1]


def test_a_dry_run_is_marked_as_one(dry_run):
    assert "Dry run, no GPU" in dry_run[1]
    assert {row["gpu"] for row in dry_run[2]} == {"none"}


def test_a_dry_run_measures_tbfast_beside_everything_it_is_compared_with(dry_run):
    found = {(row["bench"], row["contender"]) for row in dry_run[2]}
    assert found == {
        ("copy", "torch"),
        *(("spectra", c) for c in ("native", "loop of products", "svdvals")),
        *(("rsvd", c) for c in ("native", "svd_lowrank")),
        *(("training", c) for c in ("plain", "attach")),
    }
    assert all(float(row["p50_ms"]) > 0 for row in dry_run[2])


def test_what_the_sanitizer_watches_runs_for_every_dtype():
    command = [sys.executable, str(SCRIPT.with_name("gpu_measure.py")), "smoke", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["smoke"] for row in rows] == [
        f"torch.{name}" for name in ("float16", "bfloat16", "float32", "float64", "complex64")
    ]
    assert all(row["fitted"] > 0 for row in rows)


def test_the_share_of_the_copy_follows_from_the_bandwidths(dry_run):
    rows = dry_run[2]
    (limit,) = (float(row["gb_per_s"]) for row in rows if row["bench"] == "copy")
    for row in rows:
        if row["gb_per_s"]:
            share = float(row["gb_per_s"]) / limit
            assert float(row["share_of_copy"]) == pytest.approx(share, abs=6e-4)  # three digits


def test_a_bandwidth_of_almost_nothing_is_a_number_too(check):
    """On a busy machine a tiny case read 4 MB in a second: rounded to 0.00 it had no share."""
    row = {"bench": "spectra", "contender": "x", "gb_per_s": 0.004}
    rows = [{"bench": "copy", "contender": "torch", "gb_per_s": 10.0}, row, {**row, "gb_per_s": ""}]
    outcome = check.Outcome(check.Step("spectra", []), "ok", 0.0, "", rows)
    found = [row.get("share_of_copy") for row in check.completed([outcome])]
    assert found == [1.0, 0.0, None]


def test_a_failing_step_is_reported_and_the_others_still_run(check, monkeypatch, tmp_path, capsys):
    row = {"bench": "copy", "case": "c", "contender": "x", "p50_ms": 2.0, "gb_per_s": 1.0}
    steps = [
        check.Step("machine", [code("print('here')")]),
        check.Step("broken", [code("print('to be seen'); raise SystemExit(3)"), code("print(0)")]),
        check.Step("after", [code(f"print('''{json.dumps(row)}''')")], prints_rows=True),
    ]
    monkeypatch.setattr(check, "steps", lambda options: steps)
    assert check.main(["--dry-run", "--out", str(tmp_path)]) == 1
    markdown = (tmp_path / "gpu-check.md").read_text()
    assert "## broken: failed" in markdown
    assert "to be seen" in markdown
    assert "## after: ok" in markdown
    assert "to be seen" in capsys.readouterr().err
    assert len((tmp_path / "gpu-check.csv").read_text().splitlines()) == 1 + 1


def test_the_commands_of_a_step_end_with_the_first_that_fails(check, tmp_path):
    mark = tmp_path / "mark"
    step = check.Step("s", [code("raise SystemExit(1)"), code(f"open({str(mark)!r}, 'w')")])
    assert check.run(step, None).status == "failed"
    assert not mark.exists()


def test_a_step_that_hangs_or_cannot_start_fails(check, monkeypatch):
    monkeypatch.setattr(check, "TIMEOUT", 0.2)
    assert (
        check.run(check.Step("s", [code("import time; time.sleep(60)")]), None).status == "failed"
    )
    missing = check.run(check.Step("s", [["no-such-program"]]), None)
    assert missing.status == "failed"
    assert "no-such-program" in missing.output


def test_rows_before_a_failure_are_kept(check):
    text = 'print(\'{"bench": "b"}\'); raise SystemExit(1)'
    outcome = check.run(check.Step("s", [code(text)], prints_rows=True), None)
    assert (outcome.status, outcome.rows) == ("failed", [{"bench": "b"}])


def test_a_machine_without_a_gpu_is_told_so_before_anything_is_built(
    check, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert check.main(["--out", str(tmp_path)]) == 1
    markdown = (tmp_path / "gpu-check.md").read_text()
    assert "torch sees no GPU; use a Python whose torch is built for one" in markdown
    assert markdown.count(": skipped\n") == len(STEPS) - 1
    capsys.readouterr()


def test_a_real_run_builds_the_cuda_kernels_beside_the_installation(check, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else 1)
    options = check.argparse.Namespace(dry_run=False, installed=False)
    build = check.steps(options)[1]
    assert build.name == "build"
    wheel, install, missing = build.commands
    assert "--config-settings=cmake.define.TB_CUDA=ON" in wheel
    assert "--no-build-isolation" in wheel
    assert install[install.index("--target") + 1] == str(check.SITE)
    assert "--no-deps" in install  # never another torch
    assert missing[-1] == "rich"


def test_the_sanitizer_runs_where_it_is_found(check, monkeypatch):
    monkeypatch.setattr(check.shutil, "which", lambda name: f"/bin/{name}")
    options = check.argparse.Namespace(dry_run=False, installed=True)
    tools = [command[command.index("--tool") + 1] for command in check.steps(options)[-1].commands]
    assert tools == ["memcheck", "racecheck", "synccheck"]


def test_the_files_with_gpu_tests_are_found_and_no_others(check):
    names = [Path(path).name for path in check._gpu_tests()]
    assert "test_gpu.py" in names
    assert "test_rates.py" not in names
