"""The processes that share the weights of a run, and the few things they do together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tbfast.sharding import Block, block_shape


class Team:
    """The processes that hold some weights.

    They talk in the process groups of the device mesh on which all weights lie; in the default
    group where weights lie on several meshes or on none, or where the mesh has all processes.

    Args:
        meshes: Device mesh of each weight, None for a plain tensor; not empty.
        device: Where tensors that are exchanged have to be.

    Attributes:
        ranks: Global ranks of the members.
        rank: Global rank of this process.
        device: As given.
    """

    def __init__(self, meshes: Iterable[Any], device: torch.device) -> None:
        different = set(meshes)
        mesh = different.pop()
        self.rank = dist.get_rank()
        self.ranks = list(range(dist.get_world_size()))
        self.device = device
        self._groups: list[Any] = [None]  # None is the default group
        if not different and mesh is not None and mesh.size() < len(self.ranks):
            # Sums over each dimension in turn are sums over the mesh.
            self._groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
            self.ranks = mesh.mesh.flatten().tolist()

    def total(self, x: Tensor) -> Tensor:
        """Sum of everyone's real tensors of one shape and dtype; the same bits for all.

        ``x`` may be overwritten.
        """
        return self._reduced(x, dist.ReduceOp.SUM)

    def largest(self, x: Tensor) -> Tensor:
        """Largest of everyone's tensors, entry by entry; ``x`` may be overwritten."""
        return self._reduced(x, dist.ReduceOp.MAX)

    def sent(
        self, transfers: Sequence[tuple[Mapping[int, Block], int]], parts: Sequence[Tensor]
    ) -> dict[int, dict[int, Tensor]]:
        """Send the parts of each weight to one process.

        Args:
            transfers: For each weight, who has which part of it, and who wants them; nobody wants
                two. The same for all.
            parts: For each weight, what this process has of it; may be empty.

        Returns:
            For the weight that this process wants, by its number, its parts by rank.
        """
        got: dict[int, dict[int, Tensor]] = {}
        operations, group = [], self._groups[0] if len(self._groups) == 1 else None
        for number, ((blocks, owner), part) in enumerate(zip(transfers, parts, strict=True)):
            if owner == self.rank:
                got[number] = {}
                for rank, block in blocks.items():
                    buffer = torch.empty(block_shape(block), dtype=part.dtype, device=self.device)
                    if rank == self.rank:
                        buffer = part
                    else:
                        operations.append(dist.P2POp(dist.irecv, _bytes(buffer), rank, group))
                    got[number][rank] = buffer
            elif self.rank in blocks:
                operations.append(
                    dist.P2POp(dist.isend, _bytes(part.to(self.device)), owner, group)
                )
        for request in dist.batch_isend_irecv(operations) if operations else ():
            request.wait()
        return got

    def _reduced(self, x: Tensor, operation: Any) -> Tensor:
        result = x.to(self.device).contiguous()
        for group in self._groups:
            dist.all_reduce(result, operation, group=group)
        return result.to(x.device)


def _bytes(tensor: Tensor) -> Tensor:
    """The memory of a tensor: not every group knows every dtype."""
    return tensor.contiguous().flatten().view(torch.uint8)
