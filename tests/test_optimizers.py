"""What torch optimizers do under factors, against the same optimizers with permanent groups."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
from small_model import backward, train
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.optim import lr_scheduler as ls
from torch.optim.swa_utils import SWALR, AveragedModel

from tbfast import TempBalance, attach, param_groups

LR, DECAY = 0.01, 0.1
FACTORS = {"2": 0.5, "4": 1.5, "6": 0.5}  # by layer; two of them share one
FIXED = {"mapping": "fixed", "factors": {f"{key}.*": factor for key, factor in FACTORS.items()}}
APPLIERS = ("attach", "TempBalance", "TempBalance with base")


def make_mlp(bias=True):
    torch.manual_seed(0)
    sizes = [(6, 16), (16, 16), (16, 24), (24, 16), (16, 16), (16, 3)]
    parts = [part for size in sizes for part in (nn.Linear(*size, bias=bias), nn.Tanh())]
    return nn.Sequential(*parts)


def schedule(epoch):
    return 1 / (1 + epoch)


lambda_lr = partial(ls.LambdaLR, lr_lambda=schedule)


def factor_of(name):
    return FACTORS.get(name.partition(".")[0], 1.0)


def decay_of(name):
    return 0.0 if name.endswith("bias") else DECAY


def spying(kind):
    """The optimizer class, noting how many groups each of its steps has."""

    class Spy(kind):
        def step(self, closure=None):
            self.widths = [*getattr(self, "widths", []), len(self.param_groups)]
            return super().step(closure)

    return Spy


def groups_for(applier, model):
    """For TempBalance its groups; for attach two, what decays and what does not."""
    if applier != "attach":
        return param_groups(model, min_eigs=4, weight_decay=DECAY, no_decay="*.bias")
    halves = {}
    for name, parameter in model.named_parameters():
        halves.setdefault(decay_of(name), []).append(parameter)
    return [{"params": params, "weight_decay": decay} for decay, params in halves.items()]


def applied(kind, applier, bias=True, schedule_of=lambda_lr, **options):
    """A model, an optimizer with factors, and the scheduler that the loop has to step."""
    model = make_mlp(bias)
    chosen = {"of_what": options.pop("of_what", "lr"), **FIXED}
    optimizer = kind(groups_for(applier, model), lr=LR, **options)
    if applier == "attach":
        attach(optimizer, model, min_eigs=4, **chosen)
        return model, optimizer, schedule_of(optimizer)
    base = schedule_of(optimizer) if applier == "TempBalance with base" else None
    return model, optimizer, TempBalance(optimizer, base, **chosen)


def oracle(kind, rates, bias=True, of_what="lr", **options):
    """The same training in plain torch: one permanent group for each parameter."""
    model = make_mlp(bias)
    names = [name for name, _ in model.named_parameters()]
    optimizer = kind([{"params": [p]} for p in model.parameters()], lr=LR, **options)
    for step, rate in enumerate(rates):
        for name, group in zip(names, optimizer.param_groups, strict=True):
            group.update(lr=rate, weight_decay=decay_of(name))
            group[of_what] *= factor_of(name)
        train(model, optimizer, [step])
    return model, optimizer


def rates_of(applier, steps=5):
    return [LR * (1.0 if applier == "TempBalance" else schedule(step)) for step in range(steps)]


def assert_same(model, optimizer, twin, plain):
    """Parameters and the state of each are equal to the bit."""
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        mine, reference = optimizer.state[p], plain.state[q]
        assert mine.keys() == reference.keys()
        for key, value in reference.items():
            assert torch.equal(torch.as_tensor(mine[key]), torch.as_tensor(value)), key


def identities(optimizer):
    groups = optimizer.param_groups
    return id(groups), [(id(g), id(g["params"]), *map(id, g["params"])) for g in groups]


CASES = {
    "AdamW": (torch.optim.AdamW, {}),
    "AdamW foreach": (torch.optim.AdamW, {"foreach": True}),
    "AdamW fused": (torch.optim.AdamW, {"fused": True}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "SGD foreach": (torch.optim.SGD, {"momentum": 0.9, "foreach": True}),
    "Adam amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "RMSprop centered": (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
    "NAdam": (torch.optim.NAdam, {}),
}
if hasattr(torch.optim, "Muon"):
    CASES["Muon"] = (torch.optim.Muon, {"bias": False})


@pytest.mark.parametrize("applier", APPLIERS)
@pytest.mark.parametrize("name", CASES)
def test_joined_groups_train_as_permanent_ones_to_the_bit(name, applier):
    kind, options = CASES[name]
    model, optimizer, scheduler = applied(spying(kind), applier, **options)
    outside = identities(optimizer)
    train(model, optimizer, range(5), scheduler)
    assert identities(optimizer) == outside
    assert_same(model, optimizer, *oracle(kind, rates_of(applier), **options))
    names = [name for name, _ in model.named_parameters()]
    distinct = {(factor_of(name), decay_of(name)) for name in names}
    assert optimizer.widths == [len(distinct)] * 5
    assert len(distinct) < len(names)


# What others see -----------------------------------------------------------------------------


@pytest.mark.parametrize("read", [dcp_state.get_optimizer_state_dict, lambda _, o: o.state_dict()])
@pytest.mark.parametrize("applier", APPLIERS)
def test_a_state_has_the_structure_of_a_plain_optimizers(applier, read):
    def structure(model, optimizer):
        state = read(model, optimizer)
        groups = [(list(group), group["params"]) for group in state["param_groups"]]
        return {key: list(entry) for key, entry in state["state"].items()}, groups

    model, optimizer, scheduler = applied(torch.optim.AdamW, applier)
    twin = make_mlp()
    plain = torch.optim.AdamW(groups_for(applier, twin), lr=LR)
    if applier != "TempBalance":
        lambda_lr(plain)  # notes an initial_lr
    train(model, optimizer, range(2), scheduler)
    train(twin, plain, range(2))
    assert structure(model, optimizer) == structure(twin, plain)


@pytest.mark.parametrize("applier", APPLIERS)
# DCP says that it runs in one process, and reads attributes that torch has deprecated.
@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
@pytest.mark.filterwarnings("ignore::FutureWarning:torch.distributed")
def test_a_distributed_checkpoint_resumes_to_the_bit(applier, tmp_path):
    def state_of(model, optimizer):
        state = dcp_state.get_optimizer_state_dict(model, optimizer)
        return {"model": model.state_dict(), "optimizer": state}

    model, optimizer, scheduler = applied(torch.optim.AdamW, applier)
    train(model, optimizer, range(3), scheduler)
    dcp.save(state_of(model, optimizer), checkpoint_id=tmp_path / "half", no_dist=True)
    progress = scheduler.state_dict()
    train(model, optimizer, range(3, 6), scheduler)

    resumed, other, schedule_of_other = applied(torch.optim.AdamW, applier)
    state = state_of(resumed, other)
    dcp.load(state, checkpoint_id=tmp_path / "half", no_dist=True)
    resumed.load_state_dict(state["model"])
    dcp_state.set_optimizer_state_dict(resumed, other, state["optimizer"])
    schedule_of_other.load_state_dict(progress)
    train(resumed, other, range(3, 6), schedule_of_other)
    assert_same(resumed, other, model, optimizer)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("applier", APPLIERS)
def test_a_copy_steps_with_the_rates_that_its_groups_show(applier, through):
    model, optimizer, scheduler = applied(torch.optim.SGD, applier)
    train(model, optimizer, range(2), scheduler)
    twin, plain = through((model, optimizer))
    assert "step" not in vars(plain)  # attached, it has one
    before = {name: p.detach().clone() for name, p in twin.named_parameters()}
    train(twin, plain, [2])
    for name, p in twin.named_parameters():
        shown = rates_of(applier)[2] * (1.0 if applier == "attach" else factor_of(name))
        expected = before[name] - shown * (p.grad + decay_of(name) * before[name])
        # 1e-6: a fused multiply-add rounds once where this rounds twice.
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-8)
    for p, q in zip(model.parameters(), before.values(), strict=True):
        assert torch.equal(p, q)  # the original took no step


# Changes while training ------------------------------------------------------------------------


class Failing(torch.optim.SGD):
    """SGD whose step writes into its groups and raises."""

    fail = False

    def step(self, closure=None):
        for group in self.param_groups:
            group["seen"] = True
        if self.fail:
            raise RuntimeError("the step failed")
        return super().step(closure)


@pytest.mark.parametrize("applier", APPLIERS[1:])
def test_a_step_that_raises_leaves_tempbalances_groups_as_they_were(applier):
    model, optimizer, scheduler = applied(Failing, applier)
    outside, rates = identities(optimizer), [g["lr"] for g in optimizer.param_groups]
    backward(model, 0)
    optimizer.fail = True
    with pytest.raises(RuntimeError, match="the step failed"):
        optimizer.step()
    assert identities(optimizer) == outside
    assert [g["lr"] for g in optimizer.param_groups] == rates
    assert all(g["seen"] for g in optimizer.param_groups)
    assert scheduler.balancer.steps == 0
    optimizer.fail = False
    train(model, optimizer, range(2), scheduler)
    assert scheduler.balancer.steps == 2
    assert_same(model, optimizer, *oracle(torch.optim.SGD, rates_of(applier, 2)))


CHANGES = {
    "betas": lambda group: group.update(betas=(0.5, 0.99)),
    "betas in place": lambda group: group["betas"].insert(0, group["betas"].pop(0) / 2),
    "weight_decay": lambda group: group.update(weight_decay=0.3),
    "maximize": lambda group: group.update(maximize=True),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("applier", APPLIERS)
def test_what_the_user_changes_in_one_group_splits_it_off_at_the_next_step(applier, change):
    betas = [0.9, 0.99] if change == "betas in place" else (0.9, 0.99)
    kind = spying(torch.optim.AdamW)
    model, optimizer, scheduler = applied(kind, applier, betas=betas)
    for group in optimizer.param_groups:
        group["betas"] = copy.copy(betas)  # torch gives all groups one list
    changed = optimizer.param_groups[-1]
    twin = make_mlp()
    twins = dict(zip(model.parameters(), twin.named_parameters(), strict=True))
    rows = [(group, *twins[p]) for group in optimizer.param_groups for p in group["params"]]
    mirrors = [{"params": [q], "weight_decay": decay_of(name)} for _, name, q in rows]
    plain = torch.optim.AdamW([{**mirror, "betas": copy.copy(betas)} for mirror in mirrors])
    for step, rate in enumerate(rates_of(applier, 4)):
        for (group, name, _), mirror in zip(rows, plain.param_groups, strict=True):
            mirror["lr"] = rate * factor_of(name)
            if step == 2 and group is changed:
                CHANGES[change](mirror)
        if step == 2:
            CHANGES[change](changed)
        train(model, optimizer, [step], scheduler)
        train(twin, plain, [step])
    assert_same(model, optimizer, twin, plain)
    # attach has the biases of all layers in this group: nothing was joined with it before.
    after = 6 if applier == "attach" else 7
    assert optimizer.widths == [6, 6, after, after]


@pytest.mark.parametrize("applier", APPLIERS)
def test_a_group_added_while_training_is_stepped_at_its_own_rate(applier):
    model, optimizer, scheduler = applied(torch.optim.SGD, applier, momentum=0.9)
    train(model, optimizer, range(2), scheduler)
    extra = nn.Parameter(torch.zeros(3))
    extra.grad = torch.ones(3)
    optimizer.add_param_group({"params": [extra], "lr": 0.25, "weight_decay": 0.0})
    model.zero_grad()
    backward(model, 2)
    optimizer.step()
    assert extra.tolist() == [-0.25] * 3
    state = optimizer.state_dict()
    last = state["param_groups"][-1]
    assert last["lr"] == 0.25
    assert state["state"][last["params"][0]]["momentum_buffer"].tolist() == [1.0] * 3
    del optimizer.state[extra]
    assert_same(model, optimizer, *oracle(torch.optim.SGD, rates_of(applier, 3), momentum=0.9))


# Weight decay ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW foreach", "AdamW fused"])
@pytest.mark.parametrize("applier", APPLIERS)
def test_factors_of_the_decay_leave_the_rate_to_its_schedule(applier, name):
    kind, options = spying(torch.optim.AdamW), CASES[name][1]
    model, optimizer, scheduler = applied(kind, applier, of_what="weight_decay", **options)
    train(model, optimizer, range(5), scheduler)
    *rates, last = rates_of(applier, 6)
    plain = oracle(torch.optim.AdamW, rates, of_what="weight_decay", **options)
    assert_same(model, optimizer, *plain)
    assert optimizer.widths == [4] * 5  # three decays, and none for all biases
    assert {group["lr"] for group in optimizer.param_groups} == {last}
    shown = sorted({group["weight_decay"] for group in optimizer.param_groups})
    inside = sorted({0.0, *(DECAY * factor for factor in (1.0, *FACTORS.values()))})
    assert shown == ([0.0, DECAY] if applier == "attach" else inside)


def test_an_optimizer_without_decay_has_none_to_multiply():
    model = make_mlp()
    optimizer = torch.optim.SGD(param_groups(model, min_eigs=4), lr=LR)
    words = "no group of this SGD has a weight_decay above 0; give it one, or use of_what='lr'"
    with pytest.raises(ValueError, match=words):
        attach(optimizer, model, min_eigs=4, of_what="weight_decay")
    with pytest.raises(ValueError, match=words):
        TempBalance(optimizer, of_what="weight_decay")


@pytest.mark.parametrize("applier", APPLIERS[::2])
def test_a_rate_that_rises_from_zero_gets_its_factors(applier):
    course = (0.0, 1.0, 0.5, 0.0, 1.0, 1.0)
    schedule_of = partial(ls.LambdaLR, lr_lambda=course.__getitem__)
    kind = spying(torch.optim.AdamW)
    model, optimizer, scheduler = applied(kind, applier, schedule_of=schedule_of)
    train(model, optimizer, range(5), scheduler)
    assert_same(model, optimizer, *oracle(torch.optim.AdamW, [LR * share for share in course[:5]]))
    assert optimizer.widths[:3] == [2, 6, 6]


# Compiled steps, averages ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "rate"), [("SGD", 0.01), ("AdamW", torch.tensor(0.01))])
# What torch imports to compile uses torch.jit.
@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:DeprecationWarning")
def test_a_compiled_step_is_the_plain_one_and_is_not_compiled_for_each_factor(name, rate):
    torch._dynamo.reset()
    kind, options = CASES[name]
    counter, models = CompileCounter(), []
    for compiled in (False, True):
        model = make_mlp()
        optimizer = kind(model.parameters(), lr=copy.copy(rate), **options)
        balancer = attach(optimizer, model, min_eigs=4)
        step = torch.compile(optimizer.step, backend=counter) if compiled else optimizer.step
        counts = []
        for batch in range(8):
            model.zero_grad()
            backward(model, batch)
            step()
            counts.append(counter.frame_count)
        assert len({tuple(factors.values()) for _, _, factors in balancer.history}) > 5
        models.append(model)
    assert counts[2] > 0
    assert counts[-1] == counts[2], counts
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        # A step that torch compiles computes with its rate as a tensor, in float32 (6e-8); 1e-5:
        # over 8 steps, and where Adam divides by a small root.
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("applier", APPLIERS[::2])
def test_averaged_weights_and_their_schedule_are_those_of_permanent_groups(applier):
    swalr = partial(SWALR, swa_lr=0.05, anneal_epochs=3)
    single = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR)
    alone, rates = swalr(single), []
    for _ in range(5):
        rates += alone.get_last_lr()
        single.step()
        alone.step()
    assert rates[0] < rates[2] < rates[4]
    model, optimizer, scheduler = applied(torch.optim.SGD, applier, schedule_of=swalr, momentum=0.9)
    averaged, snapshots = AveragedModel(model), []
    for step in range(5):
        train(model, optimizer, [step], scheduler)
        averaged.update_parameters(model)
        snapshots.append(copy.deepcopy(model).double())
    assert_same(model, optimizer, *oracle(torch.optim.SGD, rates, momentum=0.9))
    for name, p in averaged.module.named_parameters():
        mean = torch.stack([snapshot.get_parameter(name) for snapshot in snapshots]).mean(0)
        # 1e-6: a running mean of five float32 tensors, each step of which rounds by 6e-8.
        torch.testing.assert_close(p.double(), mean, rtol=1e-6, atol=1e-7)
