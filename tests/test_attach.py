"""attach: factors inside the step, nothing of them outside."""

import copy
import gc
import math
import warnings
import weakref

import pytest
import torch
from small_model import SCHEDULERS, advance, backward, make_batch, make_mlp, train
from torch import nn
from torch.optim import lr_scheduler as ls

import tbfast
from tbfast import attach

TUNED = ["2.weight", "4.weight", "6.weight"]


class Spy(torch.optim.SGD):
    """SGD that notes the rate and momentum of every parameter while its step runs."""

    def step(self, closure=None):
        self.seen = {
            id(p): (g["lr"], g["momentum"]) for g in self.param_groups for p in g["params"]
        }
        if getattr(self, "fail", False):
            raise RuntimeError("the step failed")
        return super().step(closure)


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:.*epoch parameter.*:UserWarning")
def test_every_rate_is_the_base_rate_times_the_factor(name, attach_first):
    model, twin = make_mlp(), make_mlp()
    optimizer = Spy(model.parameters(), lr=0.05, momentum=0.9)
    other = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    plain = SCHEDULERS[name](other)
    if attach_first:
        balancer = attach(optimizer, model, min_eigs=4, every=3, budget=None)
    scheduler = SCHEDULERS[name](optimizer)
    if not attach_first:
        balancer = attach(optimizer, model, min_eigs=4, every=3, budget=None)
    for step in range(200):
        factors = balancer.factors
        optimizer.zero_grad()
        backward(model, step)
        groups = optimizer.param_groups
        optimizer.step()
        other.step()
        base = other.param_groups[0]
        for pname, p in model.named_parameters():
            factor = factors.get(pname.replace("bias", "weight"), 1.0)
            assert optimizer.seen[id(p)] == (base["lr"] * factor, base["momentum"])
        assert optimizer.param_groups is groups
        advance(scheduler, step)
        advance(plain, step)
        assert [g["lr"] for g in groups] == [g["lr"] for g in other.param_groups]
    assert list(factors) == TUNED
    assert len(balancer.history) == 67


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


OPTIMIZERS = {
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "AdamW tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
}
if hasattr(torch.optim, "Adafactor"):
    OPTIMIZERS["Adafactor"] = lambda p: torch.optim.Adafactor(p, lr=0.01)
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = lambda p: torch.optim.Muon(p, lr=0.01)


