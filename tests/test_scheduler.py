"""param_groups and TempBalance: which rates each group gets, under every torch scheduler."""

import copy
import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as ls

import tbfast
from tbfast import TempBalance, param_groups

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
    return loss.item()


def metric(step):
    return 1.0 + step // 40 * 0.1  # rises: ReduceLROnPlateau has something to reduce


def advance(scheduler, step):
    plateau = isinstance(getattr(scheduler, "base", scheduler), ls.ReduceLROnPlateau)
    scheduler.step(*([metric(step)] if plateau else []))


class PublishedCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3)
        self.bn2 = nn.BatchNorm2d(12)
        self.shortcut = nn.Sequential(nn.Conv2d(12, 60, 1), nn.BatchNorm2d(60))
        self.conv3 = nn.Conv2d(60, 12, 3, groups=2)
        self.bn3 = nn.BatchNorm2d(12)
        self.fc1 = nn.Linear(64, 80)
        self.fc2 = nn.Linear(80, 60)
        self.fc3 = nn.Linear(60, 10)


def published_rates(model, base):
    """tempbalance.py of the paper, in NumPy: rate of every parameter by name."""
    names, alphas, counts = [], [], []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        weight = module.weight.detach().double().numpy()
        if weight.ndim == 4:
            out, inner, kh, kw = weight.shape
            slices = weight.reshape(out, inner, kh * kw).transpose(2, 0, 1) * np.sqrt(0.5)
        else:
            slices = weight[None]
        values = np.sort(np.concatenate([np.linalg.svd(s, compute_uv=False) for s in slices]) ** 2)
        i = int(len(values) / 2)
        n = len(values) - i
        alphas.append(1 + n / (np.log(values[i:]).sum() - n * np.log(values[i])))
        names.append(name)
        counts.append(len(values))
    kept = [row for row in range(1, len(names) - 1) if counts[row] >= 50]
    alpha = np.array([alphas[row] for row in kept])
    rates = base * np.interp(alpha, [alpha.min(), alpha.max()], [0.5, 1.5])
    tuned = dict(zip([names[row] for row in kept], rates, strict=True))
    result = {}
    for name, _ in model.named_parameters():
        module = name.rpartition(".")[0]
        if isinstance(model.get_submodule(module), nn.BatchNorm2d):
            module = module.replace("bn", "conv")
        result[name] = tuned.get(module, base)
    return result


def test_rates_of_a_cnn_are_those_of_the_published_code():
    torch.manual_seed(0)
    model = PublishedCNN()
    optimizer = torch.optim.SGD(param_groups(model), lr=0.1)
    TempBalance(optimizer)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    expected = published_rates(model, 0.1)
    assert found.keys() == expected.keys()
    assert len(set(expected.values())) == 5  # conv2, conv3, fc1, fc2; the rest keeps 0.1
    for name, rate in expected.items():
        # 1e-6: NumPy's singular values of float32 weights against those of the Gram matrix
        assert found[name] == pytest.approx(rate, rel=1e-6), name


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:.*epoch parameter.*:UserWarning")
def test_every_rate_is_the_base_rate_times_the_factor(name):
    model, twin = make_mlp(), make_mlp()
    optimizer = torch.optim.SGD(make_groups(model), lr=0.05, momentum=0.9)
    other = torch.optim.SGD(make_groups(twin), lr=0.05, momentum=0.9)
    scheduler = TempBalance(optimizer, SCHEDULERS[name](optimizer), every=3, budget=None)
    plain = SCHEDULERS[name](other)
    for step in range(200):
        factors = scheduler.factors
        for mine, reference in zip(optimizer.param_groups, other.param_groups, strict=True):
            # Exact: the base rate is put back before the schedule moves it, so nothing drifts.
            assert mine["lr"] == reference["lr"] * factors.get(mine["name"], 1.0)
            assert mine["momentum"] == reference["momentum"]
        assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        other.step()
        advance(scheduler, step)
        advance(plain, step)
    assert scheduler.last_epoch == 200
    assert len(scheduler.history) == 67
    if name == "OneCycleLR":
        assert optimizer.param_groups[0]["momentum"] != 0.9


