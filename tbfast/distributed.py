"""A lens on weights that several processes hold or share: torch.distributed, any backend.

- Weights of which each process has a copy (DDP): the layers are divided over the processes, longest
  first, and the results exchanged.
- Weights in parts (FSDP2, tensor parallelism, and both): how far they have turned, and their
  sketches, are sums over the processes. For an exact spectrum, the parts of one layer at a time are
  sent to the one process that measures it: nothing else is ever whole.

Every process must call the same methods for the same rows, and gets the same bits. They talk in the
process groups of the weights' device mesh; where the weights lie on several meshes, where some are
plain tensors, or where the mesh has all processes, in the default group: then all its processes
must tune the same layers. A process that fails makes the others wait as long as the time-out of
their group.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from tbfast._native import num_threads
from tbfast.alpha import AlphaFit
from tbfast.backends import get_backend
from tbfast.fitting import Reason
from tbfast.lens import Lens, Look
from tbfast.lora_layers import LoraWeight, Weight
from tbfast.matrices import Layer
from tbfast.parts import PartsLens
from tbfast.presets import Options
from tbfast.shape import sides
from tbfast.sharded_lanczos import Held, lanczos
from tbfast.sharding import Block, Spread, dtensor_type, spread_of, whole
from tbfast.spectra import Measurement, Method, sketched_above, sketched_measurements
from tbfast.team import Team

Array = NDArray[np.float64]

_REASONS = {reason.text: reason for reason in Reason}
_FIELDS = 12  # numbers that _packed makes of a measurement


def make_lens(layers: Sequence[Layer], options: Options, weights: Mapping[int, Weight]) -> Lens:
    """The lens that suits the weights; the plain one where no other process has to do with them.

    Args:
        layers: The layers.
        options: Resolved options of a Balancer.
        weights: The present weights, by row.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return Lens(layers, options)
    in_parts = any(isinstance(weight, dtensor_type()) for weight in weights.values())
    if in_parts or dist.get_world_size() > 1:
        return SharedLens(layers, options)
    return Lens(layers, options)


