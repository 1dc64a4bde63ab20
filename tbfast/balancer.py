"""From weights to learning-rate factors over a run: what both appliers hold.

A ``Balancer`` knows layers by name. It is told when an optimizer step was taken (``advance``) and,
when that is ``due``, is shown the weights (``update``); it answers with ``factors``. The groups of
an optimizer are the business of ``TempBalance`` and ``attach``.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from statistics import fmean
from typing import Any, Literal

import torch

from tbfast.lora_layers import Weight
from tbfast.matrices import Layer, block_of, type_of
from tbfast.presets import Options, resolve
from tbfast.rates import fixed_factors, lr_factors, quantise
from tbfast.tracker import Tracker

_CLASSES = 16  # rates at most, unless asked otherwise
_PER_LAYER = ("target", "origin", "sums")
_SCALARS = ("ramp_began", "refreshes", "refreshed_at", "frozen")


class Balancer:
    """Learning-rate factors of a set of layers, by name.

    Args:
        layers: The tuned layers, in order; their names are unique.
        preset: ``"tempbalance"``, ``"model-balancing"`` or ``"llr"``.
        **options: As for :class:`tbfast.TempBalance`.

    Attributes:
        layers: The layers.
        options: The options, resolved.
        steps: Optimizer steps counted.

    Raises:
        ValueError: If there is no layer, two have one name, none is in a block though factors
            are by block, or an option is out of range.
        TypeError: On an option that does not exist.
    """

    def __init__(
        self, layers: Iterable[Layer], *, preset: str = "tempbalance", **options: Any
    ) -> None:
        self.layers = tuple(layers)
        self.options: Options = resolve(preset, options)
        names = [layer.name for layer in self.layers]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"layers must be one or more, each with its own name; got {names}")
        if self.options.group_by == "block" and not any(block_of(name) for name in names):
            raise ValueError(
                f"group_by='block' needs layers with an index in their names, got {names[0]!r}, "
                "...; use group_by='layer' or 'type'"
            )
        self.steps = 0
        self._tracker = Tracker(self.layers, self.options)
        self._target = [1.0] * len(names)
        self._origin = list(self._target)  # where the ramp to the target began
        self._ramp_began = 0
        self._sums = [0.0] * len(names)  # of the targets over the refreshes
        self._refreshes = 0
        self._refreshed_at: int | None = None
        self._frozen = False
        self._shown: dict[str, float] = {}
        self._shown_for: tuple[list[float], int] | None = None
        self._history: deque[tuple[int, list[float], list[float]]]
        self._history = deque(maxlen=self.options.history)
        if self.options.mapping == "fixed":
            self._aim(fixed_factors(names, self.options.mapping_options["factors"]))

    @property
    def alphas(self) -> dict[str, float]:
        """Alpha of each layer as the map sees it, corrected and smoothed; NaN before the first."""
        return self._by_name(self._tracker.known.alpha)

    @property
    def errors(self) -> dict[str, float]:
        """Standard error of each alpha against the exact one of the present weights.

        It grows as the weights move on since they were measured; NaN before the first time.
        """
        return self._by_name(self._tracker.known.error(self.steps))

    @property
    def factors(self) -> dict[str, float]:
        """Factor of each layer for the next optimizer step; always finite and above 0.

        The same dict as long as they stay what they are; not to be changed.
        """
        done = min(self.steps - self._ramp_began, self.options.ramp)
        if (
            self._shown_for is None
            or self._shown_for[0] is not self._target
            or (self._shown_for[1] != done)
        ):
            self._shown_for = (self._target, done)
            self._shown = self._by_name(self._factors())
        return self._shown

    @property
    def overhead(self) -> float:
        """Share of the wall time since the first optimizer step that measuring took, 0 to 1.

        Without the first measurement of the layers, which took ``initial_seconds``.
        """
        return self._tracker.budget.overhead

    @property
    def initial_seconds(self) -> float:
        """Wall time of the first measurement of the layers."""
        return self._tracker.budget.initial

    @property
    def history(self) -> list[tuple[int, dict[str, float], dict[str, float]]]:
        """(step, alphas, factors) of the latest refreshes, oldest first; ``history=`` of them."""
        return [(s, self._by_name(a), self._by_name(f)) for s, a, f in self._history]

    @property
    def due(self) -> bool:
        """Whether the weights should be shown to ``update`` now."""
        if not self._measures:
            return False
        rested = self._refreshed_at is None or self.steps - self._refreshed_at >= self.options.every
        return rested and self._tracker.is_ready

    def advance(self) -> None:
        """Count one optimizer step."""
        self._tracker.tick()
        self.steps += 1
        if self._measures and self.steps == self.options.start:
            self._remap()

    def update(self, weights: Mapping[str, Weight]) -> None:
        """Measure layers and compute new factors.

        A layer whose alpha cannot be had keeps its last alpha and factor, 1 if it never had one.
        One RuntimeWarning per layer says so if its weights are not finite or it had an alpha.

        Args:
            weights: Tensors by layer name, on any device; not changed. A layer that is missing
                keeps its alpha. Waits for the device.

        Raises:
            ValueError: If a tensor does not have the shape of its layer.
            RuntimeError: If no layer was finite in 3 refreshes in a row.
        """
        if not self._measures:
            return
        self._refreshed_at = self.steps
        seen = {
            row: weights[layer.name]
            for row, layer in enumerate(self.layers)
            if layer.name in weights and not self._at_high(layer)
        }
        if not self._tracker.update(seen, self.steps):
            return
        self._remap()
        if self._started:
            self._refreshes += 1
            self._sums = [total + f for total, f in zip(self._sums, self._target, strict=True)]
        self._history.append((self.steps, list(self._tracker.known.alpha), self._factors()))

    def freeze(self, by: Literal["type", "block"] | None = "type") -> None:
        """Keep the mean factors found so far as constants and measure no more.

        The mean is over the refreshes at which the map acted, and then over the layers of a
        ``"type"`` or ``"block"`` (a layer outside any block keeps its own); None keeps one
        constant per layer.
        """
        if by not in ("type", "block", None):
            raise ValueError(f"by must be type, block or None; got {by!r}")
        means = list(self._target)
        if self._refreshes:
            means = [total / self._refreshes for total in self._sums]
        if by is not None:
            means = _group_means(means, [g or layer.name for g, layer in self._grouped(by)])
        self._frozen = True
        self._aim(means)

    def detach(self) -> None:
        """Take the factors off the optimizer that ``attach`` put them on; without one, nothing."""

    def explained(self) -> dict[str, float]:
        """Share of the factors' variance that a layer's shape, type and block each explain.

        eta squared, the variance between groups over the whole, 0 to 1; 0 where all factors are
        equal. A label that no two layers share explains everything, and says nothing.
        """
        labels: dict[str, list[object]] = {
            "shape": [layer.shape for layer in self.layers],
            "type": [group for group, _ in self._grouped("type")],
            "block": [group for group, _ in self._grouped("block")],
        }
        factors = self._factors()
        return {name: _eta_squared(factors, groups) for name, groups in labels.items()}

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw alpha and factor of every layer over the history into an image file.

        Raises:
            RuntimeError: If matplotlib is missing, or nothing was measured yet.
        """
        from tbfast.plot_history import plot_history

        plot_history(self.history, path)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, as plain numbers, strings, lists and dicts.

        Rows are named. Options are not in it: build the next Balancer with the same ones.
        """
        return {
            "names": [layer.name for layer in self.layers],
            "steps": self.steps,
            "tracker": self._tracker.state_dict(),
            **{key: list(getattr(self, f"_{key}")) for key in _PER_LAYER},
            **{key: getattr(self, f"_{key}") for key in _SCALARS},
            "history": [list(entry) for entry in self._history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; its layers may stand in another order.

        Raises:
            ValueError: If the layers of the state are not those of this Balancer.
        """
        if missing := {"names", "steps", "tracker"} - set(state):
            raise ValueError(
                f"this is not a state of a Balancer: it has no {min(missing)!r}; pass what "
                "Balancer.state_dict() returned"
            )
        names = [layer.name for layer in self.layers]
        if odd := sorted(set(names) ^ set(state["names"])):
            where = "this Balancer" if odd[0] in names else "the state"
            raise ValueError(
                f"only {where} has the layer {odd[0]!r}; build the model and its tuned layers as "
                "for the run that was saved"
            )
        at = {name: row for row, name in enumerate(state["names"])}
        order = [at[name] for name in names]
        self.steps = state["steps"]
        self._tracker.load_state_dict(state["tracker"], order)
        for key in _PER_LAYER:
            setattr(self, f"_{key}", [state[key][row] for row in order])
        for key in _SCALARS:
            setattr(self, f"_{key}", state[key])
        self._history.clear()
        for step, alphas, factors in state["history"]:
            sort = [[values[row] for row in order] for values in (alphas, factors)]
            self._history.append((step, *sort))

    @property
    def _measures(self) -> bool:
        return not self._frozen and self.options.mapping != "fixed"

    @property
    def _started(self) -> bool:
        return self.options.start == "auto" or self.steps >= self.options.start

    def _remap(self) -> None:
        """Aim at the factors of the present alphas, once each layer has been looked at."""
        if not self._started or self._tracker.is_starting:
            return
        o, known = self.options, self._tracker.known
        shown = list(known.alpha)
        if o.start == "auto":
            shown = [a if x else math.nan for a, x in zip(shown, known.left_noise, strict=True)]
        if o.group_by == "layer":
            factors = self._map(shown)
        else:
            groups = [group for group, _ in self._grouped(o.group_by)]
            means = dict(zip(groups, _group_means(shown, groups), strict=True))
            means.pop(None, None)  # layers outside any block: factor 1
            by_group = dict(zip(means, self._map(list(means.values())), strict=True))
            factors = [by_group.get(group, 1.0) for group in groups]
        factors = self._rounded(factors, shown)
        for row, layer in enumerate(self.layers):
            if self._at_high(layer):
                factors[row] = o.high
            elif known.lost[row] and math.isfinite(known.alpha[row]):
                factors[row] = self._target[row]  # its last alpha still counts for the others
        if factors != self._target:
            self._aim(factors)

    def _map(self, alpha: list[float]) -> list[float]:
        o = self.options
        factors = lr_factors(alpha, o.mapping, low=o.low, high=o.high, **o.mapping_options)
        return [float(factor) for factor in factors]

    def _rounded(self, factors: list[float], alphas: list[float]) -> list[float]:
        """Factors in classes, of which the optimizer makes one group each."""
        o, classes = self.options, self.options.rate_classes
        if classes == "auto":
            classes = _CLASSES if len(self.layers) > _CLASSES else None
        if classes is None:
            return factors
        exact, before = torch.tensor([factors, self._target], dtype=torch.float64)
        rounded = quantise(exact, classes, o.mapping, o.low, o.high, before).tolist()
        # A layer without alpha stays at 1.
        pairs = zip(alphas, rounded, factors, strict=True)
        return [r if math.isfinite(a) else f for a, r, f in pairs]

    def _aim(self, target: list[float]) -> None:
        self._origin = self._factors()
        self._ramp_began = self.steps
        self._target = target

    def _factors(self) -> list[float]:
        done = self.steps - self._ramp_began
        if done >= self.options.ramp:
            return list(self._target)
        pairs = zip(self._origin, self._target, strict=True)
        return [a + (b - a) * done / self.options.ramp for a, b in pairs]

    def _at_high(self, layer: Layer) -> bool:
        return self.options.roles_at_high and layer.role is not None

    def _grouped(self, by: Literal["type", "block"]) -> list[tuple[str | None, Layer]]:
        label = type_of if by == "type" else block_of
        return [(label(layer.name), layer) for layer in self.layers]

    def _by_name(self, values: Sequence[float]) -> dict[str, float]:
        return {layer.name: value for layer, value in zip(self.layers, values, strict=True)}


def _group_means(values: Sequence[float], groups: Sequence[object]) -> list[float]:
    """Mean of the finite values of each one's group; NaN where the group has none."""
    members: dict[object, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        members.setdefault(group, []).extend([value] if math.isfinite(value) else [])
    means = {group: fmean(found) if found else math.nan for group, found in members.items()}
    return [means[group] for group in groups]


def _eta_squared(values: Sequence[float], groups: Sequence[object]) -> float:
    mean = fmean(values)
    whole = sum((v - mean) ** 2 for v in values)
    between = sum((m - mean) ** 2 for m in _group_means(values, groups))
    return min(1.0, between / whole) if whole > 0 else 0.0
