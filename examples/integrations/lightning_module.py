"""Lightning, both ways, on synthetic data: seconds on a CPU.

python examples/integrations/lightning_module.py
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import tbfast
from tbfast.trainers import LightningTempBalance

WIDTHS = (64, 128, 256, 128, 128, 64)


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        hidden = [part for pair in pairwise(WIDTHS) for part in (nn.Linear(*pair), nn.GELU())]
        self.net = nn.Sequential(*hidden, nn.Linear(64, 4))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


class NamedGroups(Classifier):
    """The rates of all layers visible: to LearningRateMonitor, each by its name."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(tbfast.param_groups(self.net), lr=2e-3)
        base = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=32)
        scheduler = tbfast.TempBalance(optimizer, base)
        return dict(optimizer=optimizer, lr_scheduler=dict(scheduler=scheduler, interval="step"))


def train(kind: type[Classifier], **options: Any) -> None:
    L.seed_everything(0)
    inputs = torch.randn(512, 64)
    data = TensorDataset(inputs, (inputs @ torch.randn(64, 4)).argmax(1))
    quiet = dict(logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer = L.Trainer(max_epochs=4, accelerator="cpu", **quiet, **options)
    trainer.fit(kind(), DataLoader(data, batch_size=64))
    print(f"{kind.__name__}: loss {trainer.callback_metrics['loss']:.3f}")


if __name__ == "__main__":
    train(Classifier, callbacks=[LightningTempBalance()])  # the one added argument
    train(NamedGroups)
