"""What an optimizer's groups would have without factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import is_
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

Rate = float | Tensor


@dataclass(slots=True)
class _Slot:
    """A group, whose factor it has, and its rate without and with that factor."""

    group: dict[str, Any]
    key: str
    owner: str
    base: Rate
    written: Rate | None = None


class BaseRates:
    """The rates of an optimizer's groups, and what factors make of them.

    Rates are numbers as a rule, and the loops are short for them: a step may have hundreds.

    A group is known by its name, or its place if it has none. A group that joins has the rate that
    it comes with. Rates that are tensors are written in place: a compiled step keeps its graph, and
    nothing waits for the device.

    Args:
        optimizer: Any torch optimizer.
        what: The hyperparameter that factors multiply.
    """

    def __init__(self, optimizer: Optimizer, what: str) -> None:
        self._optimizer = optimizer
        self._what = what
        self._groups: list[dict[str, Any]] = []
        self._slots: list[_Slot] = []

    def take_foreign(self) -> None:
        """A rate that somebody else wrote into a group is its base rate."""
        what = self._what
        for slot in self._current():
            rate = slot.group[what]
            if slot.written is not None and rate != slot.written:
                slot.base = _copy(rate)

    def put_back(self) -> None:
        """Give every group its base rate."""
        what = self._what
        for slot in self._current():
            if type(slot.base) is float and type(slot.group[what]) is float:
                slot.group[what] = slot.base
            else:
                self._set(slot.group, slot.base)

    def take(self) -> None:
        """What the groups have now are their base rates."""
        what = self._what
        for slot in self._current():
            slot.base = _copy(slot.group[what])

    def write(self, factors: Mapping[str, float]) -> None:
        """Give every group its base rate times the factor of its layer, 1 if it has none."""
        what = self._what
        for slot in self._current():
            factor = factors.get(slot.owner, 1.0)
            if type(slot.base) is float and type(slot.group[what]) is float:
                slot.group[what] = slot.written = slot.base * factor
            else:
                self._set(slot.group, slot.base, factor)
                slot.written = _copy(slot.group[what])

    def state_dict(self) -> dict[str, float]:
        """Base rate of each group, by its key."""
        return {slot.key: float(slot.base) for slot in self._current()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over base rates; a group that is not in the state keeps its own."""
        for slot in self._current():
            slot.base = state.get(slot.key, slot.base)

    def _current(self) -> list[_Slot]:
        """Of each group with such a hyperparameter; groups come and go, or are replaced."""
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        if len(groups) != len(self._groups) or not all(map(is_, groups, self._groups)):
            before = {slot.key: slot for slot in self._slots}
            self._groups, self._slots = list(groups), []
            for index, group in enumerate(groups):
                if self._what not in group:
                    continue
                key = group.get("name") or f"#{index}"
                old = before.get(key)
                base = _copy(group[self._what]) if old is None else old.base
                slot = _Slot(
                    group, key, group.get("layer", key), base, old.written if old else None
                )
                self._slots.append(slot)
        return self._slots

    def _set(self, group: dict[str, Any], rate: Rate, factor: float = 1.0) -> None:
        if isinstance(group[self._what], Tensor):
            group[self._what].fill_(rate).mul_(factor)
        else:
            group[self._what] = float(rate) * factor


def unshare_rates(optimizer: Optimizer) -> None:
    """Give each group a tensor of its own where one tensor is the rate of several."""
    seen: set[int] = set()
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor) and id(group["lr"]) in seen:
            group["lr"] = group["lr"].clone()
        seen.add(id(group["lr"]))


def rates_of(optimizer: Optimizer) -> list[Rate]:
    """The learning rates of an optimizer's groups as they are now."""
    return [_copy(group["lr"]) for group in optimizer.param_groups]


def _copy(rate: Rate) -> Rate:
    if type(rate) is float:
        return rate
    return rate.clone() if isinstance(rate, Tensor) else float(rate)