def test_factors_apply_from_construction_on_and_untuned_layers_keep_the_rate():
    optimizer = torch.optim.SGD(make_groups(make_mlp()), lr=0.1)
    scheduler = TempBalance(optimizer)
    assert isinstance(scheduler, ls.LRScheduler)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates.pop("untuned") == 0.1
    assert rates == {name: 0.1 * f for name, f in scheduler.factors.items()}
    assert set(scheduler.factors.values()) >= {0.5, 1.5}


def test_without_a_base_the_user_sets_the_rates():
    optimizer = torch.optim.SGD(make_groups(make_mlp()), lr=0.1)
    scheduler = TempBalance(optimizer)
    for rate in (0.1, 0.02, 0.02):
        for group in optimizer.param_groups:
            group["lr"] = rate
        scheduler.step()
        scheduler.step()
        for group in optimizer.param_groups:
            assert group["lr"] == rate * scheduler.factors.get(group["name"], 1.0)


def test_measuring_follows_optimizer_steps_not_calls():
    model = make_mlp()
    optimizer = torch.optim.SGD(make_groups(model), lr=0.1)
    scheduler = TempBalance(optimizer, ls.StepLR(optimizer, 100), every=2)
    for step in range(6):
        backward(model, step)
        optimizer.step()
        scheduler.step()
        scheduler.step()  # Accelerate calls it once per process
    assert [step for step, _, _ in scheduler.history] == [0, 2, 4, 6]
    for _ in range(4):
        scheduler.step()
    assert len(scheduler.history) == 4
    for step in range(5):  # once an epoch
        backward(model, step)
        optimizer.step()
    scheduler.step()
    assert [step for step, _, _ in scheduler.history][4:] == [11]


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_grad_scaler_skips_is_not_counted(fused):
    model = make_mlp()
    optimizer = torch.optim.AdamW(make_groups(model), lr=0.01, fused=fused)
    scheduler = TempBalance(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(4):
        optimizer.zero_grad()
        x, y = make_batch(step)
        loss = (model(x) - y).square().mean() * (math.inf if step == 1 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
    assert scheduler.balancer.steps == 3
    assert [step for step, _, _ in scheduler.history] == [0, 1, 2, 3]


def test_a_step_that_calls_its_parents_counts_once():
    torch.optim.SGD([torch.zeros(1)])  # torch hooks a class when it first meets it

    class Mine(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    model = make_mlp()
    optimizer = Mine(make_groups(model), lr=0.1)
    scheduler = TempBalance(optimizer)
    backward(model, 0)
    optimizer.step()
    assert scheduler.balancer.steps == 1


OPTIMIZERS = {
    "SGD momentum": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
    "AdamW foreach": lambda groups: torch.optim.AdamW(groups, lr=0.01, foreach=True),
    "AdamW fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    "AdamW tensor lr": lambda groups: torch.optim.AdamW(
        [{**group, "lr": torch.tensor(0.01)} for group in groups]
    ),
}
if hasattr(torch.optim, "Adafactor"):
    OPTIMIZERS["Adafactor"] = lambda groups: torch.optim.Adafactor(groups, lr=0.01)
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = lambda groups: torch.optim.Muon(groups, lr=0.01)


def train(model, optimizer, scheduler, steps):
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        advance(scheduler, step)


@pytest.mark.parametrize("optimizer_first", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resuming_is_exact_to_the_bit(name, optimizer_first, tmp_path):
    def build():
        model = make_mlp(bias=name != "Muon")
        optimizer = OPTIMIZERS[name](make_groups(model))
        base = ls.CosineAnnealingLR(optimizer, 50)
        return model, optimizer, TempBalance(optimizer, base, every=3, ema=0.5, ramp=2)

    straight = build()
    train(*straight, range(40))
    half = build()
    train(*half, range(20))
    torch.save([part.state_dict() for part in half], tmp_path / "half.pt")
    states = torch.load(tmp_path / "half.pt", weights_only=True)
    resumed = build()
    order = (0, 1, 2) if optimizer_first else (0, 2, 1)
    for part in order:
        resumed[part].load_state_dict(states[part])
    train(*resumed, range(20, 40))
    for a, b in zip(straight[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert straight[2].factors == resumed[2].factors
    assert straight[2].get_last_lr() == resumed[2].get_last_lr()
    assert straight[2].history == resumed[2].history


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:.*epoch parameter.*:UserWarning")
def test_the_state_of_any_base_scheduler_goes_along(name, tmp_path):
    def build():
        model = make_mlp()
        optimizer = torch.optim.SGD(make_groups(model), lr=0.05, momentum=0.9)
        return model, optimizer, TempBalance(optimizer, SCHEDULERS[name](optimizer))

    straight, half, resumed = build(), build(), build()
    train(*straight, range(30))
    train(*half, range(15))
    torch.save([part.state_dict() for part in half], tmp_path / "half.pt")
    states = torch.load(tmp_path / "half.pt", weights_only=True)
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    train(*resumed, range(15, 30))
    assert straight[2].get_last_lr() == resumed[2].get_last_lr()


def test_a_state_with_a_base_needs_one():
    optimizer = torch.optim.SGD(make_groups(make_mlp()), lr=0.1)
    with_base = TempBalance(optimizer, ls.StepLR(optimizer, 5))
    other = torch.optim.SGD(make_groups(make_mlp()), lr=0.1)
    with pytest.raises(ValueError, match="saved with a base scheduler"):
        TempBalance(other).load_state_dict(with_base.state_dict())


def test_tensor_rates_are_filled_in_place():
    groups = [{**group, "lr": torch.tensor(0.1)} for group in make_groups(make_mlp())]
    optimizer = torch.optim.SGD(groups)
    tensors = [group["lr"] for group in optimizer.param_groups]
    scheduler = TempBalance(optimizer, ls.StepLR(optimizer, 1, 0.5))
    optimizer.step()
    scheduler.step()
    for tensor, group in zip(tensors, optimizer.param_groups, strict=True):
        assert group["lr"] is tensor
        # float32 rates: 6e-8 each for base and product
        factor = scheduler.factors.get(group["name"], 1.0)
        assert tensor.item() == pytest.approx(0.05 * factor, rel=2e-7)


@pytest.mark.parametrize("of", ["grad", "momentum"])
def test_other_spectra_wait_until_their_tensor_exists(of):
    model = make_mlp()
    optimizer = torch.optim.SGD(make_groups(model), lr=0.1, momentum=0.9)
    scheduler = TempBalance(optimizer, of=of)
    assert set(scheduler.factors.values()) == {1.0}
    backward(model, 0)
    optimizer.step()
    scheduler.step()
    assert {0.5, 1.5} <= set(scheduler.factors.values())
    group = optimizer.param_groups[1]
    parameter = group["params"][0]
    seen = parameter.grad if of == "grad" else optimizer.state[parameter]["momentum_buffer"]
    reference = tbfast.Balancer(scheduler.balancer.layers[:1])
    reference.update({group["name"]: seen})
    # 1e-9: alpha of the same matrix alone or in a batch
    assert scheduler.alphas[group["name"]] == pytest.approx(
        reference.alphas[group["name"]], rel=1e-9
    )


def test_adam_momentum_is_its_first_moment():
    model = make_mlp()
    optimizer = torch.optim.Adam(make_groups(model), lr=0.1)
    scheduler = TempBalance(optimizer, of="momentum")
    backward(model, 0)
    optimizer.step()
    scheduler.step()
    assert {0.5, 1.5} <= set(scheduler.factors.values())


def test_a_compiled_model_trains_as_the_plain_one():
    rates = []
    for compiled in (False, True):
        model = make_mlp()
        optimizer = torch.optim.SGD(make_groups(model), lr=0.1)
        scheduler = TempBalance(optimizer)
        forward = torch.compile(model, backend="eager") if compiled else model
        for step in range(3):
            optimizer.zero_grad()
            backward(forward, step)
            optimizer.step()
            scheduler.step()
        rates.append(scheduler.get_last_lr())
    assert rates[0] == pytest.approx(rates[1], rel=1e-5)  # a compiled forward may reassociate


def test_groups_may_vanish_or_join_under_the_scheduler():
    model = make_mlp()
    optimizer = torch.optim.SGD(make_groups(model), lr=0.1)
    scheduler = TempBalance(optimizer)
    factors = scheduler.factors
    gone = optimizer.param_groups.pop(1)["name"]
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": 0.3})
    scheduler.step()
    for group in optimizer.param_groups[1:-1]:
        assert group["lr"] == 0.1 * factors[group["name"]]
    assert optimizer.param_groups[-1]["lr"] == 0.3
    assert scheduler.factors[gone] == factors[gone]


def test_misuse_is_refused_with_the_remedy():
    model = make_mlp()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"param_groups\(model\).*tbfast\.attach"):
        TempBalance(plain)
    optimizer = torch.optim.SGD(make_groups(model), lr=0.1)
    with pytest.raises(TypeError, match="base must be a torch scheduler or None, got int"):
        TempBalance(optimizer, 3)
    with pytest.raises(ValueError, match="base must be built on the same optimizer"):
        TempBalance(optimizer, ls.StepLR(plain, 5))
    with pytest.raises(TypeError, match="unknown option 'wiggle'"):
        TempBalance(optimizer, wiggle=3)
    ls.StepLR(optimizer, 5)
    with pytest.warns(UserWarning, match="pass it as TempBalance"):
        TempBalance(optimizer)


def test_unknown_attributes_are_not_those_of_the_base():
    optimizer = torch.optim.SGD(make_groups(make_mlp()), lr=0.1)
    scheduler = TempBalance(optimizer, ls.OneCycleLR(optimizer, 0.1, total_steps=10))
    assert not hasattr(scheduler, "total_steps")  # Accelerate asks


def test_a_diverged_run_stops_with_its_last_rates():
    model = make_mlp()
    optimizer = torch.optim.SGD(make_groups(model), lr=0.1)
    scheduler = TempBalance(optimizer)
    rates = scheduler.get_last_lr()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for step in range(3):
            backward(model, step)
            optimizer.step()
            if step < 2:
                scheduler.step()
        assert scheduler.get_last_lr() == rates
        with pytest.raises(RuntimeError, match="diverged"):
            scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == rates


def test_the_balancers_views_are_there():
    optimizer = torch.optim.SGD(make_groups(make_mlp()), lr=0.1)
    scheduler = TempBalance(optimizer)
    assert scheduler.alphas == scheduler.balancer.alphas
    assert scheduler.errors == scheduler.balancer.errors
    assert scheduler.overhead == 0.0
    assert 0 <= scheduler.explained()["shape"] <= 1
    scheduler.freeze()
    scheduler.step()
    factors = scheduler.factors
    assert len(set(factors.values())) == 1  # one type: the layers differ by index alone
    for group in optimizer.param_groups[1:]:
        assert group["lr"] == 0.1 * factors[group["name"]]


def test_plot_draws_the_history(tmp_path):
    pytest.importorskip("matplotlib")
    TempBalance(torch.optim.SGD(make_groups(make_mlp()), lr=0.1)).plot(tmp_path / "run.svg")
    assert "<svg" in (tmp_path / "run.svg").read_text()


# Groups ------------------------------------------------------------------------------------


def names_of(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return {g["name"]: [names[id(p)] for p in g["params"]] for g in groups}


def test_groups_hold_every_parameter_once_and_the_untuned_first():
    model = make_mlp()
    groups = make_groups(model)
    found = names_of(model, groups)
    assert next(iter(found)) == "untuned"
    assert found == {
        "untuned": ["0.weight", "0.bias", "8.weight", "8.bias"],
        "2.weight": ["2.weight", "2.bias"],
        "4.weight": ["4.weight", "4.bias"],
        "6.weight": ["6.weight", "6.bias"],
    }
    assert [g.get("kind") for g in groups] == [None, "linear", "linear", "linear"]


def test_no_group_is_empty_when_everything_is_tuned():
    model = make_mlp(bias=False)
    groups = param_groups(model, min_eigs=2, skip_first=False, skip_last=False)
    assert [g["name"] for g in groups] == [f"{i}.weight" for i in (0, 2, 4, 6, 8)]
    assert all(g["params"] for g in groups)


def test_first_and_last_go_before_the_small_ones_in_tempbalance_and_after_in_model_balancing():
    model = make_mlp()  # eigenvalue counts 6, 16, 16, 16, 3
    tempbalance = names_of(model, param_groups(model, min_eigs=10))
    assert list(tempbalance) == ["untuned", "2.weight", "4.weight", "6.weight"]
    balancing = names_of(model, param_groups(model, min_eigs=10, preset="model-balancing"))
    assert list(balancing) == ["untuned", "2.weight", "4.weight"]
    kept = names_of(model, param_groups(model, min_eigs=2, preset="llr"))
    assert list(kept) == [f"{i}.weight" for i in (0, 2, 4, 6, 8)]


def test_embeddings_are_layers_for_llr_only():
    model = nn.Sequential(nn.Embedding(20, 8), *make_mlp())
    assert "0.weight" not in names_of(model, make_groups(model, skip_first=False))
    llr = {g["name"]: g.get("role") for g in param_groups(model, preset="llr")}
    assert llr["0.weight"] == "embedding"
    assert llr["1.weight"] is None


def test_excluded_layers_are_neither_first_nor_last():
    model = make_mlp()
    found = names_of(model, make_groups(model, exclude=["0.*", "8.*"]))
    assert list(found) == ["untuned", "4.weight"]
    assert list(names_of(model, make_groups(model, include="[246].weight"))) == [
        "untuned",
        "4.weight",
    ]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(8)
        self.q = nn.Linear(8, 8)
        self.norm2 = nn.LayerNorm(8)
        self.norm3 = nn.GroupNorm(2, 8)
        self.up = nn.Linear(8, 8)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.final = nn.LayerNorm(8)
        self.head = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("none", {}),
        ("name", {}),
        (
            "order",
            {
                "blocks.0.norm2": "blocks.0.q",
                "blocks.1.norm1": "blocks.0.up",
                "blocks.1.norm2": "blocks.1.q",
                "final": "blocks.1.up",
            },
        ),
        (
            "block",
            {
                "blocks.0.norm1": "blocks.0.q",
                "blocks.0.norm2": "blocks.0.q",
                "blocks.0.norm3": "blocks.0.q",
                "blocks.1.norm1": "blocks.1.q",
                "blocks.1.norm2": "blocks.1.q",
                "blocks.1.norm3": "blocks.1.q",
            },
        ),
    ],
)
def test_norms_join_the_layer_their_rule_says(rule, expected):
    model = Transformer()
    groups = names_of(model, make_groups(model, tie_norms=rule))
    found = {
        name.removesuffix(".weight"): group.removesuffix(".weight")
        for group, names in groups.items()
        for name in names
        if group != "untuned" and name.endswith("weight") and name != group
    }
    assert found == expected
    assert sum(map(len, groups.values())) == len(list(model.parameters()))


def test_decay_splits_a_layer_into_two_groups_with_one_factor():
    model = make_mlp()
    groups = make_groups(model, weight_decay=0.1, no_decay="*.bias")
    found = names_of(model, groups)
    assert found["untuned"] == ["0.weight", "8.weight"]
    assert found["untuned/no_decay"] == ["0.bias", "8.bias"]
    assert found["2.weight/no_decay"] == ["2.bias"]
    decays = {g["name"]: g["weight_decay"] for g in groups}
    assert decays["2.weight"] == 0.1
    assert decays["2.weight/no_decay"] == 0.0
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    scheduler = TempBalance(optimizer)
    rates = {g["name"]: g["lr"] for g in optimizer.param_groups}
    assert rates["untuned"] == rates["untuned/no_decay"] == 0.1
    for name, factor in scheduler.factors.items():
        assert rates[name] == rates[f"{name}/no_decay"] == 0.1 * factor


def test_a_weight_that_does_not_decay_still_leads_its_layer():
    groups = {g["name"]: g for g in make_groups(make_mlp(), weight_decay=0.1, no_decay="2.weight")}
    assert groups["2.weight"]["weight_decay"] == 0.0
    assert groups["2.weight/decay"]["weight_decay"] == 0.1
    assert groups["2.weight/decay"]["layer"] == "2.weight"


def test_frozen_parameters_are_in_no_group():
    model = make_mlp()
    model[2].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    found = names_of(model, make_groups(model))
    assert list(found) == ["untuned", "4.weight", "6.weight"]
    assert found["4.weight"] == ["4.weight"]
    assert "2.bias" in found["untuned"]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"min_eigs": 50}, ValueError, "5 analysed, 0 of them with min_eigs=50 .* lower min_eigs"),
        ({"min_eigs": -1}, ValueError, "min_eigs must be"),
        ({"tie_norms": "near"}, ValueError, "tie_norms must be one of"),
        ({"preset": "best"}, ValueError, "preset must be one of"),
        ({"include": 3}, TypeError, "iterable|globs"),
    ],
)
def test_what_cannot_be_grouped_is_refused(options, error, words):
    with pytest.raises(error, match=words):
        param_groups(make_mlp(), **options)


