"""Training LoRA adapters of the real PEFT: who gets the factor, and what a resumed run does."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tbfast

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

WIDTHS = {"first": (6, 24), "query": (24, 32), "value": (32, 24), "down": (24, 20), "head": (20, 3)}
TARGETS = ["query", "value", "down"]
TUNED = [f"base_model.model.{name}.base_layer.weight" for name in TARGETS]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, (n_in, n_out) in WIDTHS.items():
            self.add_module(name, nn.Linear(n_in, n_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = torch.tanh(layer(x))
        return x


def wrap(**config: Any) -> Any:
    """A PEFT model whose adapters are not zero, as after some training."""
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **config}
    model = peft.get_peft_model(Net(), peft.LoraConfig(**config))
    shake(model)
    return model


def shake(model: nn.Module, scale: float = 0.3) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(scale * torch.randn_like(parameter))


def two_adapters() -> Any:
    model = wrap()
    second = peft.LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS[:2])
    model.add_adapter("second", second)
    model.base_model.set_adapter(["default", "second"])
    shake(model)
    return model


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 6, generator=generator), torch.randn(16, 3, generator=generator)


def backward(model: nn.Module, step: int) -> None:
    x, y = batch(step)
    model.zero_grad()
    (model(x) - y).square().mean().backward()


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("way", ["attach", "groups"])
def test_the_factor_reaches_lora_a_and_lora_b_and_nothing_else(way: str):
    model = wrap(modules_to_save=["head"], bias="lora_only")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if way == "attach":
        optimizer = torch.optim.SGD(model.parameters(), 0.1)  # PEFT's frozen ones too
        found = tbfast.attach(optimizer, model, min_eigs=4)
    else:
        optimizer = torch.optim.SGD(tbfast.param_groups(model, min_eigs=4), 0.1)
        found = tbfast.TempBalance(optimizer)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in model.parameters() if p.requires_grad}
    factors = {name.split(".")[2]: factor for name, factor in found.factors.items()}
    assert list(factors) == TARGETS
    assert len(set(factors.values())) == 3
    backward(model, 0)
    grads = {name: p.grad for name, p in model.named_parameters()}
    optimizer.step()
    for name, change in moved(model, before).items():
        layer = name.split(".")[2]
        factor = factors.get(layer, 1.0)  # the head in modules_to_save, being last: 1
        if grads[name] is None:
            assert not change.any()
            assert layer == "first" or "base_layer.weight" in name or "original_module" in name
        else:
            # One rounding of a difference of numbers of order one.
            torch.testing.assert_close(change, 0.1 * factor * grads[name], rtol=0, atol=2e-7)


def test_an_optimizer_on_all_parameters_and_one_on_those_that_train_give_the_same_factors():
    model = wrap()
    every = tbfast.attach(torch.optim.SGD(model.parameters(), 0.1), model, min_eigs=4)
    some = [p for p in model.parameters() if p.requires_grad]
    assert tbfast.attach(torch.optim.SGD(some, 0.1), model, min_eigs=4).factors == every.factors


class Spy(torch.optim.AdamW):
    """AdamW that notes the rate of every parameter while its step runs."""

    def step(self, closure: Any = None) -> Any:
        self.seen = {id(p): g["lr"] for g in self.param_groups for p in g["params"]}
        return super().step(closure)


def test_the_rate_of_b_stays_a_multiple_of_that_of_a_under_attach():
    loraplus = pytest.importorskip("peft.optimizers")
    model = wrap()
    optimizer = loraplus.create_loraplus_optimizer(
        model, Spy, lr=1e-3, loraplus_lr_ratio=16, weight_decay=0.0
    )
    factors = tbfast.attach(optimizer, model, min_eigs=4).factors
    backward(model, 0)
    optimizer.step()
    rates = {name: optimizer.seen[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    for name, factor in factors.items():
        path = name.removesuffix("base_layer.weight")
        assert rates[f"{path}lora_A.default.weight"] == pytest.approx(1e-3 * factor, rel=1e-12)
        assert rates[f"{path}lora_B.default.weight"] == pytest.approx(16e-3 * factor, rel=1e-12)


def test_the_rate_of_b_stays_a_multiple_of_that_of_a_in_groups():
    model = wrap()
    groups = []
    for group in tbfast.param_groups(model, min_eigs=4):
        a, b = group["params"]
        rest = {"params": [b], "name": f"{group['name']}/B", "layer": group["name"], "lr": 16e-3}
        groups += [{**group, "params": [a]}, rest]
    scheduler = tbfast.TempBalance(torch.optim.AdamW(groups, lr=1e-3))
    scheduler.step()
    rates = {group["name"]: group["lr"] for group in scheduler.optimizer.param_groups}
    for name, factor in scheduler.factors.items():
        assert rates[name] == pytest.approx(1e-3 * factor, rel=1e-12)
        assert rates[f"{name}/B"] == pytest.approx(16e-3 * factor, rel=1e-12)


def build(way: str) -> tuple[Any, torch.optim.Optimizer, Any]:
    model = wrap()
    if way == "attach":
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        return model, optimizer, tbfast.attach(optimizer, model, min_eigs=4, budget=None)
    optimizer = torch.optim.AdamW(tbfast.param_groups(model, min_eigs=4), lr=0.02)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    return model, optimizer, tbfast.TempBalance(optimizer, cosine, budget=None)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, found: Any, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()
        if isinstance(found, tbfast.TempBalance):
            found.step()


@pytest.mark.parametrize("way", ["attach", "groups"])
def test_a_resumed_run_is_the_same_bit_for_bit(way: str, tmp_path: Path):
    model, optimizer, found = build(way)
    start = found.alphas
    train(model, optimizer, found, range(4))
    state = [peft.get_peft_model_state_dict(model), optimizer.state_dict(), found.state_dict()]
    torch.save(state, tmp_path / "state.pt")
    train(model, optimizer, found, range(4, 8))

    resumed, again, loaded = build(way)
    adapters, moments, tracked = torch.load(tmp_path / "state.pt", weights_only=True)
    peft.set_peft_model_state_dict(resumed, adapters)
    again.load_state_dict(moments)
    loaded.load_state_dict(tracked)
    train(resumed, again, loaded, range(4, 8))
    assert loaded.alphas == found.alphas != start
    assert loaded.factors == found.factors
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_factor_goes_with_whichever_adapter_trains():
    model = two_adapters()
    model.set_adapter("default")
    optimizer = Spy(model.parameters(), lr=1e-3)
    balancer = tbfast.attach(optimizer, model, min_eigs=4, budget=None)
    alphas = balancer.alphas
    model.set_adapter("second")
    train(model, optimizer, balancer, range(1))
    assert balancer.alphas[TUNED[0]] != alphas[TUNED[0]]
    factors = balancer.factors
    train(model, optimizer, balancer, range(1, 2))
    for name in TUNED[:2]:
        path = name.removesuffix("base_layer.weight")
        for adapter in ("default", "second"):
            for part in ("lora_A", "lora_B"):
                rate = optimizer.seen[id(model.get_parameter(f"{path}{part}.{adapter}.weight"))]
                assert rate == pytest.approx(1e-3 * factors[name], rel=1e-12)


# transformers 5.23 warns of its own attribute while PEFT walks over the model
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_the_example_prints_every_adapted_layer_but_the_first(capsys: pytest.CaptureFixture[str]):
    example = Path(__file__).parents[1] / "examples" / "integrations" / "peft_lora.py"
    runpy.run_path(str(example))
    lines = [line for line in capsys.readouterr().out.splitlines() if "×" in line]
    layers = ["h.0.attn.c_proj", "h.1.attn.c_attn", "h.1.attn.c_proj"]
    assert [line.split()[0] for line in lines] == layers
    rates = [float(line.split("×")[1]) for line in lines]
    assert min(rates) == 0.5  # the ends of the published range
    assert max(rates) == 1.5
