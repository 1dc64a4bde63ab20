"""The groups in which an optimizer takes its steps: the fewest that have the same effect.

A step spends up to 0.1 ms on each group, whatever is in it. Between the steps an optimizer has as
many groups as is convenient.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from operator import is_, itemgetter
from types import MappingProxyType
from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

Group: TypeAlias = dict[str, Any]

# What no step reads, and ``params``.
_LABELS = {"params", "param_names", "name", "kind", "role", "layer", "lora", "initial_lr"}
_NO_FACTORS: Mapping[str, float] = MappingProxyType({})
_MISSING = object()


@dataclass(frozen=True)
class _Cell:
    """Parameters of one group that have one factor: where they stand in it."""

    group: Group
    factor: float
    rows: list[int]
    kinds: frozenset[object]


@dataclass(frozen=True)
class _Part:
    """A group made for the step, what it held before, and the groups that it stands for."""

    inside: Group
    before: Group
    groups: list[Group]
    scale: float


class Regrouping:
    """Puts the fewest groups into an optimizer, and its own groups back.

    Groups are split where parameters have different factors, and joined where all hyperparameters
    are equal. Tensors of different type or device mesh are not joined, which foreach and fused
    steps refuse, nor are groups with a tensor each as their rate, to which a compiled or captured
    step holds on. State belongs to tensors, so a step gives, to the bit, what it gives with
    permanent groups.

    Args:
        optimizer: Any torch optimizer.
        scaled: The hyperparameter that factors multiply.
        owner: Whose factor a parameter has; None for nobody's.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        scaled: str,
        owner: Callable[[Tensor], str | None] = lambda parameter: None,
    ) -> None:
        self._optimizer = optimizer
        self._scaled = scaled
        self._owner = owner
        self._own: list[Group] | None = None  # the optimizer's, while others are in their place
        self._steady = False
        # The groups of the step, and what they were made for.
        self._inside: list[Group] = []
        self._parts: list[_Part] = []
        self._cells: list[_Cell] = []
        self._members: list[object] = []
        self._factors: Mapping[str, float] = _NO_FACTORS
        self._known: list[Group] | None = None

    def enter(self, factors: Mapping[str, float] = _NO_FACTORS, *, steady: bool = False) -> None:
        """Put in the groups of a step.

        Args:
            factors: By owner; 1 for those not in it. The same object means the same factors.
            steady: Split by owner and join nothing, so that the groups stay what they are as
                factors change: a compiled step is compiled again where they do not.
        """
        own: list[Group] = self._optimizer.param_groups
        members = [item for group in own for item in (group, *group["params"])]
        if (
            factors is not self._factors
            or steady != self._steady
            or not _are_same(members, self._members)
        ):
            self._factors, self._steady, self._members = factors, steady, members
            self._cells = [cell for group in own for cell in self._split(group)]
            self._known = None
        if not self._fits(own):
            self._join(own)
        self._own = own
        self._optimizer.param_groups = self._inside

    def leave(self) -> None:
        """Put the optimizer's own groups back, with what the step wrote into those of the step.

        But not what it wrote as their ``scaled``.
        """
        if self._own is None:
            return
        for part in self._parts:
            before = part.before
            written = {k: v for k, v in part.inside.items() if v is not before.get(k, _MISSING)}
            written.pop(self._scaled, None)
            for group in part.groups if written else ():
                group.update(written)
        self._optimizer.param_groups = self._own
        self._own = None

    def _fits(self, own: list[Group]) -> bool:
        """Whether the cells stay together, as all do while a schedule moves every rate alike."""
        if self._known is None or own == self._known:
            return self._known is not None
        rates = [group.get(self._scaled) for group in own]
        for known, rate in zip(self._known, rates, strict=True):
            known[self._scaled] = rate
        if own != self._known or any(isinstance(rate, Tensor) for rate in rates):
            return False
        for part in self._parts:
            rate, *others = {group[self._scaled] for group in part.groups}
            if others or (rate and not part.scale):
                return False
            part.inside[self._scaled] = part.before[self._scaled] = rate * part.scale
        return True

    def _split(self, group: Group) -> list[_Cell]:
        params: list[Tensor] = group["params"]
        rows: dict[object, list[int]] = {}
        factors: dict[object, float] = {}
        for row, parameter in enumerate(params):
            owner = self._owner(parameter)
            factor = self._factors.get(owner or "", 1.0)
            key = owner if self._steady else factor
            rows.setdefault(key, []).append(row)
            factors[key] = factor
        return [
            _Cell(group, factors[key], where, frozenset(_kind(params[row]) for row in where))
            for key, where in rows.items()
        ]

    def _join(self, own: list[Group]) -> None:
        buckets: dict[Any, list[_Cell]] = {}
        hashable = True
        for cell in self._cells:
            get = _getter(tuple(cell.group))
            values: object = get(cell.group)
            try:
                hash(values)
            except TypeError:
                values, hashable = _hashable(values), False
            # Nothing times any factor: biases without decay are one group.
            scale = 0.0 if _is_zero(cell.group.get(self._scaled)) else cell.factor
            key = (len(buckets) if self._steady else cell.kinds, scale, get, values)
            buckets.setdefault(key, []).append(cell)
        self._inside, self._parts = [], []
        for (_, scale, *_), cells in buckets.items():
            group = cells[0].group
            if scale != 1.0 or not _is_whole(cells):
                group = self._joined(cells, scale)
                groups = [cell.group for cell in cells]
                self._parts.append(_Part(group, dict(group), groups, scale))
            self._inside.append(group)
        # What is changed in place, such as a tensor, changes in a copy of the groups as well.
        fixed = hashable and not any(isinstance(v, Tensor) for *_, vs in buckets for v in vs)
        self._known = [dict(group) for group in own] if fixed else None

    def _joined(self, cells: list[_Cell], scale: float) -> Group:
        group = dict(cells[0].group)
        for key in ("params", "param_names"):
            if key in group:
                group[key] = [cell.group[key][row] for cell in cells for row in cell.rows]
        if scale != 1.0 and self._scaled in group:
            group[self._scaled] = group[self._scaled] * scale  # a tensor: not in place
        return group


def _are_same(items: list[object], others: list[object]) -> bool:
    return len(items) == len(others) and all(map(is_, items, others))


def _is_whole(cells: list[_Cell]) -> bool:
    """Whether these are the cells of one group, and all of them."""
    group = cells[0].group
    rows = sum(len(cell.rows) for cell in cells)
    return rows == len(group["params"]) and all(cell.group is group for cell in cells)


def _is_zero(rate: object) -> bool:
    return isinstance(rate, (int, float)) and rate == 0  # a tensor: nothing waits for its device


def _kind(parameter: Tensor) -> object:
    mesh = getattr(parameter, "device_mesh", None)
    return type(parameter), mesh


def _hashable(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return tuple(map(_hashable, value))
    return value if isinstance(value, Hashable) else id(value)


@lru_cache
def _getter(keys: tuple[str, ...]) -> Callable[[Group], tuple[object, ...]]:
    """Reads the hyperparameters of a group; one function for all groups that have the same."""
    return _getter_of(tuple(sorted(set(keys) - _LABELS)))


@lru_cache
def _getter_of(names: tuple[str, ...]) -> Callable[[Group], tuple[object, ...]]:
    # An itemgetter of one name gives no tuple.
    return itemgetter(*names) if len(names) > 1 else lambda group: tuple(map(group.get, names))
