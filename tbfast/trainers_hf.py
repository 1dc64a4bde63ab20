"""A callback that balances the optimizer of the Hugging Face ``Trainer``."""

from __future__ import annotations

import base64
import io
import sys
import warnings
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers.trainer_callback import (
    CallbackHandler,
    ExportableState,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.training_args import TrainingArguments

from tbfast.balancer import Balancer
from tbfast.instep import attach
from tbfast.trainers import check_log, metrics


class TempBalanceCallback(TrainerCallback, ExportableState):
    """Layer-wise factors in a Hugging Face ``Trainer``: ``callbacks=[TempBalanceCallback()]``.

    ``attach`` for the length of ``train()``: schedule, groups and ``learning_rate`` in the logs
    stay those of the Trainer. Factors, alphas and overhead join each training log, hence
    ``trainer.state.log_history``, the progress bar and all reporters (see :func:`metrics
    <tbfast.trainers.metrics>`).

    The state travels in the checkpoint's ``trainer_state.json``, which the Trainer writes and reads
    whatever the way a checkpoint came about or where it lies. So ``resume_from_checkpoint`` goes
    on exactly, with ``restore_callback_states_from_checkpoint`` or without.

    Args:
        log: ``"summary"`` over the layers, or ``"layers"`` for those and every layer.
        **options: See :func:`tbfast.attach`.

    Attributes:
        balancer: The latest run's Balancer; None before the first.

    Raises:
        ValueError: On an unknown ``log``; from ``train()``, with DeepSpeed, and as
            :func:`tbfast.attach` and :meth:`tbfast.Balancer.load_state_dict`.
    """

    def __init__(self, *, log: str = "summary", **options: Any) -> None:
        self.balancer: Balancer | None = None
        self.lost: list[str] = []  # options that state() could not save, after a rebuild from it
        self._log = check_log(log)
        self._options = options

    def state(self) -> dict[str, Any]:
        """What the Trainer saves: the options that JSON can hold, and the Balancer's state."""
        plain = {k: v for k, v in self._options.items() if _is_plain(v)}
        attributes: dict[str, Any] = {"lost": sorted(set(self._options) - set(plain))}
        if self.balancer is not None:
            attributes["saved"] = _to_text(self.balancer.state_dict())
        return {"args": {"log": self._log, **plain}, "attributes": attributes}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        **kwargs: Any,
    ) -> None:
        if self.lost:
            raise ValueError(
                "restore_callback_states_from_checkpoint=True builds callbacks anew from JSON, "
                f"which cannot hold the option {self.lost[0]!r} of TempBalanceCallback; leave that "
                "flag out: the callback's state is restored without it"
            )
        if getattr(args, "deepspeed", None):
            raise ValueError(
                "TempBalanceCallback does not work with DeepSpeed, which flattens the parameters "
                "that the optimizer holds; use tbfast.param_groups and tbfast.TempBalance"
            )
        name = type(self).__name__
        entry = state.stateful_callbacks.get(name, {})
        if isinstance(entry, list):
            raise ValueError(
                f"the Trainer has {len(entry)} callbacks {name}, and factors must not multiply; "
                "keep one"
            )
        if self.balancer is not None:
            self.balancer.detach()  # that run raised, or is being restarted with smaller batches
        self.balancer = attach(optimizer, model, **self._options)
        saved = entry.get("attributes", {}).get("saved")
        if state.global_step > 0 and saved is not None:
            self.balancer.load_state_dict(_from_text(saved))
        elif state.global_step > 0:
            warnings.warn(
                f"the checkpoint of step {state.global_step} was saved without {name}: balancing "
                "begins here",
                UserWarning,
                stacklevel=2,
            )
        # The Trainer saves only callbacks that are in here already.
        state.stateful_callbacks.setdefault(name, self.state())
        _put_first(self, sys._getframe())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        if self.balancer is not None and "loss" in logs:  # no evaluation, no closing summary
            found = metrics(self.balancer, self._log)
            logs.update(found)
            state.log_history[-1].update(found)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.balancer is not None:
            self.balancer.detach()


def _put_first(callback: TrainerCallback, frame: FrameType | None) -> None:
    """Move a callback ahead of the reporters, which see of a log what those before them added.

    The Trainer puts its reporters first, and shows no callback the list that it stands in.
    """
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            handler.callbacks.sort(key=lambda other: other is not callback)
            return
        frame = frame.f_back


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return value is None or isinstance(value, (bool, int, float, str))


def _to_text(state: dict[str, Any]) -> str:
    # Not plain JSON: a Balancer's state may hold tensors.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _from_text(text: str) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(
        io.BytesIO(base64.b64decode(text)), map_location="cpu", weights_only=True
    )
    return state
