"""Presets over a training, against their published rules written out here in NumPy."""

import math
import re
from collections import namedtuple
from fnmatch import fnmatchcase
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from tbfast import TempBalance, attach, param_groups

STEPS, EVERY = 12, 3
EXACT = {"budget": None, "method": "exact", "rate_classes": None, "every": EVERY}


# Models ------------------------------------------------------------------------------------


class ConvNet(nn.Module):
    """Layers that are tuned, first, last, too small and of groups; norms that follow and do not."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 5, padding=2)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(12)
        self.conv3 = nn.Conv2d(12, 16, 3, padding=1, groups=2)
        self.bn3 = nn.BatchNorm2d(16)
        self.shortcut = nn.Sequential(nn.Conv2d(12, 16, 1), nn.BatchNorm2d(16))
        self.fc1 = nn.Linear(64, 80)
        self.norm = nn.LayerNorm(80)
        self.fc2 = nn.Linear(80, 60)
        self.fc3 = nn.Linear(60, 52)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)) + self.shortcut(x))
        x = F.relu(self.norm(self.fc1(F.avg_pool2d(x, 2).flatten(1))))
        return self.fc3(F.relu(self.fc2(x)))


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        # A bias of the keys cancels in the softmax: Adam would make steps of its rounding errors.
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim)

    def forward(self, x):
        y = self.norm1(x)
        scores = self.query(y) @ self.key(y).transpose(1, 2) / math.sqrt(y.shape[-1])
        x = x + self.out(scores.softmax(-1) @ self.value(y))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """18 layers in 3 blocks and one outside: more than the 16 rates that are the default."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(64, 56)
        self.positions = nn.Embedding(6, 56)
        self.blocks = nn.ModuleList([Block(56) for _ in range(3)])
        self.norm = nn.LayerNorm(56)
        self.pooler = nn.Linear(56, 56)
        self.head = nn.Linear(56, 10)

    def forward(self, x):
        x = self.tokens(x) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        return self.head(self.pooler(self.norm(x)).tanh().mean(1))


def backward(model, step):
    draw = torch.Generator().manual_seed(step)
    images = torch.randn(16, 3, 4, 4, generator=draw)
    words = torch.randint(64, (16, 6), generator=draw)
    classes = torch.randint(10, (16,), generator=draw)
    model.zero_grad()
    F.cross_entropy(model(images if isinstance(model, ConvNet) else words), classes).backward()


# The published rules -----------------------------------------------------------------------


def spectrum(weight):
    """Ascending eigenvalues of a Linear, or of all kernel positions of a Conv2d."""
    weight = weight.detach().double().numpy()
    if weight.ndim == 4:
        weight = weight.reshape(*weight.shape[:2], -1).transpose(2, 0, 1) * np.sqrt(0.5)
    return np.sort(np.linalg.svd(weight, compute_uv=False).ravel() ** 2)


def hill(values, xmin_pos):
    """Exponent of the tail that begins at the eigenvalue of index int(N / xmin_pos)."""
    start = int(len(values) / xmin_pos)
    n = len(values) - start
    return 1 + n / (np.log(values[start:]).sum() - n * np.log(values[start]))


def layers_of(model):
    """Path and spectrum of each Linear and Conv2d, in ``named_modules()`` order."""
    return [
        (path, spectrum(module.weight))
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]


def by_parameter(model, factors):
    """Weight and bias have the factor of their module; those of other modules have 1."""
    return {n: factors.get(n.rpartition(".")[0], 1.0) for n, _ in model.named_parameters()}


def linear_map(alphas, low, high):
    values = list(alphas.values())
    return {k: np.interp(a, [min(values), max(values)], [low, high]) for k, a in alphas.items()}


def tempbalance(model):
    """Zhou et al. 2023: not the first, not the last, 50 eigenvalues; linear from 0.5 to 1.5.

    A bias has the rate of its weight, and a BatchNorm ``bn*`` that of the layer ``conv*``.
    """
    kept = {path: hill(v, 2) for path, v in layers_of(model)[1:-1] if len(v) >= 50}
    factors = linear_map(kept, 0.5, 1.5)
    for path, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            factors[path] = factors.get(path.replace("bn", "conv"), 1.0)
    return by_parameter(model, factors)


def model_balancing(model):
    """Liu et al. 2024: 50 eigenvalues, then not the last; a sigmoid of the blocks' mean alphas.

    All that is in a block, norms included, has its rate: 10 ** (sigmoid(10 d) - 0.5) with d the
    block's distance to the mean of all blocks. What is in no block keeps the base rate.
    """
    kept = [(path, hill(v, 1.5)) for path, v in layers_of(model) if len(v) >= 50][:-1]
    blocks = {}
    for path, alpha in kept:
        if match := re.match(r"(.*?\.\d+)\.", path):
            blocks.setdefault(match[1], []).append(alpha)
    means = {block: np.mean(alphas) for block, alphas in blocks.items()}
    centre = np.mean(list(means.values()))
    factors = {}
    for block, mean in means.items():
        for path, _ in model.get_submodule(block).named_modules(prefix=block):
            factors[path] = 10 ** (1 / (1 + np.exp(-10 * (mean - centre))) - 0.5)
    return by_parameter(model, factors)


