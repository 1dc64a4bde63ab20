"""The CI files: valid by GitHub's schema, and nothing in them but make targets."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def load(path: Path) -> Any:
    return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))


def make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][a-z-]*):(?!=)", makefile, flags=re.MULTILINE))


def steps() -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{path.name}:{job}", step)
        for path in WORKFLOWS
        for job, body in load(path)["jobs"].items()
        for step in body["steps"]
    ]


def test_there_are_a_ci_and_a_wheels_workflow() -> None:
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "wheels.yml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_workflow_satisfies_githubs_schema(path: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
    command += ["vendor.github-workflows", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_run_step_is_one_make_target_that_exists() -> None:
    commands = [(where, step["run"]) for where, step in steps() if "run" in step]
    targets = make_targets()
    for where, command in commands:
        # make TARGET [VARIABLE=value ...], where a value may hold a ${{ matrix expression }}
        match = re.fullmatch(r"make ([a-z-]+)( [A-Z_]+=([^\s;&|$]|\$\{\{[^}]+\}\})+)*", command)
        assert match, f"{where}: {command!r} is more than a make target"
        assert match[1] in targets, f"{where}: the Makefile has no target {match[1]!r}"
    needed = {"make lint", "make sanitize", "make gpu-static NVCC=pip", "make wheel-cuda NVCC=pip"}
    assert needed <= {command for _, command in commands}


def test_every_action_is_pinned_to_a_commit() -> None:
    for where, step in steps():
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"]), (where, step)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_may_only_read_the_repository(path: Path) -> None:
    assert load(path)["permissions"] == {"contents": "read"}


def test_ci_covers_each_python_with_an_oldest_and_a_newest_torch() -> None:
    matrix = load(ROOT / ".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    torches: dict[str, list[str]] = {}
    for entry in matrix["include"]:
        torches.setdefault(entry["python"], []).append(entry["torch"])
    assert list(torches) == ["3.10", "3.11", "3.12", "3.13", "3.14"]
    assert all(len(set(versions)) == 2 for versions in torches.values())
    assert "2.4.1" in torches["3.10"]


def test_pre_commit_uses_the_versions_of_the_lint_extra() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    for package, repository in (
        ("ruff", "astral-sh/ruff-pre-commit"),
        ("clang-format", "pre-commit/mirrors-clang-format"),
    ):
        pinned = re.search(rf'"{package}==([0-9.]+)"', project)
        used = re.search(rf"{repository}\n +rev: v([0-9.]+)", hooks)
        assert pinned, package
        assert used, package
        assert pinned[1] == used[1]
