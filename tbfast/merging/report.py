"""What a merge did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tbfast.names import counted

if TYPE_CHECKING:
    from tbfast.merging.plan import Plan, Tensor

_CHUNK = 1 << 16  # elements of every input that a thread holds; see csrc/cpu/merge_block.h
_PYTHON = 30_000_000  # bytes of Python and its modules
_HELD = 72 << 20  # bytes of a tensor that are kept at the most; see csrc/cpu/merge.cpp


@dataclass(frozen=True)
class MergeReport:
    """What a merge did, or, after a dry run, would do.

    Attributes:
        tensors: Number of tensors.
        bytes: Of the weights written.
        picked: Share of the elements that selection took from each model; empty for other methods.
        unchanged: Share of the elements compared with a base in which no model differs from it;
            None where none was compared.
        seconds: Wall time; 0 after a dry run.
        shards: Names of the files and their bytes.
        peak_memory: About how many bytes of memory it takes.
    """

    tensors: int
    bytes: int
    picked: list[float]
    unchanged: float | None
    seconds: float
    shards: dict[str, int]
    peak_memory: int

    @classmethod
    def of(cls, plan: Plan, totals: Totals, seconds: float, threads: int) -> MergeReport:
        """From what was counted."""
        return cls(
            tensors=sum(len(shard.tensors) for shard in plan.shards),
            bytes=plan.bytes,
            picked=[count / totals.drawn for count in totals.picked] if totals.drawn else [],
            unchanged=totals.unchanged / totals.compared if totals.compared else None,
            seconds=seconds,
            shards={shard.name: shard.bytes for shard in plan.shards},
            peak_memory=_peak(plan, threads),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return dict(vars(self))

    def text(self, out: str, dry_run: bool) -> str:
        """A few lines for people."""
        size = f"{self.bytes / 1e9:.2f} GB" if self.bytes >= 1e8 else f"{self.bytes / 1e6:.2f} MB"
        files = counted(len(self.shards), "file")
        lines = [f"{counted(self.tensors, 'tensor')}, {size} in {files}"]
        if dry_run:
            lines[0] = f"would write to '{out}': {lines[0]}"
            lines += [f"  {name}  {count} bytes" for name, count in self.shards.items()]
            lines.append(f"needs about {self.peak_memory / 1e6:.0f} MB of memory")
        else:
            lines[0] = f"'{out}': {lines[0]}, {self.seconds:.1f} s"
        if self.picked:
            lines.append("from each model: " + ", ".join(f"{100 * p:.2f} %" for p in self.picked))
        if self.unchanged is not None:
            lines.append(f"unchanged in every model: {100 * self.unchanged:.2f} %")
        return "\n".join(lines)


def _peak(plan: Plan, threads: int) -> int:
    inputs = len(plan.models) + 2
    held = max(_held(tensor) for shard in plan.shards for tensor in shard.tensors)
    return _PYTHON + threads * inputs * 8 * _CHUNK + held


def _held(tensor: Tensor) -> int:
    """Bytes that are kept of a tensor that has to be seen before it is merged."""
    if not tensor.method.looks_at_all:
        return 0
    inputs = [*tensor.models, *([tensor.base] if tensor.base else [])]
    size = tensor.elements * sum(entry.dtype.width for entry in inputs)
    sifted = tensor.elements * 4 * len(tensor.models) // 20  # differences around TIES' threshold
    return (size if size <= _HELD else 0) + (sifted if tensor.method.name == "ties" else 0)


@dataclass
class Totals:
    """Counts over tensors."""

    models: int
    drawn: int = 0
    compared: int = 0
    unchanged: int = 0
    picked: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.picked = self.picked or [0] * self.models

    def add(self, tensor: Tensor, found: tuple[list[int], int, int, int]) -> None:
        """Count a tensor."""
        picked, unchanged, _, _ = found
        if tensor.method.name == "select" and not tensor.must_agree:
            self.drawn += tensor.elements
            self.picked = [a + b for a, b in zip(self.picked, picked, strict=True)]
            if tensor.base is not None:
                self.compared += tensor.elements
                self.unchanged += unchanged

    def to_dict(self) -> dict[str, Any]:
        """For the journal."""
        return dict(vars(self))

    def load(self, state: Mapping[str, Any]) -> None:
        """Add what a journal says."""
        self.drawn += state["drawn"]
        self.compared += state["compared"]
        self.unchanged += state["unchanged"]
        self.picked = [a + b for a, b in zip(self.picked, state["picked"], strict=True)]
