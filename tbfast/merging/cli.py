"""``tbfast merge`` and ``tbfast diff``."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tbfast.merging.methods import METHODS, RESCALES
from tbfast.names import counted


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the commands to the subparsers of ``tbfast``."""
    parser = commands.add_parser(
        "merge",
        parents=[common],
        allow_abbrev=False,
        help="merge fine-tuned models, file to file",
        description="Merge fine-tuned models of one architecture. An output that ends in "
        ".safetensors is one file, any other a folder in the layout of Hugging Face.",
    )
    add = parser.add_argument
    add("models", nargs="*", metavar="CKPT", help=".safetensors file, index, or folder")
    add("-o", "--out", metavar="OUT", help="new file or folder")
    add("--config", metavar="FILE", help="recipe (.yaml or .json) of these options")
    add("--method", choices=METHODS, help="default: select")
    add("--base", metavar="CKPT", help="the model that the others were tuned from")
    add("--weights", type=_numbers, metavar="W,W,...", help="one for each model (equal)")
    add("--seed", type=int, metavar="N", help="of the random numbers (0)")
    add(
        "--resample",
        type=_number_or("auto", "off"),
        metavar="auto|off|N",
        help="select: draw again (auto)",
    )
    add("--density", type=float, metavar="D", help="ties, dare: share that is kept (0.5)")
    add("--scale", type=float, metavar="S", help="of the merged differences (1)")
    add("--t", type=float, metavar="T", help="slerp: 0 is the first model, 1 the second (0.5)")
    add("--rescale", choices=RESCALES, help="dare: what makes up for what is dropped (paper)")
    add("--dtype", choices=("keep", "f16", "bf16", "f32"), help="of the output (keep)")
    add("--shard-size", metavar="SIZE", help="most bytes of a file (5GB)")
    add("--include", action="append", metavar="GLOB", help="merge these names; may be repeated")
    add(
        "--exclude", action="append", metavar="GLOB", help="take these from the base or first model"
    )
    add("--tied", choices=("auto", "untie", "drop"), help="embeddings tied in some models only")
    add("--on-nan", choices=("error", "warn", "allow"), help="NaN and infinity (error)")
    add("--on-missing", choices=("error", "base", "skip"), help="tensors not in all models (error)")
    add("--threads", type=int, metavar="N", help="default: all cores")
    add("--resume", action="store_true", help="go on with an interrupted merge")
    add("--overwrite", action="store_true", help="replace an output that exists")
    add("--dry-run", action="store_true", help="check everything, print the plan, write nothing")
    add("--json", action="store_true", help="print the report as JSON")
    add("--quiet", action="store_true", help="print nothing but warnings and errors")
    parser.set_defaults(run=run, usage_error=parser.error)

    diff = commands.add_parser(
        "diff",
        parents=[common],
        allow_abbrev=False,
        help="what fine-tuning has changed, tensor by tensor",
        description="Compare fine-tuned models with their base: the share of elements that each "
        "changed, the share that none did, and how alike the changes are.",
    )
    diff.add_argument(
        "models", nargs="+", metavar="CKPT", help=".safetensors file, index or folder"
    )
    diff.add_argument("--base", required=True, metavar="CKPT", help="what they were tuned from")
    diff.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    diff.add_argument("--json", action="store_true", help="print JSON")
    diff.set_defaults(run=run_diff)

    lora = commands.add_parser(
        "extract-lora",
        parents=[common],
        allow_abbrev=False,
        help="the difference of two models as a LoRA adapter",
        description="Write the difference of a fine-tuned model to its base as an adapter that "
        "PEFT loads, by randomized SVD of every matrix.",
    )
    add = lora.add_argument
    add("base", metavar="BASE", help=".safetensors file, index or folder")
    add("tuned", metavar="TUNED", help="the same of the fine-tuned model")
    add("-o", "--out", required=True, metavar="OUT", help="new folder")
    add("--rank", type=_number_or("auto"), default=32, metavar="N|auto", help="of the adapter (32)")
    add("--energy", type=float, default=0.9, metavar="E", help="rank auto: share to keep (0.9)")
    add("--max-rank", type=int, default=128, metavar="N", help="rank auto: the most (128)")
    add("--seed", type=int, default=0, metavar="N", help="of the random numbers (0)")
    add("--target", action="append", metavar="GLOB", help="modules; may be repeated")
    add("--overwrite", action="store_true", help="replace an output that exists")
    add("--quiet", action="store_true", help="print nothing but warnings and errors")
    lora.set_defaults(run=run_extract)


