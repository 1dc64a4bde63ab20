"""The README's training loop, both ways, on synthetic data: seconds on a CPU.

python examples/training_loop.py
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

import tbfast

torch.manual_seed(0)
inputs = torch.randn(512, 64)
classes = (inputs @ torch.randn(64, 4)).argmax(1)
batches = list(zip(inputs.split(64), classes.split(64), strict=True)) * 5


def new_model() -> nn.Module:
    widths = (64, 128, 256, 128, 128, 64)
    hidden = [part for pair in pairwise(widths) for part in (nn.Linear(*pair), nn.GELU())]
    return nn.Sequential(*hidden, nn.Linear(64, 4))


# [attach]
model = new_model()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
balancer = tbfast.attach(optimizer, model)  # the one added line

for x, y in batches:
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
# [/attach]

print(f"attach: loss {loss.item():.3f}")
for name, alpha in balancer.alphas.items():
    print(f"  {name}  alpha {alpha:.3f}  rate ×{balancer.factors[name]:.3f}")

# [scheduler]
model = new_model()
optimizer = torch.optim.AdamW(tbfast.param_groups(model), lr=1e-3)
cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(batches))
scheduler = tbfast.TempBalance(optimizer, cosine)

for x, y in batches:
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
# [/scheduler]

print(f"scheduler: loss {loss.item():.3f}")
for name, alpha in scheduler.alphas.items():
    print(f"  {name}  alpha {alpha:.3f}  rate ×{scheduler.factors[name]:.3f}")
