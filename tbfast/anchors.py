"""Anchors: one exact look at every layer, and cheap estimates of alpha from it for a while.

An anchor is one eigendecomposition per layer. From it, alpha of weights that have moved since is
estimated in three ways, each with a standard error against the exact alpha of those weights:

- ``stale``: alpha of the anchor; reads a twentieth of the weights, to see how far they have moved.
- ``lin``: first-order correction by <G, W>, G = d alpha / d W kept as int8; reads W and G once.
  Made in ln T, T = 1 / (alpha - 1): then no movement, however large, can bring alpha below 1.
- ``aligned``: stochastic Lanczos quadrature from probes X = V s, V the eigenvectors of the anchor
  and s random signs, as a ratio to what the same quadrature gives of the anchor itself. Every
  eigenvalue of the anchor has the same weight in such a probe: no probe variance there.

Alpha does not change when W is scaled, so <G, W> = 0 at the anchor and no copy of W is needed. The
estimates share that invariance: G is taken of W / |W|, and how far the weights have moved is the
tangent of the angle they have turned by. Weight decay alone is no movement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tbfast.alpha import AlphaFit
from tbfast.anchored_layer import AnchoredLayer, aligned_runs, flat, kept_rows
from tbfast.backends import CPU_BACKENDS, get_backend
from tbfast.backends.threads import parallel_map, settle
from tbfast.batch import Batch
from tbfast.drift_errors import AnchorErrors
from tbfast.fitting import FitOptions
from tbfast.sketching import SketchTable

Array = NDArray[np.float64]


class Estimates(NamedTuple):
    """Estimated exponents of a batch, arrays (layers,).

    Attributes:
        alpha: NaN where the anchor has none, where the weights are not finite, and where they have
            turned by 90° or more and have nothing to do with the anchor.
        error: Standard error against the exact alpha of the same weights; NaN where alpha is.
    """

    alpha: Array
    error: Array


@dataclass(frozen=True, eq=False)
class Anchors:
    """What the anchors of a batch remember; see :func:`take_anchors`.

    Attributes:
        names, shapes: Of the weights the anchors were taken of.
        options: The fit.
        fit: The exact fit of each layer at the anchor.
        backend: Name of the backend.
        values: For each layer its eigenvalues (matrices, n), ascending, float64, in a unit of the
            layer's own.
        gradient, scales: |W| d alpha / d W as int8 and a float32 scale per row, see
            ``backends.reference.dot``; None if not asked for.
        offset: <gradient, W> / |W| at the anchor, 0 but for rounding, float64 (layers,).
        rows, kept: Kept rows of the weights, see ``backends.reference.drift``.
        kept_share: Share of each layer's rows that is kept, (layers,).
        directions: Those rows of the gradient, float32; None if not asked for.
        rows_offset: What ``offset`` is, estimated from the kept rows.
        probes: For each layer aligned probes, float32 (matrices, p, length); None if not asked for.
        longer: For each layer the longer side of its matrices.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    options: FitOptions
    backend: str
    fit: AlphaFit
    values: list[Tensor]
    gradient: Tensor | None
    scales: Tensor | None
    offset: Array
    rows: Tensor
    kept: Tensor
    kept_share: Array
    directions: Tensor | None
    rows_offset: Array
    probes: list[Tensor] | None
    longer: tuple[int, ...]

    def stale(self, batch: Batch) -> Estimates:
        """Alpha of the anchor.

        Where the gradient was kept, its kept rows tell how much alpha may have changed since, and
        the error says so; else only how far the weights have moved is known.

        Args:
            batch: The same weights, moved; or others of the same names and shapes.

        Raises:
            ValueError: If names or shapes differ.
        """
        turned = self._turned(batch)
        error = self._errors.stale(turned)
        if self.directions is not None:
            change = (self._slope_of_rows(batch) - self.rows_offset) / (self.fit.alpha - 1)
            error = np.hypot(error, change)
        return self._estimates(np.zeros(len(batch)), error)

    def lin(self, batch: Batch) -> Estimates:
        """Alpha of the anchor and its first-order change.

        Args:
            batch: As in :meth:`stale`.

        Raises:
            ValueError: If names or shapes differ, or the gradient was not kept.
        """
        if self.gradient is None:
            raise ValueError("these anchors kept no gradient; take them with gradient=True")
        turned = self._turned(batch)
        change = -(self._slope(batch) - self.offset) / (self.fit.alpha - 1)
        return self._estimates(change, self._errors.lin(turned, change))

    def aligned(self, batch: Batch, steps: int = 20) -> Estimates:
        """Alpha of the anchor times the change that Lanczos quadrature sees from its eigenvectors.

        Args:
            batch: As in :meth:`stale`.
            steps: Lanczos steps, each a pass over the weights.

        Raises:
            ValueError: If names or shapes differ, or no probes were kept.
        """
        table = self.sketch(batch, steps)
        return Estimates(table.fits.alpha, table.sketch_error)

    def sketch(self, batch: Batch, steps: int = 20) -> SketchTable:
        """:meth:`aligned` with all else that the quadrature tells of each layer."""
        if self.probes is None:
            raise ValueError("these anchors kept no probes; take them with probes=8, say")
        turned = self._turned(batch)
        engine = self._engine(batch)
        runs = engine.lanczos(batch, self.probes, steps)
        now: SketchTable = engine.quadrature_fit(runs, self.options)
        before = engine.quadrature_fit(aligned_runs(self.values, runs), self.options).fits.alpha
        with np.errstate(divide="ignore", invalid="ignore"):
            change = np.log((before - 1) / (now.fits.alpha - 1))
        probes = self.probes[0].shape[1]
        found = self._estimates(change, self._errors.aligned(turned, probes, steps))
        return replace(now, fits=replace(now.fits, alpha=found.alpha), sketch_error=found.error)

    def _estimates(self, change: Array, error: Array) -> Estimates:
        """From the change of ln T and the standard error of ln T."""
        with np.errstate(over="ignore"):
            alpha = 1 + (self.fit.alpha - 1) * np.exp(-change)
        alpha[~np.isfinite(alpha + error)] = np.nan
        return Estimates(alpha, (alpha - 1) * error)

    @cached_property
    def _errors(self) -> AnchorErrors:
        return AnchorErrors.of(self.values, self.longer, self.fit, self.options)

    def _turned(self, batch: Batch) -> Array:
        """Tangent of the angle that the kept rows have turned by; NaN from 90° on."""
        self._check(batch)
        moved, along, size = self._engine(batch).drift(batch, self.rows, self.kept)
        with np.errstate(divide="ignore", invalid="ignore"):
            across = np.sqrt(np.maximum(moved * size - along**2, 0))
            return np.where(size + along > 0, across / (size + along), np.nan)

    def _slope_of_rows(self, batch: Batch) -> Array:
        """<G, W> / |W| estimated from the kept rows, which are a sample of all."""
        engine = self._engine(batch)
        moved, along, size = engine.drift(batch, self.rows, self.directions)
        inner, square = along + size, moved + 2 * along + size
        with np.errstate(divide="ignore", invalid="ignore"):
            slope: Array = inner / np.sqrt(square * self.kept_share)
        return slope

    def _slope(self, batch: Batch) -> Array:
        """<G, W> / |W|."""
        inner, square = self._engine(batch).dot(batch, self.gradient, self.scales)
        with np.errstate(divide="ignore", invalid="ignore"):
            slope: Array = inner / np.sqrt(square)
        return slope

    def _engine(self, batch: Batch) -> ModuleType:
        return get_backend(self.backend, device=batch.device)

    def _check(self, batch: Batch) -> None:
        theirs = dict(zip(batch.names, batch.shapes, strict=True))
        for name, shape in zip(self.names, self.shapes, strict=True):
            if theirs.get(name) != shape:
                found = f"has the shape {theirs[name]}" if name in theirs else "has no such weight"
                raise ValueError(
                    f"the anchor of {name} was taken at the shape {shape}, but the batch {found}; "
                    "take new anchors"
                )
        if batch.names != self.names:
            raise ValueError(
                f"the batch must hold the {len(self.names)} weights of the anchors in their order, "
                f"got {len(batch.names)}, the first being {next(iter(batch.names), None)!r}; "
                "take new anchors"
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything as tensors, numbers and strings; ``torch.load(weights_only=True)`` works."""
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        arrays = {k: torch.from_numpy(v) for k, v in state.items() if isinstance(v, np.ndarray)}
        fit = {k: v if k == "reason" else torch.from_numpy(v) for k, v in vars(self.fit).items()}
        shapes = [list(shape) for shape in self.shapes]
        options = asdict(self.options)
        return state | arrays | {"fit": fit, "shapes": shapes, "options": options}

    @classmethod
    def load_state_dict(cls, state: Mapping[str, Any]) -> Anchors:
        """The anchors that :meth:`state_dict` described."""
        arrays = {k: state[k].numpy() for k in ("offset", "rows_offset", "kept_share")}
        fit = {k: v if k == "reason" else v.numpy() for k, v in state["fit"].items()}
        rest = {
            "names": tuple(state["names"]),
            "shapes": tuple(map(tuple, state["shapes"])),
            "options": FitOptions(**state["options"]),
            "fit": AlphaFit(**fit),
            "longer": tuple(state["longer"]),
        }
        return cls(**{**state, **arrays, **rest})


def take_anchors(
    batch: Batch,
    options: FitOptions,
    *,
    gradient: bool = True,
    probes: int = 8,
    seed: int = 0,
    backend: str = "auto",
) -> Anchors:
    """Exact alpha of every layer and what it takes to follow it.

    One eigendecomposition per layer in float64, on the CPU, one layer per thread; threads change no
    bit. The backend follows the weights from there, where they are.

    Args:
        batch: The weights; not changed.
        options: The fit.
        gradient: Whether to keep G, one byte per parameter, for ``lin``.
        probes: Number of probes to keep for ``aligned``; 0 for none.
        seed: Of the probes and of the choice of kept rows, below 2^64.
        backend: Name of a backend.

    Raises:
        ValueError: If the fit chooses xmin among candidates: it may jump from one to another at any
            movement, so no estimate from an anchor has an honest error.
    """
    if options.kind not in ("median", "tail"):
        raise ValueError(
            f"anchors need fit='median' or fit='tail', got {options.kind!r}, whose xmin may jump; "
            "use method='exact'"
        )
    stacks = batch.stacks()
    get_backend(backend, device=batch.device)  # what is missing is said before the work
    host = backend if backend in CPU_BACKENDS else "native"
    places = [kept_rows(s, key, seed) for s, key in zip(stacks, batch.keys, strict=True)]

    def take(layer: int) -> AnchoredLayer:
        kind, rows = batch.kinds[layer], places[layer]
        parts = AnchoredLayer(stacks[layer].cpu(), kind, rows, options, host)
        if gradient:
            parts.keep_gradient(options)
        if probes:
            parts.keep_probes(probes, seed, batch.keys[layer])
        return parts.freed()

    def cost(layer: int) -> float:
        short, long = sorted(stacks[layer].shape[1:])
        return float(len(stacks[layer])) * short**2 * (long + 10 * short)

    settle(stacks)
    layers = parallel_map(take, range(len(batch)), cost)

    def beside(part: str, dtype: torch.dtype) -> Tensor:
        """A part of all layers end to end, where the weights are: every look reads it."""
        return flat((getattr(layer, part) for layer in layers), dtype).to(batch.device)

    totals = np.array([stack.shape[0] * stack.shape[1] for stack in stacks], dtype=np.int64)
    firsts = np.cumsum(totals) - totals
    shares = np.array([len(mine) for mine in places]) / totals
    anchors = Anchors(
        names=batch.names,
        shapes=batch.shapes,
        options=options,
        backend=backend,
        fit=_joined([layer.fit for layer in layers]),
        values=[layer.values for layer in layers],
        gradient=beside("gradient", torch.int8) if gradient else None,
        scales=beside("scales", torch.float32) if gradient else None,
        offset=np.zeros(len(batch)),
        rows=flat((p + int(f) for p, f in zip(places, firsts, strict=True)), torch.int64),
        kept=beside("kept", torch.float32),
        kept_share=shares,
        directions=beside("directions", torch.float32) if gradient else None,
        rows_offset=np.zeros(len(batch)),
        probes=[layer.probes for layer in layers] if probes else None,
        longer=tuple(max(stack.shape[1:]) for stack in stacks),
    )
    if not gradient:
        return anchors
    offsets = anchors._slope(batch), anchors._slope_of_rows(batch)
    return replace(anchors, offset=offsets[0], rows_offset=offsets[1])


def _joined(fits: Sequence[AlphaFit]) -> AlphaFit:
    """Fits of single spectra as one of arrays."""
    columns = {f.name: [getattr(fit, f.name) for fit in fits] for f in fields(AlphaFit)}
    reason = columns.pop("reason")
    return AlphaFit(**{name: np.array(column) for name, column in columns.items()}, reason=reason)
