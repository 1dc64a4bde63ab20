"""Presets and the one place where they meet the user's own options.

``tempbalance``: Zhou et al., NeurIPS 2023. ``model-balancing``: Liu et al., EMNLP 2024. ``llr``:
layer-wise learning rates for pre-training, arXiv 2605.22297. An argument that is None takes the
preset's value; any other value wins over the preset.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from tbfast.alpha import fit_options
from tbfast.backends import get_backend
from tbfast.fitting import FitKind, FitOptions
from tbfast.rates import MappingName, check_mapping
from tbfast.sketching import SketchOptions
from tbfast.spectra import Method, check_method

TieNorms = Literal["name", "order", "block", "none"]
GroupBy = Literal["block", "type", "layer"]
Of = Literal["weight", "grad", "momentum"]
OfWhat = Literal["lr", "weight_decay"]

_RATES: dict[str, dict[str, Any]] = {
    "tempbalance": {"mapping": "linear", "low": 0.5, "high": 1.5, "xmin_pos": 2.0},
    "model-balancing": {
        "mapping": "sigmoid",
        "low": 10**-0.5,
        "high": 10**0.5,
        "xmin_pos": 1.5,
        "group_by": "block",
    },
    "llr": {"mapping": "linear", "low": 1.0, "high": 5.0, "xmin_pos": 2.0},
}
PRESETS = tuple(_RATES)

_SELECTIONS: dict[str, dict[str, Any]] = {
    "tempbalance": {"skip_first": True, "skip_last": True, "min_eigs": 50, "tie_norms": "name"},
    "model-balancing": {
        "skip_first": False,
        "skip_last": True,
        "min_eigs": 50,
        "tie_norms": "block",
        "skip_small_first": True,
    },
    "llr": {
        "skip_first": False,
        "skip_last": False,
        "min_eigs": 2,
        "tie_norms": "none",
        "embeddings": True,
    },
}
_DEFAULTS: dict[str, Any] = {"fit": "median", "group_by": "layer", "ema": 0.0}
_FIT_OPTIONS = ("xmin_pos", "smooth", "k", "bins", "peak_compat")
_SKETCH_OPTIONS = ("probes", "steps")
_MAPPING_OPTIONS = ("clip", "exp_temp", "factors")


@dataclass(frozen=True)
class Selection:
    """Which layers are tuned.

    Attributes:
        skip_first, skip_last: Leave out the first or last analysed layer.
        min_eigs: Leave out layers with fewer eigenvalues, zeros included; at least 2.
        tie_norms: Which normalisation layers share the rate of a tuned layer.
        skip_small_first: Apply ``min_eigs`` before ``skip_first`` and ``skip_last``.
        embeddings: Embeddings count as layers.
    """

    skip_first: bool
    skip_last: bool
    min_eigs: int
    tie_norms: TieNorms
    skip_small_first: bool = False
    embeddings: bool = False


@dataclass(frozen=True)
class Options:
    """Options of a ``Balancer``, resolved and checked; meanings at ``TempBalance``."""

    mapping: MappingName
    low: float
    high: float
    mapping_options: dict[str, Any]
    fit: FitOptions
    sketch: SketchOptions
    filter_zeros: float | None = None
    every: int = 1
    budget: float | None = 0.01
    method: Method = "auto"
    of: Of = "weight"
    of_what: OfWhat = "lr"
    shape_correction: Literal["null", "farms"] | None = None
    group_by: GroupBy = "layer"
    ema: float = 0.0
    ramp: int = 0
    rate_classes: int | Literal["auto"] | None = "auto"
    warm_start: int = 0
    start: int | Literal["auto"] = 0
    history: int = 1000
    seed: int = 0
    backend: str = "auto"
    roles_at_high: bool = False


def select_options(preset: str, given: Mapping[str, Any]) -> Selection:
    """The selection of a preset, with the given values that are not None.

    Raises:
        ValueError: On an unknown preset or a value out of range.
    """
    _check_preset(preset)
    chosen = {**_SELECTIONS[preset], **{k: v for k, v in given.items() if v is not None}}
    _check_choice("tie_norms", chosen["tie_norms"], ("name", "order", "block", "none"))
    _check_whole("min_eigs", chosen["min_eigs"], 0)
    chosen["min_eigs"] = max(2, chosen["min_eigs"])  # one eigenvalue has no tail
    return Selection(**chosen)


def resolve(preset: str, given: Mapping[str, Any]) -> Options:
    """The options of a preset, with the given values that are not None.

    Raises:
        TypeError: On an option that does not exist.
        ValueError: On an unknown preset or a value out of range, naming the option.
        RuntimeError: If the backend is not in this installation.
    """
    _check_preset(preset)
    own = {field.name for field in fields(Options)} - {"mapping_options", "roles_at_high", "sketch"}
    known = own | {*_FIT_OPTIONS, *_MAPPING_OPTIONS, *_SKETCH_OPTIONS}
    if unknown := sorted(set(given) - known):
        raise TypeError(f"unknown option {unknown[0]!r}; known are {', '.join(sorted(known))}")
    chosen = {**_DEFAULTS, **_RATES[preset], **{k: v for k, v in given.items() if v is not None}}
    # None is a value of these: no limit, and no rounding.
    chosen |= {k: given[k] for k in ("budget", "rate_classes") if k in given}
    kind: FitKind = chosen.pop("fit")
    sketch = {k: chosen.pop(k) for k in _SKETCH_OPTIONS if k in chosen}
    fit = fit_options(kind, {k: chosen.pop(k) for k in _FIT_OPTIONS if k in chosen})
    drawn = SketchOptions(**sketch, seed=chosen.get("seed", 0))
    extra: dict[str, Any] = {k: chosen.pop(k) for k in _MAPPING_OPTIONS if k in chosen}
    if chosen["mapping"] == "fixed" and "factors" not in extra:
        raise ValueError("mapping='fixed' needs factors={glob: ratio}")
    options = Options(
        fit=fit, sketch=drawn, mapping_options=extra, roles_at_high=preset == "llr", **chosen
    )
    _check(options)
    return options


def _check(o: Options) -> None:
    names = {"names": ()} if o.mapping == "fixed" else {}
    check_mapping(o.mapping, o.low, o.high, {**o.mapping_options, **names})
    check_method(o.method)
    get_backend(o.backend)
    _check_choice("of", o.of, ("weight", "grad", "momentum"))
    _check_choice("of_what", o.of_what, ("lr", "weight_decay"))
    _check_choice("group_by", o.group_by, ("block", "type", "layer"))
    _check_choice("shape_correction", o.shape_correction, (None, "null", "farms"))
    _check_whole("every", o.every, 1)
    _check_whole("ramp", o.ramp, 0)
    _check_whole("history", o.history, 0)
    if o.rate_classes not in (None, "auto"):
        _check_whole("rate_classes", o.rate_classes, 2)
    _check_whole("warm_start", o.warm_start, 0)
    _check_whole("start", 0 if o.start == "auto" else o.start, 0)
    if o.budget is not None and not 0 < o.budget <= 1:
        raise ValueError(f"budget must lie in (0, 1], or be None for no limit; got {o.budget!r}")
    if o.shape_correction == "null" and o.mapping in ("sqrt", "log2"):
        raise ValueError(
            f"mapping={o.mapping!r} needs alphas above 1, which shape_correction='null' does not "
            "keep; use mapping='linear'"
        )
    if not 0 <= o.ema < 1:
        raise ValueError(f"ema must lie in [0, 1), got {o.ema!r}")
    for option, asks in (
        ("shape_correction='null'", o.shape_correction == "null"),
        ("start='auto'", o.start == "auto"),
    ):
        if asks and o.fit.kind != "median":
            raise ValueError(
                f"{option} knows the alpha of Gaussian noise for fit='median' only, "
                f"got fit={o.fit.kind!r}"
            )
    if o.start == "auto" and o.of != "weight":
        raise ValueError(f"start='auto' asks whether weights left noise; got of={o.of!r}")


def _check_preset(preset: str) -> None:
    _check_choice("preset", preset, PRESETS)


def _check_choice(option: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{option} must be one of {', '.join(map(str, choices))}; got {value!r}")


def _check_whole(option: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{option} must be a whole number of at least {least}, got {value!r}")