def llr(model):
    """arXiv 2605.22297: all layers, linear from 1 to 5; embeddings and head as the largest alpha.

    A bias has the rate of its weight; norms keep the base rate.
    """
    alphas = {path: hill(v, 2) for path, v in layers_of(model) if path != "head"}
    largest = max(alphas.values())
    alphas |= dict.fromkeys(["tokens", "positions", "head"], largest)
    return by_parameter(model, linear_map(alphas, 1, 5))


def alphadecay(model):
    """arXiv 2506.14562: weight decay, linear in alpha from 0.667 to 3; a light tail gets the most.

    Layers are chosen as in tempbalance; the others and embeddings keep the base decay.
    """
    kept = {path: hill(v, 2) for path, v in layers_of(model)[1:-1] if len(v) >= 50}
    return by_parameter(model, linear_map(kept, 0.667, 3))


# Trainings ---------------------------------------------------------------------------------


SGD = partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4)
ADAM = partial(torch.optim.AdamW, weight_decay=0.1)
DECAY = {"of_what": "weight_decay", "low": 0.667, "high": 3.0}
NO_DECAY = ("*bias", "*norm*")


Case = namedtuple("Case", "preset rule model optimizer lr options no_decay")
CASES = {
    "tempbalance": Case("tempbalance", tempbalance, ConvNet, SGD, 0.1, {}, ()),
    "model-balancing": Case("model-balancing", model_balancing, Transformer, ADAM, 3e-3, {}, ()),
    "llr": Case("llr", llr, Transformer, ADAM, 1e-3, {}, ()),
    "alphadecay": Case("tempbalance", alphadecay, Transformer, ADAM, 3e-3, DECAY, NO_DECAY),
}


def make_model(case):
    torch.manual_seed(0)
    return case.model()


def decays(case, name):
    return not any(fnmatchcase(name, glob) for glob in case.no_decay)


def applied(model, optimizer):
    """Rate and weight decay that the optimizer's groups give each parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


def as_scheduler(case, model):
    groups = param_groups(model, preset=case.preset, no_decay=case.no_decay)
    optimizer = case.optimizer(groups, lr=case.lr)
    base = CosineAnnealingLR(optimizer, STEPS)
    return optimizer, TempBalance(optimizer, base, preset=case.preset, **EXACT, **case.options)


def attached(case, model):
    named = list(model.named_parameters())
    decaying = [p for name, p in named if decays(case, name)]
    free = [p for name, p in named if not decays(case, name)]
    optimizer = case.optimizer([{"params": decaying}], lr=case.lr)
    if free:
        optimizer.add_param_group({"params": free, "weight_decay": 0.0})
    attach(optimizer, model, preset=case.preset, **EXACT, **case.options)
    return optimizer, CosineAnnealingLR(optimizer, STEPS)


@pytest.fixture(scope="module", params=CASES)
def published(request):
    """A case, the model trained by its rule, what each step applied, and each refresh's factors.

    A plain optimizer has one group for each parameter; at every third step its factor follows
    from the weights of that moment.
    """
    case = CASES[request.param]
    model, steps, refreshes = make_model(case), [], []
    parameters = dict(model.named_parameters())
    optimizer = case.optimizer([{"params": [p]} for p in parameters.values()], lr=case.lr)
    for step in range(STEPS):
        if step % EVERY == 0:
            refreshes.append(case.rule(model))
        for name, group in zip(parameters, optimizer.param_groups, strict=True):
            group["lr"] = case.lr * (1 + math.cos(math.pi * step / STEPS)) / 2
            group["weight_decay"] = optimizer.defaults["weight_decay"] * decays(case, name)
            group[case.options.get("of_what", "lr")] *= refreshes[-1][name]
        steps.append(applied(model, optimizer))
        backward(model, step)
        optimizer.step()
    return case, model, steps, refreshes


@pytest.mark.parametrize("apply", [as_scheduler, attached])
def test_a_training_has_the_published_rates_and_ends_in_the_same_weights(published, apply):
    case, twin, expected, _ = published
    model, found = make_model(case), []
    optimizer, scheduler = apply(case, model)
    # It runs after the hooks of tbfast, and so sees the groups of the step itself.
    optimizer.register_step_pre_hook(lambda *_: found.append(applied(model, optimizer)))
    for step in range(STEPS):
        backward(model, step)
        optimizer.step()
        scheduler.step()
    assert len(found) == len(expected) == STEPS
    for step, (ours, rule) in enumerate(zip(found, expected, strict=True)):
        assert ours.keys() == rule.keys()
        for name, rates in rule.items():
            # 1e-6: singular values against eigenvalues of the Gram matrix, as for one fit
            assert ours[name] == pytest.approx(rates, rel=1e-6, abs=0), (step, name)
    weights = dict(model.named_parameters())
    for name, weight in twin.named_parameters():
        # 1e-6: float32 rounding (6e-8 of weights up to 1) of 12 steps, and rates 1e-6 apart
        torch.testing.assert_close(weights[name], weight, rtol=1e-6, atol=1e-6)


def test_factors_of_two_refreshes_lie_a_thousand_tolerances_apart(published):
    for before, after in pairwise(published[-1]):
        # 1e-3: else the test above could not tell a stale factor from the right one
        assert max(abs(after[name] / before[name] - 1) for name in after) > 1e-3
