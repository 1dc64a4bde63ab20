"""``gram_apply`` and ``lanczos`` of the Triton backend: plans, memory and launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tbfast.backends.gpu_checks import check_table, planning
from tbfast.backends.triton_lanczos import FIRST_PHASES, spectral_phases
from tbfast.backends.triton_launch import INTERPRETED, check_readable, launch_phases
from tbfast.backends.triton_plan import COLS, LAYER, ROWS, Round, spectral_rounds
from tbfast.batch import Batch
from tbfast.tridiagonals import Tridiagonals

_EPS = float(np.finfo(np.float32).eps)

# Start vectors of an entry, which one pass over the weights serves: what the narrowest product of
# the tensor cores takes. More do not fit the registers.
GROUPS = {"cuda": 8, "hip": 16}
_GROUP = GROUPS["hip" if torch.version.hip else "cuda"]

# A panel of rows as wide as common layers stays in the cache between its two uses on all
# processors; the interpreter's cost is per operation, whatever its size.
TILES = {"BM": 128, "BK": 512, "BV": 1024} if INTERPRETED else {"BM": 32, "BK": 64, "BV": 128}


@dataclass(frozen=True)
class _Plan:
    described: NDArray[np.int64]
    rounds: list[tuple[Round, Tensor, Tensor]]  # with its tables on the device
    vectors: Tensor
    going: Tensor
    exponents: Tensor
    flagged: Tensor
    tops: Tensor
    state: Tensor
    products: Tensor


_plans: WeakKeyDictionary[Batch, dict[tuple[int, int], _Plan]] = WeakKeyDictionary()


def gram_apply(batch: Batch, x: Sequence[Tensor]) -> list[Tensor]:
    """WᴴW x of every matrix in float32; see ``reference_lanczos.gram_apply``."""
    counts = {vectors.shape[1] for vectors in x}
    if len(counts) != 1:
        raise ValueError(f"all layers need the same number of vectors, got {sorted(counts)}")
    given = _flat(x, batch.device)
    out = torch.empty_like(given)
    _run(batch, counts.pop(), 1, 3, given, out, (None, None, None), (0, 0))
    parts = torch.split(out, [vectors.numel() for vectors in x])
    return [part.view(v.shape) for part, v in zip(parts, x, strict=True)]


def lanczos(
    batch: Batch,
    probes: int | Sequence[Tensor],
    steps: int,
    *,
    seed: int = 0,
    draw: int = 0,
) -> Tridiagonals:
    """Lanczos on every matrix in one launch, in float32; see ``reference_lanczos.lanczos``."""
    given = None if isinstance(probes, int) else _flat(probes, batch.device)
    number = probes if isinstance(probes, int) else probes[0].shape[1]
    described = batch.descriptors()
    device = batch.device
    runs = (len(described), number)
    jacobi = torch.zeros((2, *runs, steps), dtype=torch.float64, device=device)
    taken = torch.zeros(runs, dtype=torch.int32, device=device)
    most = int(np.minimum(described[:, ROWS], described[:, COLS]).max(initial=0))
    phases = FIRST_PHASES + 2 * min(steps, most)
    _run(batch, number, steps, phases, given, None, (*jacobi, taken), (seed, draw))
    diagonal, off_diagonal = jacobi.cpu().numpy()
    return Tridiagonals(
        diagonal,
        off_diagonal,
        taken.cpu().numpy(),
        first=np.searchsorted(described[:, LAYER], np.arange(len(batch) + 1)),
        count=np.minimum(described[:, ROWS], described[:, COLS]),
        eps=_EPS,
    )


def _run(
    batch: Batch,
    probes: int,
    steps: int,
    phases: int,
    given: Tensor | None,
    out: Tensor | None,
    found: tuple[Any, Any, Any],
    random: tuple[int, int],
) -> None:
    check_readable(batch)
    if len(batch) == 0:
        return
    plan = _plan(batch, probes, steps)
    seed, draw = random
    for part, table, items in plan.rounds:
        launch_phases(
            spectral_phases,
            phases,
            batch.device,
            table,
            items,
            len(part.table),
            len(part.items),
            plan.vectors,
            given,
            out,
            plan.going,
            plan.exponents,
            plan.flagged,
            plan.tops,
            plan.state,
            plan.products,
            *found,
            steps,
            seed & 0xFFFFFFFF,
            seed >> 32,
            draw,
            GROUP=_GROUP,
            INTERPRETED=INTERPRETED,
            **TILES,
        )


def _plan(batch: Batch, probes: int, steps: int) -> _Plan:
    plans = _plans.setdefault(batch, {})
    described = batch.descriptors()
    plan = plans.get((probes, steps))
    if plan is None or plan.described is not described:
        plans[probes, steps] = plan = _make(batch, described, probes, steps)
    return plan


def _make(batch: Batch, described: NDArray[np.int64], probes: int, steps: int) -> _Plan:
    check_table(described, batch.names, "triton")
    device, group = batch.device, _GROUP
    keys = np.array(batch.keys, dtype=np.int64)
    rounds = spectral_rounds(described, keys, probes, steps, group, TILES["BM"])
    entries = max(len(part.table) for part in rounds)
    items = max(len(part.items) for part in rounds)
    floats = max(part.floats for part in rounds)
    with planning(4 * floats, device):
        return _Plan(
            described,
            [(part, _on(device, part.table), _on(device, part.items)) for part in rounds],
            torch.empty(floats, dtype=torch.float32, device=device),
            torch.empty(entries * group, dtype=torch.int32, device=device),
            torch.empty(entries, dtype=torch.int32, device=device),
            torch.empty(entries, dtype=torch.int32, device=device),
            torch.empty(items, dtype=torch.float64, device=device),
            torch.empty(2 * entries * group, dtype=torch.float64, device=device),
            torch.empty(entries * steps * group, dtype=torch.float64, device=device),
        )


def _on(device: torch.device, table: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(table).to(device)


def _flat(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.cat([t.detach().to(device, torch.float32).flatten() for t in tensors])