def test_a_model_must_be_a_module():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        param_groups([nn.Linear(3, 3)])


def test_one_optimizer_has_one_owner_of_its_rates():
    model = make_mlp()
    optimizer = torch.optim.SGD(make_groups(model), 0.1)
    first = TempBalance(optimizer)
    for again in (TempBalance, lambda o: tbfast.attach(o, model, min_eigs=4)):
        with pytest.raises(ValueError, match="already, and factors must not multiply"):
            again(optimizer)
    first.detach()
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}
    assert TempBalance(optimizer).factors == first.factors


def test_a_tensor_rate_shared_by_all_groups_is_given_to_each():
    optimizer = torch.optim.AdamW(make_groups(make_mlp()), lr=torch.tensor(0.1))
    scheduler = TempBalance(optimizer)
    for group in optimizer.param_groups:
        factor = scheduler.factors.get(group["name"], 1.0)
        assert float(group["lr"]) == pytest.approx(0.1 * factor, rel=1e-6)  # rates are float32


def test_a_copied_scheduler_goes_on_measuring():
    model = make_mlp()
    optimizer = torch.optim.SGD(make_groups(model), 0.1)
    model, optimizer, scheduler = copy.deepcopy((model, optimizer, TempBalance(optimizer)))
    for step in range(3):
        backward(model, step)
        optimizer.step()
        scheduler.step()
    # The first step after the copy finds the hooks lost and puts them back.
    assert [entry[0] for entry in scheduler.history] == [0, 1, 2]