class SharedLens(Lens):
    """As a Lens, for all processes of a group alike; see the module."""

    def __init__(self, layers: Sequence[Layer], options: Options) -> None:
        super().__init__(layers, options)
        self._copies = Lens(layers, options)
        self._parts = PartsLens(layers, options)
        self._spreads: dict[Any, Spread] = {}
        self._meshes: set[Any] | None = None
        self._team: Team

    @torch.no_grad()
    def show(self, weights: Mapping[int, Weight]) -> None:
        """See :meth:`Lens.show`.

        Raises:
            ValueError: If a tensor does not have the shape of its layer, or the processes do not
                have the same layers.
            TypeError: If a weight is spread in a way that is not known.
        """
        super().show(weights)
        if weights:
            self._join(weights)
        parts = {row: self._part(self.layers[row], weight) for row, weight in weights.items()}
        self._parts.hold(parts)
        self._copies.show({})

    def keep(self, rows: Sequence[int]) -> list[Tensor]:
        """See :meth:`Lens.keep`."""
        if not rows:
            return []
        kept = [self._parts.padded_rows(row) for row in rows]
        sums = self._team.total(torch.cat([some.flatten() for some in kept]))
        parts = torch.split(sums, [some.numel() for some in kept])
        return [part.view_as(some) for part, some in zip(parts, kept, strict=True)]

    @torch.no_grad()
    def measure(self, rows: Sequence[int], look: Look | Method, draw: int) -> list[Measurement]:
        """See :meth:`Lens.measure`."""
        if not rows:
            return []
        spreads, o = self._parts.spreads, self._options
        least = sketched_above(look, o.fit, o.filter_zeros, o.sketch)
        # Square blocks are cut out of the whole.
        apart = [
            row
            for row in rows
            if spreads[row].split and self._side(row) > least and o.shape_correction != "farms"
        ]
        copies = [row for row in rows if not spreads[row].split]
        sent = [row for row in rows if spreads[row].split and row not in apart]
        costs = [self._cost(row, least, row in apart) for row in rows]
        ranks = shared_out(costs, len(self._team.ranks))
        owners = dict(zip(rows, [self._team.ranks[r] for r in ranks], strict=True))
        mine = {row for row in rows if owners[row] == self._team.rank}

        found = self._of_sums(apart, mine, draw)
        self._copies.show({row: self._parts.weight(row) for row in copies})
        own = [row for row in copies if row in mine]
        if own:
            found |= dict(zip(own, self._copies.measure(own, look, draw), strict=True))
        found |= self._of_sent(sent, owners, look, draw)
        broken = self._broken([row for row in copies if row not in mine])
        return self._exchanged(rows, found, broken)

    def agree(self, seconds: float) -> float:
        """See :meth:`Lens.agree`."""
        return float(self._team.largest(torch.tensor([seconds], dtype=torch.float64)))

    def _movement(self, rows: Sequence[int], kept: Sequence[Tensor]) -> tuple[Array, Array, Array]:
        sums = self._team.total(torch.from_numpy(self._parts.sums(rows, kept)))
        moved, along, size = sums.numpy()
        return moved, along, size

    def _of_sums(self, rows: Sequence[int], mine: set[int], draw: int) -> dict[int, Measurement]:
        """Sketches of layers in parts, from sums over the processes; those of ``mine``."""
        if not rows:
            return {}
        o = self._options
        held = [
            Held(
                self.layers[row],
                self._parts.pieces(row),
                self._parts.spreads[row].split,
                self._parts.part(row).is_complex(),
            )
            for row in rows
        ]
        sketch = replace(o.sketch, draw=draw % 2**24)
        runs = lanczos(held, self._team.total, sketch, self._team.device)
        engine, found = get_backend(o.backend), {}
        for row, run in zip(rows, runs, strict=True):
            if row in mine:
                layer, table = self.layers[row], engine.quadrature_fit(run, o.fit)
                found[row] = sketched_measurements([layer.kind], [layer.n_eigs], table)[0]
        return found

    def _of_sent(
        self, rows: Sequence[int], owners: Mapping[int, int], look: Look | Method, draw: int
    ) -> dict[int, Measurement]:
        """Measure layers in parts, each where it is sent to, one at a time."""
        queues = {rank: [row for row in rows if owners[row] == rank] for rank in owners.values()}
        found = {}
        for turn in zip_longest(*queues.values()):
            batch = [row for row in turn if row is not None]
            blocks = [self._parts.spreads[row].blocks for row in batch]
            transfers = [(b, owners[row]) for b, row in zip(blocks, batch, strict=True)]
            parts = self._team.sent(transfers, [self._parts.part(row) for row in batch])
            for number, got in parts.items():
                row = batch[number]
                self._copies.show({row: _joined(self.layers[row].shape, blocks[number], got)})
                found[row] = self._copies.measure([row], look, draw)[0]
                self._copies.show({})
        return found

    def _broken(self, rows: Sequence[int]) -> list[int]:
        """Which of these layers are not finite in the copy of this process."""
        copies = {row: self._parts.weight(row) for row in rows}
        sums = {
            row: copy.sum(dtype=None if copy.dtype.itemsize >= 4 else torch.float32)
            for row, copy in copies.items()
            if isinstance(copy, Tensor)
        }
        return [row for row, s in sums.items() if not bool(torch.isfinite(s))]

    def _exchanged(
        self, rows: Sequence[int], found: Mapping[int, Measurement], broken: Sequence[int]
    ) -> list[Measurement]:
        """All measurements of all processes; none of layers that are broken somewhere."""
        table = torch.zeros(len(rows), _FIELDS + 1, dtype=torch.float64)
        for line, row in zip(table, rows, strict=True):
            if row in found:
                line[:_FIELDS] = torch.tensor(_packed(found[row]), dtype=torch.float64)
            line[_FIELDS] = row in broken
        lines = zip(self._team.total(table).tolist(), rows, strict=True)
        return [
            _no_measurement(self.layers[row]) if line[_FIELDS] else _unpacked(line[:_FIELDS])
            for line, row in lines
        ]

    def _join(self, weights: Mapping[int, Weight]) -> None:
        """Find the processes that these weights have to do with, and see that they agree."""
        meshes = {_mesh(weight) for weight in weights.values()}
        if meshes == self._meshes:
            return
        weight, mesh = next((w, _mesh(w)) for w in weights.values())
        device = weight.device if mesh is None else torch.device(mesh.device_type)
        self._team, self._spreads = Team(meshes, device), {}
        fewest = -self._team.largest(torch.tensor([-num_threads()]))
        self.workers = int(fewest) * len(self._team.ranks)
        label = "\n".join(f"{layer.name} {layer.shape}" for layer in self.layers)
        key = zlib.crc32(label.encode())
        high, low = self._team.largest(torch.tensor([key, -key])).tolist()
        if high != -low:
            raise ValueError(
                f"the processes tune different layers, here {len(self.layers)} from "
                f"{self.layers[0].name!r} on; all processes of a group must tune the same"
            )
        self._meshes = meshes

    def _part(self, layer: Layer, weight: Any) -> tuple[Spread, Weight]:
        """How a weight is spread, and what of it is held here."""
        team, in_parts = self._team, isinstance(weight, dtensor_type())
        key = (layer.shape, in_parts and (weight.device_mesh, weight.placements))
        if key not in self._spreads:
            self._spreads[key] = (
                spread_of(layer.name, weight, team.rank)
                if in_parts
                else whole(layer.shape, team.ranks[0], team.rank)
            )
        # to_local() makes a new tensor of a parameter, which would need a new table each time.
        return self._spreads[key], weight._local_tensor if in_parts else weight

    def _side(self, row: int) -> int:
        return min(sides(self.layers[row].shape, self.layers[row].kind))

    def _cost(self, row: int, least: float, is_apart: bool) -> float:
        """What measuring a layer costs its owner, in multiplications."""
        if is_apart:  # the products are everyone's
            return self.layers[row].n_eigs
        sketch, side = self._options.sketch, self._side(row)
        vectors = sketch.probes * sketch.steps if side > least else side
        return math.prod(self.layers[row].shape) * vectors