def make(name):
    model = make_mlp(bias=name != "Muon")
    return model, OPTIMIZERS[name](model.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resuming_is_exact_to_the_bit(name, tmp_path):
    def build():
        model, optimizer = make(name)
        options = {"min_eigs": 4, "every": 3, "ema": 0.5, "ramp": 2}
        balancer = attach(optimizer, model, **options)
        return model, optimizer, balancer, ls.CosineAnnealingLR(optimizer, 50)

    straight, half = build(), build()
    train(*straight[:2], range(40), straight[3])
    train(*half[:2], range(20), half[3])
    torch.save([part.state_dict() for part in half], tmp_path / "half.pt")
    resumed = build()
    states = torch.load(tmp_path / "half.pt", weights_only=True)
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    train(*resumed[:2], range(20, 40), resumed[3])
    assert equal(straight[0], resumed[0])
    assert straight[2].factors == resumed[2].factors
    assert straight[2].history == resumed[2].history


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_factors_of_one_change_no_bit(name):
    model, optimizer = make(name)
    twin, plain = make(name)
    attach(optimizer, model, min_eigs=4, mapping="fixed", factors={})
    train(model, optimizer, range(5))
    train(twin, plain, range(5))
    assert equal(model, twin)


@pytest.mark.parametrize("name", ["SGD foreach", "AdamW foreach", "AdamW fused"])
def test_splitting_groups_changes_no_bit_of_the_state(name):
    model, optimizer = make(name)
    twin, plain = make(name)
    attach(optimizer, model, min_eigs=4, mapping="fixed", factors={"4.*": 1 + 1e-300, "2.*": 0.5})
    groups = tbfast.param_groups(twin, min_eigs=4)
    plain = OPTIMIZERS[name](groups)
    for group in plain.param_groups:
        group["lr"] *= 0.5 if group["name"] == "2.weight" else 1.0
    train(model, optimizer, range(5))
    train(twin, plain, range(5))
    assert equal(model, twin)


def test_checkpoints_and_groups_are_those_of_a_plain_optimizer():
    model, twin = make_mlp(), make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    plain = torch.optim.AdamW(twin.parameters(), lr=0.01)
    attach(optimizer, model, min_eigs=4)
    train(model, optimizer, range(3))
    train(twin, plain, range(3))
    mine, reference = optimizer.state_dict(), plain.state_dict()
    assert mine["param_groups"] == reference["param_groups"]
    assert mine["state"].keys() == reference["state"].keys()
    plain.load_state_dict(mine)


def test_both_appliers_train_alike():
    model, twin = make_mlp(), make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    balancer = attach(optimizer, model, min_eigs=4)
    grouped = torch.optim.AdamW(tbfast.param_groups(twin, min_eigs=4), lr=0.01)
    scheduler = tbfast.TempBalance(grouped)
    train(model, optimizer, range(10))
    train(twin, grouped, range(10), scheduler)
    assert equal(model, twin)
    assert balancer.factors == scheduler.factors


def test_a_step_that_raises_leaves_the_groups_as_they_were():
    model = make_mlp()
    optimizer = Spy(model.parameters(), lr=0.1)
    balancer = attach(optimizer, model, min_eigs=4)
    groups, before = optimizer.param_groups, dict(optimizer.param_groups[0])
    backward(model, 0)
    optimizer.fail = True
    with pytest.raises(RuntimeError, match="the step failed"):
        optimizer.step()
    assert optimizer.param_groups is groups
    assert groups[0] == before
    assert balancer.steps == 0
    optimizer.fail = False
    optimizer.step()
    assert optimizer.param_groups is groups
    assert balancer.steps == 1


def test_detaching_leaves_a_plain_optimizer():
    model, twin = make_mlp(), make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    balancer = attach(optimizer, model, min_eigs=4)
    with pytest.raises(ValueError, match=r"call \.detach\(\) on that first"):
        attach(optimizer, model, min_eigs=4)
    balancer.detach()
    assert "step" not in optimizer.__dict__
    train(model, optimizer, range(3))
    train(twin, plain, range(3))
    assert equal(model, twin)
    assert balancer.steps == 0
    attach(optimizer, model, min_eigs=4).detach()


@pytest.mark.parametrize("attach_first", [True, False])
def test_detaching_under_a_scheduler_keeps_the_scheduler(attach_first):
    model = make_mlp()
    optimizer = Spy(model.parameters(), lr=0.1)
    if attach_first:
        balancer = attach(optimizer, model, min_eigs=4)
        scheduler = ls.StepLR(optimizer, 1, 0.5)
    else:
        scheduler = ls.StepLR(optimizer, 1, 0.5)
        balancer = attach(optimizer, model, min_eigs=4)
    balancer.detach()
    train(model, optimizer, range(2), scheduler)  # torch would warn of a step it cannot see
    assert {rate for rate, _ in optimizer.seen.values()} == {0.05}


def test_a_copy_of_the_optimizer_is_plain():
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    balancer = attach(optimizer, model, min_eigs=4)
    twin = copy.deepcopy(optimizer)
    twin.step()
    assert "step" not in twin.__dict__
    assert balancer.steps == 0


def test_groups_are_split_within_their_own_hyperparameters():
    model = make_mlp()
    parameters = dict(model.named_parameters())
    optimizer = Spy(
        [
            {"params": [p for n, p in parameters.items() if "bias" in n], "lr": 0.3},
            {"params": [p for n, p in parameters.items() if "weight" in n], "momentum": 0.5},
        ],
        lr=0.1,
    )
    balancer = attach(optimizer, model, min_eigs=4)
    factors = balancer.factors
    backward(model, 0)
    optimizer.step()
    assert optimizer.seen[id(parameters["2.bias"])] == (0.3 * factors["2.weight"], 0)
    assert optimizer.seen[id(parameters["2.weight"])] == (0.1 * factors["2.weight"], 0.5)
    assert optimizer.seen[id(parameters["0.weight"])] == (0.1, 0.5)


def test_what_the_step_writes_into_its_group_is_kept():
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            self.widths = len(self.param_groups)
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1
            return super().step(closure)

    model = make_mlp()
    optimizer = Counting(model.parameters(), lr=0.1)
    attach(optimizer, model, min_eigs=4)
    train(model, optimizer, range(3))
    assert optimizer.widths == 4
    assert optimizer.param_groups[0]["k"] == 3
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_an_untuned_group_stays_the_same_object():
    class Holding(torch.optim.SGD):
        def step(self, closure=None):
            self.held = list(self.param_groups)
            return super().step(closure)

    model = make_mlp()
    optimizer = Holding([{"params": model[0].parameters()}, {"params": model[2].parameters()}], 0.1)
    attach(optimizer, model, min_eigs=4, mapping="fixed", factors={"2.*": 0.5})
    train(model, optimizer, range(1))
    assert optimizer.held[0] is optimizer.param_groups[0]
    assert optimizer.held[1] is not optimizer.param_groups[1]


def test_only_layers_that_the_optimizer_holds_are_tuned():
    model = make_mlp()
    optimizer = torch.optim.SGD([*model[2].parameters(), *model[6].parameters()], lr=0.1)
    assert list(attach(optimizer, model, min_eigs=4).factors) == ["2.weight", "6.weight"]
    strange = torch.optim.SGD(make_mlp().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"holds none of the 3 tuned weights .*2\.weight"):
        attach(strange, model, min_eigs=4)


def test_parameters_that_are_not_the_models_keep_their_rate():
    model = make_mlp()
    extra = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    optimizer = Spy([*model.parameters(), *extra], lr=0.1)
    attach(optimizer, model, min_eigs=4)
    train(model, optimizer, range(1))
    assert [optimizer.seen[id(p)][0] for p in extra] == [0.1, 0.1]


def test_parameters_may_be_replaced_in_model_and_optimizer():
    model = make_mlp()
    optimizer = Spy(model.parameters(), lr=0.1)
    balancer = attach(optimizer, model, min_eigs=4)
    for module in model[::2]:  # as Accelerate does for FSDP
        module.weight = nn.Parameter(module.weight.detach().clone())
        module.bias = nn.Parameter(module.bias.detach().clone())
    optimizer.param_groups[0]["params"] = list(model.parameters())
    factors = balancer.factors
    train(model, optimizer, range(1))
    for name, p in model.named_parameters():
        factor = factors.get(name.replace("bias", "weight"), 1.0)
        assert optimizer.seen[id(p)][0] == 0.1 * factor


def test_closures_see_all_parameters():
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(optimizer, model, min_eigs=4)

    def closure():
        optimizer.zero_grad()
        return backward(model, 0)

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert second < first


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_grad_scaler_skips_is_not_counted(fused):
    model = make_mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    balancer = attach(optimizer, model, min_eigs=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(4):
        optimizer.zero_grad()
        x, y = make_batch(step)
        loss = (model(x) - y).square().mean() * (math.inf if step == 1 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert balancer.steps == 3
    assert [step for step, _, _ in balancer.history] == [0, 1, 2, 3]


def test_a_compiled_model_trains_as_the_plain_one():
    found = []
    for compiled in (False, True):
        model = make_mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        balancer = attach(optimizer, model, min_eigs=4)
        forward = torch.compile(model, backend="eager") if compiled else model
        train(forward, optimizer, range(3))
        found.append(list(balancer.factors.values()))
    assert found[0] == pytest.approx(found[1], rel=1e-5)  # a compiled forward may reassociate


@pytest.mark.parametrize("of", ["grad", "momentum"])
def test_other_spectra_wait_until_their_tensor_exists(of):
    model = make_mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    balancer = attach(optimizer, model, min_eigs=4, of=of)
    assert set(balancer.factors.values()) == {1.0}
    train(model, optimizer, range(1))
    assert {0.5, 1.5} <= set(balancer.factors.values())


def test_a_layer_that_turns_nan_keeps_its_factor_and_one_warning_names_it():
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    balancer = attach(optimizer, model, min_eigs=4)
    before = balancer.factors
    with torch.no_grad():
        model[4].weight[0, 0] = math.nan
    with pytest.warns(RuntimeWarning, match=r"4\.weight has no alpha at step 1"):
        optimizer.step()
    assert balancer.factors == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_a_diverged_run_raises_with_plain_groups():
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(optimizer, model, min_eigs=4)
    groups = optimizer.param_groups
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        optimizer.step()
        optimizer.step()
        with pytest.raises(RuntimeError, match="diverged"):
            optimizer.step()
    assert optimizer.param_groups is groups
    assert groups[0]["lr"] == 0.1


def test_lbfgs_is_refused():
    model = make_mlp()
    with pytest.raises(TypeError, match="LBFGS has one learning rate"):
        attach(torch.optim.LBFGS(model.parameters()), model)


def test_unknown_options_are_refused_and_leave_nothing_behind():
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="unknown option 'wiggle'"):
        attach(optimizer, model, min_eigs=4, wiggle=1)
    attach(optimizer, model, min_eigs=4)


def test_the_optimizer_is_freed_with_its_balancer():
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    balancer = attach(optimizer, model, min_eigs=4)
    gone = weakref.ref(optimizer)
    del optimizer, balancer
    gc.collect()
    assert gone() is None


def test_attach_is_the_function_whatever_was_imported():
    import tbfast.instep

    assert tbfast.attach is tbfast.instep.attach
    assert callable(tbfast.attach)
