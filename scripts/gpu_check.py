"""Everything that needs a GPU, in one go: build, test, measure, and one report.

    python scripts/gpu_check.py [--out out] [--installed] [--dry-run]

By a Python that has torch for CUDA; nothing of it is changed: tbfast is built with its CUDA kernels
into build/gpu_check, with what else is missing to run it. Every step is run, whatever became of
those before, unless there is no GPU. Writes OUT/gpu-check.md and OUT/gpu-check.csv; the exit status
is 0 if no step failed.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build/gpu_check"
SITE = BUILD / "site-packages"
# What tbfast and its GPU tests import: names to import, and to install where they are missing.
NEEDED = {"numpy": "numpy", "safetensors": "safetensors", "rich": "rich", "pytest": "pytest"}
NEEDED |= {"pytest_benchmark": "pytest-benchmark"}
BUILDERS = ("scikit_build_core", "pybind11")
TIMEOUT = 3600  # seconds of a step
FIELDS = [
    *("bench", "case", "contender", "p20_ms", "p50_ms", "p80_ms", "mean_ms", "overhead"),
    *("gb_per_s", "share_of_copy", "rounds", "gpu", "torch", "commit", "date"),
]
Row = dict[str, Any]
Command = list[str]


@dataclass
class Step:
    """Commands, run one after the other until one fails.

    Attributes:
        name: What it is called in the report.
        commands: May be none: then ``reason`` says why.
        prints_rows: Whether its output is lines of JSON, to be put into tables.
        reason: Why the step is skipped, if it is.
    """

    name: str
    commands: list[Command] = field(default_factory=list)
    prints_rows: bool = False
    reason: str = ""


@dataclass
class Outcome:
    """What became of a step."""

    step: Step
    status: str  # "ok", "failed" or "skipped"
    seconds: float
    output: str
    rows: list[Row]


def steps(options: argparse.Namespace) -> list[Step]:
    """What there is to do on this machine."""
    python = [sys.executable]
    dry = ["--dry-run"] if options.dry_run else []
    measure = [*python, str(ROOT / "scripts/gpu_measure.py")]
    # A fault of a kernel ends its process: each backend has processes of its own.
    measured = [
        Step(title, [[*measure, *arguments, *dry]], prints_rows=True)
        for title, *arguments in (
            ("copy bandwidth", "copy"),
            ("spectra, cuda", "spectra", "--backend=cuda"),
            ("spectra, triton", "spectra", "--backend=triton"),
            ("rsvd, cuda", "rsvd", "--backend=cuda"),
            ("rsvd, triton", "rsvd", "--backend=triton"),
            ("training step", "training"),
        )
    ]
    tests = [*python, "-m", "pytest", *_pytest_options(), "-m", "gpu", *_gpu_tests()]
    return [
        Step("machine", [[*measure, "machine", *dry]], prints_rows=True),
        _build(options),
        Step("doctor", [[*python, "-m", "tbfast", "doctor"]]),
        Step("tests, cuda and training", [[*tests, "-k", "not triton"]]),
        Step("tests, triton", [[*tests, "-k", "triton"]]),
        *measured,
        _sanitizer([*measure, "smoke", *dry]),
    ]


def _build(options: argparse.Namespace) -> Step:
    if options.dry_run or options.installed:
        why = "a dry run" if options.dry_run else "--installed"
        return Step("build", reason=f"{why}: tbfast is the one that this Python imports")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", str(ROOT), "--no-deps", "--wheel-dir", str(BUILD)]
    wheel += [f"--config-settings=build-dir={BUILD / 'cmake'}"]
    wheel += ["--config-settings=cmake.define.TB_CUDA=ON"]
    if all(importlib.util.find_spec(name) for name in BUILDERS):
        wheel.append("--no-build-isolation")  # works without a network
    commands = [wheel]
    install = [*pip, "install", "--target", str(SITE), "--upgrade"]
    commands.append([*install, "--no-deps", "--no-index", f"--find-links={BUILD}", "tbfast"])
    missing = [package for name, package in NEEDED.items() if not importlib.util.find_spec(name)]
    if missing:
        commands.append([*install, *missing])
    return Step("build", commands)


def _pytest_options() -> list[str]:
    return ["-c", str(ROOT / "pyproject.toml"), "-q", "-p", "no:cacheprovider"]


def _gpu_tests() -> list[str]:
    """The files with tests marked gpu: others may import what this machine lacks."""
    paths = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(p) for p in paths if "mark.gpu" in p.read_text(encoding="utf-8")]


def _sanitizer(command: Command) -> Step:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return Step("compute-sanitizer", reason="compute-sanitizer is not on PATH")
    checks = ("memcheck", "racecheck", "synccheck")
    return Step(
        "compute-sanitizer",
        [[tool, "--error-exitcode", "1", "--tool", check, *command] for check in checks],
    )


def run(step: Step, site: Path | None) -> Outcome:
    """Runs the commands of a step, the packages in ``site`` before all others; never raises."""
    if step.reason:
        return Outcome(step, "skipped", 0.0, step.reason, [])
    paths = [str(site) if site else "", os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    # Outside the repository, whose tbfast/ would be imported else.
    folder = BUILD / "run"
    folder.mkdir(parents=True, exist_ok=True)
    began, output, status = time.monotonic(), "", "ok"
    for command in step.commands:
        output += f"$ {shlex.join(command)}\n"
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=TIMEOUT,
            )
            output, failed = output + done.stdout, done.returncode != 0
        except (OSError, subprocess.TimeoutExpired) as error:
            output, failed = f"{output}{error}\n", True
        if failed:
            status = "failed"
            break
    rows = _rows(output) if step.prints_rows else []
    return Outcome(step, status, time.monotonic() - began, output, rows)


def _rows(output: str) -> list[Row]:
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def completed(outcomes: Sequence[Outcome]) -> list[Row]:
    """The timed rows of all steps, with what they were measured on and the share of the copy."""
    rows = [row for outcome in outcomes for row in outcome.rows]
    machine: Row = {}
    for row in rows:
        if "bench" not in row:
            machine |= row
    timed = [row for row in rows if "bench" in row]
    limit = next((row["gb_per_s"] for row in timed if row["bench"] == "copy"), None)
    common = {"gpu": machine.get("gpu", "none"), "torch": machine.get("torch", "")}
    common |= {"commit": _commit(), "date": time.strftime("%Y-%m-%d")}
    for row in timed:
        if limit and row.get("gb_per_s", "") != "":
            row["share_of_copy"] = round(row["gb_per_s"] / limit, 3)
        row.update(common)
    return timed


def _commit() -> str:
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def report(outcomes: Sequence[Outcome], rows: Sequence[Row], dry_run: bool) -> str:
    """The report as Markdown."""
    lines = ["# tbfast on a GPU", ""]
    if dry_run:
        lines += ["**Dry run, no GPU**: sizes and times mean nothing.", ""]
    lines += [f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, {platform.node()}", ""]
    lines += _table(
        ["step", "status", "seconds"],
        [[o.step.name, o.status, f"{o.seconds:.1f}"] for o in outcomes],
    )
    shown = [f for f in FIELDS[: FIELDS.index("gpu")] if any(row.get(f, "") != "" for row in rows)]
    if rows:
        lines += ["## Measured", ""]
        lines += _table(shown, [[str(row.get(f, "")) for f in shown] for row in rows])
        lines += [
            "GB/s counts what must be read, each weight once for each Lanczos step, and "
            "share_of_copy relates it to the copy. Overhead is that of the mean step.",
            "",
        ]
    for outcome in outcomes:
        lines += [f"## {outcome.step.name}: {outcome.status}", ""]
        lines += ["```", outcome.output.strip(), "```", ""]
    return "\n".join(lines)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    body = [head, ["---"] * len(head), *rows]
    return [*(f"| {' | '.join(cells)} |" for cells in body), ""]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build, test and measure tbfast on a GPU.")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder of the report")
    parser.add_argument(
        "--installed", action="store_true", help="do not build: take the installed tbfast"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="all steps on the CPU, with tiny sizes"
    )
    options = parser.parse_args(arguments)
    site = None if options.dry_run or options.installed else SITE
    outcomes = []
    for step in steps(options):
        if outcomes and outcomes[0].status == "failed":
            step.reason = "this machine will not do, see above"
        print(f"{step.name} ...", flush=True)
        outcomes.append(run(step, site))
        print(f"{step.name}: {outcomes[-1].status}, {outcomes[-1].seconds:.1f} s", flush=True)
        if outcomes[-1].status == "failed":
            print(outcomes[-1].output, file=sys.stderr)
    rows = completed(outcomes)
    options.out.mkdir(parents=True, exist_ok=True)
    markdown, table = options.out / "gpu-check.md", options.out / "gpu-check.csv"
    markdown.write_text(report(outcomes, rows, options.dry_run), encoding="utf-8")
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"report: {markdown.resolve()} and {table.resolve()}")
    return 1 if any(o.status == "failed" for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