def test_a_head_tied_to_the_embedding_is_the_last_layer_that_is_skipped():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(20, 8)
            self.body = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
            self.out = nn.Linear(8, 20, bias=False)
            self.out.weight = self.table.weight

    tuned = [g["name"] for g in make_groups(Tied()) if "kind" in g]
    assert tuned == ["body.1.weight", "body.2.weight"]


def test_other_misuse_names_what_is_wrong():
    model = make_mlp()
    with pytest.raises(TypeError, match="must be a torch.optim.Optimizer, got Sequential"):
        TempBalance(model)
    with pytest.raises(ValueError, match="include='nothing.*first weights .* 0.weight"):
        make_groups(model, include="nothing*")
    scheduler = TempBalance(torch.optim.SGD(make_groups(model), 0.1))
    with pytest.raises(ValueError, match="not a state of TempBalance: it has no 'balancer'"):
        scheduler.load_state_dict({"base": None})
    with pytest.raises(ValueError, match="not a state of a Balancer: it has no 'names'"):
        scheduler.balancer.load_state_dict({})
    optimizer = torch.optim.SGD(make_groups(model), 0.1)
    with pytest.raises(ValueError, match="mapping='log2' needs alphas above 1"):
        TempBalance(optimizer, mapping="log2", shape_correction="null")
    with pytest.raises(ValueError, match="factors match no layer: globs typo"):
        TempBalance(optimizer, mapping="fixed", factors={"typo*": 2.0})
