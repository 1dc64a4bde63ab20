"""The same experiment under several variants: who runs what, in which order, and what is kept."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tbfast.compare_journal import FILE, Journal
from tbfast.compare_report import Comparison
from tbfast.compare_stats import Goal, Run
from tbfast.compare_variants import (
    FIXED_FROM,
    MakeOptimizer,
    VariantOptions,
    choose_variants,
    seed_everything,
)
from tbfast.files import PathLike
from tbfast.progress import Progress, ticking

Train = Callable[..., Any]


def compare(
    train: Train,
    *,
    variants: Sequence[str] | Mapping[str, Mapping[str, Any] | None] | None = None,
    rates: Sequence[float],
    seeds: Sequence[int],
    out: PathLike | None = None,
    progress: Progress = None,
    every: int = 100,
    goal: Goal = "min",
    **options: Any,
) -> Comparison:
    """Does layer-wise balancing help here? Train under every variant, with paired statistics.

    ``train(make_optimizer, *, seed, rate)`` builds a model, gets its optimizer from
    ``make_optimizer(model, torch.optim.AdamW, lr=rate)`` (or hands in its own:
    ``make_optimizer.attach(optimizer, model)``), trains, and returns
    ``dict(validation=..., test=...)``, or one number that is both. Data, initial weights and
    batches must depend on ``seed`` alone; the global generators of torch, NumPy and Python are
    seeded with it before each call. It is called once for each variant, rate and seed, in this
    process. A run with a metric that is not finite, or that raises once a parameter is not, is a
    failed run: it counts as worst and the comparison goes on.

    Variants, in the order of their names above:

    - ``"plain"``: no factors
    - ``"published"``: the preset's map, exact, refreshed every ``every`` steps, without a budget
    - ``"every-step"``: the map from fresh spectra at every step, :func:`tbfast.attach` as it is
    - ``"shape-corrected"``: alpha relative to that of noise of the same shape
    - ``"reverse"``, a control: the linear map with its ends swapped
    - ``"fixed"``, a control: constants that look at no alpha, for each layer type the mean factor
      that ``"every-step"`` found at the same rate with the first seed

    Args:
        train: The experiment.
        variants: None for all of these, a list of their names, or a dict of one's own: name to
            options of :func:`tbfast.attach`; None for no factors; ``fixed_from`` with the name of
            another variant for constants like those of ``"fixed"``.
        rates: Learning rates to search, three or more; each variant gets its own best.
        seeds: Whole numbers, two or more. With all variants a difference shows from 4.6 standard
            errors up with 5 seeds, from 3.3 with 10.
        out: Folder for ``runs.jsonl`` (a line per finished run), ``table.md``, ``runs.csv``,
            ``comparison.json`` and, with matplotlib, ``comparison.png``. Calling again with the
            same folder repeats no finished run; the folder does not know whether ``train``
            changed.
        progress: None for a bar where standard error is a terminal; else as for
            :func:`tbfast.analyze`.
        every: Steps between refreshes of ``"published"``, such as the steps of an epoch.
        goal: ``"min"`` if small metrics are good, ``"max"`` if large ones are.
        **options: Options of :func:`tbfast.attach` for every variant with factors, such as
            ``preset="llr"``; a variant's own win.

    Returns:
        A :class:`tbfast.Comparison`; ``print`` it.

    Raises:
        ValueError: If an option is out of range, or ``out`` holds another experiment.
        TypeError: On an option that does not exist.
        RuntimeError: If ``train`` fails, naming variant, seed and rate; finished runs are kept.
        OSError: If ``out`` cannot be written.
    """
    grid, numbers = _distinct("rates", rates, _rate), _distinct("seeds", seeds, _seed)
    if goal not in ("min", "max"):
        raise ValueError(f"goal must be min or max, got {goal!r}")
    chosen = choose_variants(variants, every=every, common=options)
    meanings = {name: _meaning(own, numbers[0]) for name, own in chosen.items()}
    journal = Journal(out, meanings, goal)
    todo = [(v, r, s) for s in numbers for r in grid for v in chosen]
    if progress is None:
        progress = sys.stderr.isatty()
    with ticking(progress, "comparing", len(todo)) as tick:
        for done, (variant, rate, seed) in enumerate(todo):
            name = f"{variant}, rate {rate:g}, seed {seed}"
            tick(done, len(todo), name)
            if (variant, rate, seed) not in journal.runs:
                ratios: Sequence[Mapping[str, float]] = ()
                if source := (chosen[variant] or {}).get(FIXED_FROM):
                    ratios = journal.runs[source, rate, numbers[0]].ratios
                maker = MakeOptimizer(variant, chosen[variant], ratios)
                try:
                    journal.add(_run(train, maker, rate, seed))
                except Exception as error:
                    kept = "; pass out=FOLDER to keep finished runs"
                    if out is not None:
                        kept = f"; finished runs are kept in '{Path(out) / FILE}'"
                    raise RuntimeError(
                        f"train failed in variant {variant!r}, seed {seed}, rate {rate:g}: "
                        f"{type(error).__name__}: {error}{kept}"
                    ) from error
                finally:
                    maker.release()
        tick(len(todo), len(todo), "")
    comparison = Comparison(
        [journal.runs[key] for key in todo],
        variants=chosen,
        rates=grid,
        seeds=numbers,
        goal=goal,
    )
    if out is not None:
        comparison.write(out)
    return comparison


def _run(train: Train, maker: MakeOptimizer, rate: float, seed: int) -> Run:
    """One training, timed; failed if it raises once a parameter is not finite."""
    seed_everything(seed)
    began, note = time.perf_counter(), ""
    try:
        validation, test = _metrics(train(maker, seed=seed, rate=rate))
    except Exception as error:
        if not maker.diverged():
            raise
        validation, test = math.nan, math.nan
        note = f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - began
    overhead = sum(balancer.overhead for balancer in maker.balancers)
    return Run(
        variant=maker.variant,
        rate=rate,
        seed=seed,
        validation=validation,
        test=test,
        seconds=seconds,
        overhead=overhead,
        ratios=maker.finish(),
        note=note,
    )


def _metrics(result: Any) -> tuple[float, float]:
    """Validation and test metric of what ``train`` returned."""
    if isinstance(result, Mapping):
        if missing := [key for key in ("validation", "test") if key not in result]:
            raise TypeError(
                f"it returned a dict without {missing[0]!r}; return dict(validation=..., test=...)"
            )
        return float(result["validation"]), float(result["test"])
    try:
        return float(result), float(result)
    except (TypeError, ValueError):
        raise TypeError(
            f"it returned {type(result).__name__}; return dict(validation=..., test=...) or one "
            "number"
        ) from None


def _meaning(options: VariantOptions, first_seed: int) -> VariantOptions:
    """What a variant's runs depend on: constants also on the seed that they were found with."""
    if options is None or FIXED_FROM not in options:
        return options
    return {**options, "first seed": first_seed}


def _distinct(option: str, values: Sequence[Any], check: Callable[[Any], Any]) -> list[Any]:
    try:
        found = [check(value) for value in values]
    except (TypeError, ValueError):
        found = []
    if not found or len(set(found)) < len(found):
        kind = "numbers above 0" if option == "rates" else "whole numbers of at least 0"
        raise ValueError(f"{option} must be one or more different {kind}, got {values!r}")
    return found


def _rate(value: Any) -> float:
    rate = float(value)
    if not 0 < rate < math.inf:
        raise ValueError
    return rate


def _seed(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value or value < 0:
        raise ValueError
    return int(value)
