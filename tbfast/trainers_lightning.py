"""A callback that balances the optimizer of a ``LightningModule``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from tbfast.balancer import Balancer
from tbfast.instep import attach
from tbfast.trainers import check_log, metrics


class LightningTempBalance(Callback):
    """Layer-wise factors in Lightning: ``Trainer(callbacks=[LightningTempBalance()])``.

    ``attach`` for the length of ``fit()``: optimizer, schedulers and ``LearningRateMonitor`` see
    the base rates. Factors, alphas and overhead are logged every ``log_every_n_steps`` (see
    :func:`tbfast.trainers.metrics`). Checkpoints hold the state, and ``fit(ckpt_path=...)`` goes on
    exactly.

    Args:
        log: ``"summary"`` over the layers, or ``"layers"`` for those and every layer.
        **options: See :func:`tbfast.attach`.

    Attributes:
        balancer: The latest run's Balancer; None before the first.

    Raises:
        ValueError: On an unknown ``log``; from ``fit()``, if there is not exactly one optimizer,
            and as :func:`tbfast.attach` and :meth:`tbfast.Balancer.load_state_dict`.
    """

    def __init__(self, *, log: str = "summary", **options: Any) -> None:
        self.balancer: Balancer | None = None
        self._log = check_log(log)
        self._options = options
        self._loaded: dict[str, Any] | None = None
        self._logged_at = 0

    def state_dict(self) -> dict[str, Any]:
        """What Lightning saves."""
        return {} if self.balancer is None else {"balancer": self.balancer.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keep a state for the start of training: there is no optimizer yet."""
        self._loaded = state_dict["balancer"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"LightningTempBalance needs one optimizer, got {len(trainer.optimizers)}; call "
                "tbfast.attach(optimizer, model) in configure_optimizers for those to balance"
            )
        if self.balancer is not None:
            self.balancer.detach()  # that run raised
        self.balancer = attach(trainer.optimizers[0], pl_module, **self._options)
        if self._loaded is not None:
            self.balancer.load_state_dict(self._loaded)
        elif trainer.ckpt_path is not None:
            warnings.warn(
                f"{trainer.ckpt_path} was saved without LightningTempBalance: balancing begins "
                "here",
                UserWarning,
                stacklevel=2,
            )
        self._loaded = None
        self._logged_at = self.balancer.steps

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        every = trainer.log_every_n_steps
        if self.balancer is None or every == 0:
            return
        # Not each step: Lightning takes milliseconds for one log_dict.
        if self.balancer.steps // every != self._logged_at // every:
            pl_module.log_dict(metrics(self.balancer, self._log))
        self._logged_at = self.balancer.steps

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.balancer is not None:
            self.balancer.detach()
