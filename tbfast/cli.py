"""The ``tbfast`` command.

Modules are imported by the command that needs them: ``--help`` starts without torch.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tbfast import __version__
from tbfast.backends import BACKENDS
from tbfast.compare_cli import add_parser as add_compare
from tbfast.merging.cli import add_parser as add_merge

if TYPE_CHECKING:
    from tbfast.report import Report

# Written out, because the modules that define them import NumPy and torch.
_FITS = ("median", "ks", "peak", "tail")
_METHODS = ("auto", "exact", "sketch")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Those after the program's name; None takes the command line.

    Returns:
        Exit status: 0 on success, 1 when the input or the machine failed (one line on standard
        error), 130 when interrupted. Wrong usage raises ``SystemExit(2)``.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name in a checkpoint may be any Unicode
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("tbfast: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader has left. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # SIGPIPE, as a shell reports it
    except Exception as error:
        if options.debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"tbfast: error: {text}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tbfast",
        description="Heavy-tailed spectra of neural network weights.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tbfast {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    analyze = commands.add_parser(
        "analyze",
        parents=[common],
        allow_abbrev=False,
        help="alpha and norms of every weight of a checkpoint",
        description="Alpha and norms of every weight of a checkpoint, in model order.",
    )
    add = analyze.add_argument
    add("checkpoint", metavar="CKPT", help=".safetensors or torch.save file, index, or folder")
    add("--fit", choices=_FITS, default="median", help="how xmin is chosen (default: median)")
    add("--xmin-pos", type=_above_one, metavar="X", help="median fit: xmin at index N/X (2)")
    add("--k", type=_at_least(2), metavar="K", help="tail fit: number of eigenvalues (64)")
    add("--method", choices=_METHODS, default="auto", help="how eigenvalues are found")
    add("--include", action="append", metavar="GLOB", help="only these names; may be repeated")
    add("--exclude", action="append", metavar="GLOB", help="not these names; may be repeated")
    add("--min-eigs", type=_at_least(0), default=50, metavar="N", help="no alpha under N (50)")
    add("--json", metavar="FILE", help="write the report as JSON; '-' prints it")
    add("--csv", metavar="FILE", help="write the table as CSV")
    add("--html", metavar="FILE", help="write a page with picture and table")
    add("--plot", metavar="FILE", help="draw alpha by layer (.png, .svg or .pdf)")
    add("--backend", choices=BACKENDS, default="auto", help="what computes (default: auto)")
    add("--seed", type=_at_least(0), default=0, metavar="N", help="of randomized methods (0)")
    add("--quiet", action="store_true", help="print nothing but errors")
    analyze.set_defaults(run=_analyze)

    bench = commands.add_parser(
        "bench",
        parents=[common],
        allow_abbrev=False,
        help="how fast this machine is, tbfast on it, and torch",
        description="Check tbfast on this machine, then time it side by side with torch.",
    )
    bench.add_argument("--quick", action="store_true", help="a part of it, in 20 seconds, not 120")
    bench.add_argument("--csv", metavar="FILE", help="write the figures as CSV")
    bench.set_defaults(run=_bench)

    add_compare(commands, common)
    add_merge(commands, common)

    doctor = commands.add_parser(
        "doctor",
        parents=[common],
        allow_abbrev=False,
        help="what is installed, what is missing, and how to get it",
    )
    doctor.set_defaults(run=_doctor)
    return parser


def _analyze(options: argparse.Namespace) -> int:
    from tbfast.files import check_writable

    outputs = [options.csv, options.html, options.plot]
    outputs += [options.json] if options.json != "-" else []
    given = [path for path in outputs if path is not None]
    for path in given:
        check_writable(path)
    _check_distinct(options.checkpoint, given)
    if options.plot is not None:
        from tbfast.plot import check_plot

        check_plot(options.plot)
    from tbfast.analyzer import analyze

    fit_options: dict[str, Any] = {"xmin_pos": options.xmin_pos, "k": options.k}
    report = analyze(
        options.checkpoint,
        fit=options.fit,
        method=options.method,
        include=options.include,
        exclude=options.exclude,
        min_eigs=options.min_eigs,
        backend=options.backend,
        seed=options.seed,
        progress=sys.stderr.isatty() and not options.quiet,
        **{name: value for name, value in fit_options.items() if value is not None},
    )
    if options.csv is not None:
        report.to_csv(options.csv)
    if options.html is not None:
        from tbfast.files import write_whole
        from tbfast.html import render

        write_whole(options.html, render(report))
    if options.plot is not None:
        report.plot(options.plot)
    if options.json == "-":
        print(report.to_json())
    elif options.json is not None:
        report.to_json(options.json)
    if not options.quiet and options.json != "-":
        _show(report)
    return 0


def _show(report: Report) -> None:
    """Print the table: with colour on a terminal, as plain text into a pipe."""
    if not sys.stdout.isatty():
        print(report)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from tbfast.report import table

    head, *rows = table(report)
    console = Console()
    # A narrow terminal shows what fits beside a name, with the note below it.
    wide = console.width >= 120
    shown = range(len(head)) if wide else range(head.index("error") + 1)
    largest = report.summary()["max_alpha"]
    grid = Table(box=None, header_style="bold", pad_edge=False)
    for column in shown:
        words = head[column] in ("layer", "note")
        justify: Literal["left", "right"] = "left" if words else "right"
        grid.add_column(head[column], justify=justify, overflow="fold", no_wrap=not words)
    for layer, row in zip(report, rows, strict=True):
        name = row[0] if wide or not layer.note else f"{row[0]}\n  {layer.note}"
        style = "dim" if layer.reason else "bold yellow" if layer.alpha == largest else ""
        grid.add_row(Text(name), *(Text(row[column]) for column in shown[1:]), style=style)
    console.print(grid)
    console.print(Text(f"\n{report.summary_line()}"))
    if report.alphas:
        legend = "Yellow: the largest alpha. Less trained layers have a larger alpha, but so do "
        console.print(Text(f"{legend}matrices far from square.", style="dim"))


def _check_distinct(checkpoint: str, outputs: list[str]) -> None:
    """Refuse outputs that would overwrite each other or a file of the checkpoint."""
    source = Path(checkpoint).resolve()
    kept = {source, *source.iterdir()} if source.is_dir() else {source}
    if source.name.endswith(".index.json"):
        kept.update(source.parent.iterdir())
    for path in outputs:
        target = Path(path).resolve()
        if target in kept:
            raise ValueError(
                f"cannot write '{path}': the name is taken by the checkpoint, its folder or "
                "another output; choose another name"
            )
        if target.is_file() or not target.exists():  # a device takes any number
            kept.add(target)


def _bench(options: argparse.Namespace) -> int:
    from tbfast.bench import print_table

    if options.csv is not None:
        from tbfast.files import check_writable

        check_writable(options.csv)
    print_table(options.quick, options.csv)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from tbfast.doctor import diagnose

    text, works = diagnose()
    print(text)
    return 0 if works else 1


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return number


def _above_one(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 1, got '{text}'")
    return value
