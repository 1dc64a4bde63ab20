"""A training loop with Accelerate, on synthetic data: seconds on a CPU.

python examples/integrations/accelerate_loop.py
accelerate launch --cpu --num_processes 2 examples/integrations/accelerate_loop.py
"""

from __future__ import annotations

import tempfile
from itertools import pairwise

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import tbfast

torch.manual_seed(0)
inputs = torch.randn(512, 64)
data = TensorDataset(inputs, (inputs @ torch.randn(64, 4)).argmax(1))
widths = (64, 128, 256, 128, 128, 64)
hidden = [part for pair in pairwise(widths) for part in (nn.Linear(*pair), nn.GELU())]
model = nn.Sequential(*hidden, nn.Linear(64, 4))

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
optimizer = torch.optim.AdamW(tbfast.param_groups(model), lr=1e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=32))

# Not prepared: a prepared scheduler is stepped once for each process. Checkpointed all the same.
base = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2 * len(loader))
scheduler = tbfast.TempBalance(optimizer, base)
accelerator.register_for_checkpointing(scheduler)

for _ in range(4):
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                scheduler.step()
            optimizer.zero_grad()

folder = [tempfile.mkdtemp() if accelerator.is_main_process else ""]
accelerator.save_state(broadcast_object_list(folder)[0])
accelerator.wait_for_everyone()  # the main process writes
accelerator.load_state(folder[0])

accelerator.print(f"loss {loss.item():.3f} after {scheduler.balancer.steps} steps")
for name, alpha in scheduler.alphas.items():
    accelerator.print(f"  {name}  alpha {alpha:.3f}  rate ×{scheduler.factors[name]:.3f}")
accelerator.end_training()