def shared_out(costs: Sequence[float], members: int) -> list[int]:
    """Who of the members does which job: the longest first, each to the one with the least."""
    loads = [0.0] * members
    owners = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        owners[job] = min(range(members), key=loads.__getitem__)
        loads[owners[job]] += costs[job]
    return owners


def _mesh(weight: Weight) -> Any:
    """Device mesh of a weight; None of a plain tensor."""
    if isinstance(weight, dtensor_type()):
        return weight.device_mesh
    if isinstance(weight, LoraWeight) and isinstance(weight._base, dtensor_type()):
        raise TypeError(
            f"{weight.name} is the weight of a LoRA layer and spread over processes, which is not "
            "supported; train it with DDP, or leave it out with exclude="
        )
    return None


def _joined(
    shape: tuple[int, ...], blocks: Mapping[int, Block], parts: Mapping[int, Tensor]
) -> Tensor:
    any_part = next(iter(parts.values()))
    weight = any_part.new_empty(shape)
    for rank, part in parts.items():
        weight[blocks[rank]] = part
    return weight


def _no_measurement(layer: Layer) -> Measurement:
    """Of a layer that is not finite."""
    nan = math.nan
    fit = AlphaFit(nan, nan, 0, nan, nan, 0, Reason.NOT_FINITE.text)
    return Measurement(fit, layer.n_eigs, nan, nan, "exact")


def _packed(m: Measurement) -> list[float]:
    fit = m.fit
    numbers = [fit.alpha, fit.xmin, fit.n_tail, fit.ks, fit.alpha_error, fit.n_zeros]
    sums = [m.n_eigs, m.max_eigenvalue, m.sum_eigenvalues, m.sketch_error]
    return [*numbers, _REASONS[fit.reason], *sums, m.method == "sketch"]


def _unpacked(numbers: Sequence[float]) -> Measurement:
    alpha, xmin, n_tail, ks, alpha_error, n_zeros, reason, *sums, is_sketch = numbers
    n_eigs, max_eigenvalue, sum_eigenvalues, sketch_error = sums
    return Measurement(
        fit=AlphaFit(
            alpha, xmin, int(n_tail), ks, alpha_error, int(n_zeros), Reason(int(reason)).text
        ),
        n_eigs=int(n_eigs),
        max_eigenvalue=max_eigenvalue,
        sum_eigenvalues=sum_eigenvalues,
        method="sketch" if is_sketch else "exact",
        sketch_error=sketch_error,
    )
