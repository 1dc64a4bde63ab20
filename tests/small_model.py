"""A small model that trains, and every scheduler of torch above it."""

from itertools import pairwise

import torch
from torch import nn
from torch.optim import lr_scheduler as ls

from tbfast import param_groups

SCHEDULERS = {
    "StepLR": lambda o: ls.StepLR(o, 7, 0.8),
    "CosineAnnealingLR": lambda o: ls.CosineAnnealingLR(o, 60, 1e-3),
    "CosineAnnealingWarmRestarts": lambda o: ls.CosineAnnealingWarmRestarts(o, 20, 2),
    "LinearLR": lambda o: ls.LinearLR(o, 0.1, total_iters=50),
    "OneCycleLR": lambda o: ls.OneCycleLR(o, 0.2, total_steps=250),
    "ReduceLROnPlateau": lambda o: ls.ReduceLROnPlateau(o, patience=2),
    "SequentialLR": lambda o: ls.SequentialLR(
        o, [ls.LinearLR(o, 0.1, total_iters=20), ls.CosineAnnealingLR(o, 100)], [20]
    ),
    "ChainedScheduler": lambda o: ls.ChainedScheduler(
        [ls.ConstantLR(o, 0.5, 30), ls.ExponentialLR(o, 0.98)]
    ),
    "LambdaLR": lambda o: ls.LambdaLR(o, lambda step: 1 / (1 + step)),
}


def make_mlp(seed=0, bias=True):
    torch.manual_seed(seed)
    sizes = [6, 16, 16, 24, 16, 3]
    layers = []
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out, bias=bias), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def make_groups(model, **options):
    return param_groups(model, min_eigs=4, **options)


def make_batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)


def backward(model, step):
    x, y = make_batch(step)
    loss = (model(x) - y).square().mean()
    loss.backward()
    return loss


def advance(scheduler, step):
    """A step of any scheduler; the metric rises: ReduceLROnPlateau has something to reduce."""
    plateau = isinstance(getattr(scheduler, "base", scheduler), ls.ReduceLROnPlateau)
    scheduler.step(*([1.0 + step // 40 * 0.1] if plateau else []))


def train(model, optimizer, steps, scheduler=None):
    for step in steps:
        model.zero_grad()
        backward(model, step)
        optimizer.step()
        if scheduler is not None:
            advance(scheduler, step)