def run_diff(options: argparse.Namespace) -> int:
    """Compare; returns the exit status."""
    from tbfast.merging.diff import diff_checkpoints, total

    with _one_line_warnings():
        found = diff_checkpoints(
            options.models, options.base, threads=options.threads, progress=sys.stderr.isatty()
        )
    rows = [*found, total(found)]
    if options.json:
        print(json.dumps([row.to_dict() for row in rows], indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("tensor", "shape")
    for heading in ("changed", "in none", "norm", "cosine", "not finite"):
        table.add_column(heading, justify="right")
    for row in rows:
        if row is rows[-1]:
            table.add_section()
        table.add_row(
            row.name,
            "x".join(map(str, row.shape)),
            " ".join(f"{100 * share:.1f} %" for share in row.changed),
            f"{100 * row.unchanged:.1f} %",
            " ".join(f"{norm:.3g}" for norm in row.norms),
            f"{row.cosine:.3f}",
            " ".join(map(str, row.nan_count)),
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 0


def run_extract(options: argparse.Namespace) -> int:
    """Extract an adapter; returns the exit status."""
    from tbfast.merging.lora import extract_lora

    with _one_line_warnings():
        report = extract_lora(
            options.base,
            options.tuned,
            options.out,
            rank=options.rank,
            energy=options.energy,
            max_rank=options.max_rank,
            seed=options.seed,
            targets=options.target,
            overwrite=options.overwrite,
            progress=sys.stderr.isatty() and not options.quiet,
        )
    if not options.quiet:
        ranks = sorted({module.rank for module in report.modules})
        size = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        modules = counted(len(report.modules), "module")
        print(f"'{options.out}': {modules}, {size}, {report.seconds:.1f} s")
        print(f"keeps {100 * report.energy:.1f} % of the squared differences")
        if report.left_out:
            print(f"differ and are left out: {', '.join(report.left_out)}")
    return 0


def run(options: argparse.Namespace) -> int:
    """Merge; returns the exit status."""
    from tbfast.merging.api import merge_checkpoints
    from tbfast.merging.doubts import warn_of_unused
    from tbfast.merging.ranks import world
    from tbfast.merging.recipe import read_recipe

    given = read_recipe(Path(options.config)) if options.config else {}
    own = ("config", "json", "quiet", "run", "usage_error", "debug")
    asked = {name: value for name, value in vars(options).items() if name not in own}
    given |= {name: value for name, value in asked.items() if value not in (None, False, [])}
    if given.get("dtype") == "keep":
        given["dtype"] = None
    models, out = given.pop("models", []), given.pop("out", None)
    if len(models) < 2 or out is None:
        options.usage_error("name two or more models and, with -o, the output")
    progress = sys.stderr.isatty() and not options.quiet
    with _one_line_warnings():
        is_first = world()[0] == 0  # it speaks for all
        if is_first:
            warn_of_unused(given)
        report = merge_checkpoints(models, out, progress=progress, **given)
    if not is_first:
        return 0
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
    elif not options.quiet:
        print(report.text(out, given.get("dry_run", False)))
    return 0


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Warnings as the program's own words, without the line of code that gives them."""
    shown = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: (
        f"tbfast: warning: {' '.join(str(message).split())}\n"
    )
    try:
        yield
    finally:
        warnings.formatwarning = shown


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers like 2,1,1, got '{text}'") from None


def _number_or(*words: str) -> Callable[[str], int | str]:
    def value(text: str) -> int | str:
        try:
            return text if text in words else int(text)
        except ValueError:
            choices = " or ".join((*words, "a whole number"))
            raise argparse.ArgumentTypeError(f"must be {choices}, got '{text}'") from None

    return value
