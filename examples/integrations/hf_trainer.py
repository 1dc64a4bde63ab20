"""The Hugging Face Trainer, both ways, on a tiny BERT with random weights: seconds on a CPU.

python examples/integrations/hf_trainer.py [OUTPUT_DIR]
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import tbfast
from tbfast.trainers import TempBalanceCallback

SIZES = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)


class BalancedTrainer(Trainer):
    """A Trainer whose schedule is TempBalance over its own: a named group for each layer."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            decay = set(self.get_decay_parameter_names(model))
            free = [name for name, _ in model.named_parameters() if name not in decay]
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = tbfast.param_groups(model, weight_decay=self.args.weight_decay, no_decay=free)
            self.optimizer = cls(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        base = super().create_scheduler(num_training_steps, optimizer)
        if not isinstance(base, tbfast.TempBalance):
            self.lr_scheduler = tbfast.TempBalance(optimizer or self.optimizer, base)
        return self.lr_scheduler


def train(kind: type[Trainer], out: str, **options: Any) -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=100, **SIZES))
    ids = torch.randint(0, 100, (64, 16))
    data = [dict(input_ids=row, labels=row[0] % 2) for row in ids]
    args = TrainingArguments(
        out, max_steps=16, logging_steps=8, learning_rate=1e-3, report_to=[], disable_tqdm=True
    )
    trainer = kind(model, args, train_dataset=data, **options)
    trainer.train()
    print(f"{kind.__name__}: loss {trainer.state.log_history[-1]['train_loss']:.3f}")


if __name__ == "__main__":
    out = sys.argv[1] if len(sys.argv) > 1 else "out/hf_trainer"
    # the one added argument; afterwards resume_from_checkpoint needs nothing else
    train(Trainer, out, callbacks=[TempBalanceCallback()])
    train(BalancedTrainer, out)
