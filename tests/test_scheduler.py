"""TempBalance: which rates each group gets, under every torch scheduler."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from small_model import SCHEDULERS, advance, backward, make_batch, make_groups, make_mlp
from torch import nn
from torch.optim import lr_scheduler as ls

import tbfast
from tbfast import TempBalance, param_groups


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
