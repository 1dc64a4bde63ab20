"""``tbfast compare``: a comparison from a script that defines ``train``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_NAMES = ("rates", "seeds", "variants", "every", "goal", "options")


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the subparsers of ``tbfast``."""
    parser = commands.add_parser(
        "compare",
        parents=[common],
        allow_abbrev=False,
        help="does balancing help? train a script under every variant",
        description="Run train(make_optimizer, *, seed, rate) of a Python file under every variant "
        "and its controls, with paired statistics. The file may also define rates, seeds, "
        "variants, every, goal and options (a dict of options of tbfast.attach).",
    )
    add = parser.add_argument
    add("script", metavar="SCRIPT", help="Python file that defines train")
    add("--rates", type=_rates, metavar="R,R,...", help="learning rates, such as 1e-3,3e-3,1e-2")
    add("--seeds", type=_seeds, metavar="S,S-S,...", help="seeds, such as 0,1,2 or 0-9")
    add("--variants", type=_words, metavar="V,V,...", help="names of variants (default: all)")
    add("--every", type=_steps, metavar="N", help="steps between refreshes of 'published' (100)")
    add("--out", metavar="DIR", help="folder for runs, tables and picture; resumes what it holds")
    add("--quiet", action="store_true", help="print nothing but errors")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Compare; returns the exit status."""
    script = _load(options.script)
    if not callable(getattr(script, "train", None)):
        raise ValueError(
            f"'{options.script}' defines no function train(make_optimizer, *, seed, rate); add one"
        )
    given = {name: getattr(script, name) for name in _NAMES if hasattr(script, name)}
    own = given.pop("options", {})
    if not isinstance(own, dict):
        raise ValueError(f"'options' of '{options.script}' must be a dict, got {own!r}")
    if options.variants is not None and isinstance(given.get("variants"), dict):
        options.variants = _among(given["variants"], options.variants)
    for name in ("rates", "seeds", "variants", "every"):
        if getattr(options, name) is not None:
            given[name] = getattr(options, name)
    for name in ("rates", "seeds"):
        if name not in given:
            raise ValueError(f"'{options.script}' defines no {name}; add them, or pass --{name}")
    from tbfast.compare_run import compare

    progress = False if options.quiet else None
    comparison = compare(script.train, out=options.out, progress=progress, **given, **own)
    if not options.quiet:
        print(comparison)
    return 0


def _load(path: str) -> ModuleType:
    """The file as a module; its folder can be imported from, as when Python runs it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"script '{path}' does not exist")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"script '{path}' is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(path).resolve().parent))
    sys.modules[spec.name] = module  # worker processes and pickles look it up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RuntimeError(f"cannot load '{path}': {type(error).__name__}: {error}") from error
    return module


def _among(variants: dict[str, Any], names: list[str]) -> dict[str, Any]:
    if unknown := [name for name in names if name not in variants]:
        raise ValueError(f"the script has no variant {unknown[0]!r}, only {', '.join(variants)}")
    return {name: variants[name] for name in names}


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _rates(text: str) -> list[float]:
    try:
        return [float(word) for word in _words(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be like 1e-3,3e-3,1e-2, got {text!r}") from None


def _seeds(text: str) -> list[int]:
    found: list[int] = []
    try:
        for word in _words(text):
            first, _, last = word.partition("-")
            found += range(int(first), int(last or first) + 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be like 0,1,2 or 0-9, got {text!r}") from None
    return found


def _steps(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)
