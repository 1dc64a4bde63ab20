"""TempBalance under DeepSpeed's ZeRO, whose optimizers hold no matrices.

Stages 1 and 2 put a flat tensor into each group, stage 3 leaves the groups empty and partitions the
model's own parameters. So the weights are read from the model, gathered where they are partitioned,
and the engine's calls of ``step`` are counted: its optimizer steps once for each group.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tbfast.scheduler import TempBalance


class ZeroTempBalance(TempBalance):
    """:class:`tbfast.TempBalance` for ``deepspeed.initialize``, of ZeRO stage 0 to 3.

    ::

        deepspeed.init_distributed()
        optimizer = torch.optim.AdamW(tbfast.param_groups(model), lr=1e-3)
        schedule = ZeroTempBalance(optimizer, LambdaLR(optimizer, warmup), model=model)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=schedule, config=config
        )

    The engine then steps it and keeps its state in checkpoints. Stage 3 gathers all tuned weights
    in every process while it measures: choose ``every`` accordingly. A model built under
    ``deepspeed.zero.Init`` needs ``deepspeed.zero.GatheredParameters`` around the lines above
    ``initialize``.

    Args:
        optimizer, base: See :class:`tbfast.TempBalance`.
        model: The module that holds the parameters of the groups.
        **options: See :class:`tbfast.TempBalance`; ``of`` can be ``"weight"`` only.

    Raises:
        ValueError: As TempBalance does, and on another ``of``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        base: LRScheduler | None = None,
        *,
        model: nn.Module,
        **options: Any,
    ) -> None:
        if options.get("of", "weight") != "weight":
            raise ValueError(
                f"of={options['of']!r}: ZeRO cuts gradients and momenta into flat parts; "
                "use of='weight'"
            )
        self._model = model
        super().__init__(optimizer, base, **options)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Count an optimizer step, then as :meth:`tbfast.TempBalance.step`."""
        self.balancer.advance()
        super().step(*args, **kwargs)

    def _measure(self) -> None:
        with _whole(self._model, [layer.name for layer in self.balancer.layers]) as weights:
            self.balancer.update(weights)

    def _before_step(self, compiled: bool) -> None:
        """Nothing: the inner optimizer steps one group at a time."""

    def _after_step(self, taken: bool) -> None:
        """Nothing: the inner optimizer's steps are not counted."""


@contextmanager
def _whole(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Whole weights by name, while the context lasts."""
    parameters = dict(model.named_parameters())
    weights: dict[str, Tensor] = {name: parameters[name] for name in names}
    if not any(hasattr(weight, "ds_id") for weight in weights.values()):
        yield weights
        return
    deepspeed = importlib.import_module("deepspeed")
    with deepspeed.zero.GatheredParameters(list(weights.values())):
        yield weights
