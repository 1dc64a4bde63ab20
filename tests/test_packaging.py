"""The installed package: torch plays no part in building it, and it matches its metadata."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import tbfast
from tbfast import _native

ROOT = Path(__file__).parent.parent


def test_the_source_tree_is_not_on_the_import_path() -> None:
    assert ROOT.resolve() not in {Path(entry).resolve() for entry in sys.path}


def test_the_extension_comes_from_the_package_that_is_tested() -> None:
    assert Path(_native.__file__).parent == Path(tbfast.__file__).parent


def test_the_installed_metadata_has_the_packages_version() -> None:
    assert metadata.version("tbfast") == tbfast.__version__


def test_torch_is_needed_to_run_and_not_to_build() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    build_requires = re.search(r"^requires = \[(.*)\]$", project, flags=re.MULTILINE)
    assert build_requires
    assert "torch" not in build_requires[1]
    assert any(line.startswith("torch") for line in metadata.requires("tbfast") or [])


def test_the_extension_names_no_library_of_torch() -> None:
    binary = Path(_native.__file__).read_bytes()
    for library in (b"libtorch", b"libc10", b"c10.dll", b"torch_cpu"):
        assert library not in binary, library


def test_the_extension_loads_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    # None in sys.modules makes `import torch` fail.
    code = (
        "import sys; sys.modules['torch'] = None; from tbfast import _native; print(_native.isa())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == _native.isa()


def test_the_types_of_the_extension_name_what_it_has() -> None:
    stub = ast.parse(Path(tbfast.__file__).with_name("_native.pyi").read_text())
    typed = {node.name for node in stub.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert typed == {name for name in dir(_native) if not name.startswith("_")}
