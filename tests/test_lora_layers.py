"""LoRA adapters of the real PEFT: what is measured, and what is refused."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import nn

import tbfast
from tbfast.lens import Lens, kept_rows
from tbfast.lora_layers import LoraWeight, find_lora, plain_name
from tbfast.matrices import Layer, as_matrices
from tbfast.presets import resolve, select_options
from tbfast.selection import tuned_layers

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# A product of rank 4 summed in another order, then added: a few roundings of float32.
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}
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


class ConvNet(nn.Sequential):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        for kernel in (3, 3, 1, 3):
            self.append(nn.Conv2d(8, 8, kernel, padding=kernel // 2, groups=groups))
        self.extend([nn.Conv1d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2)])


def wrap(model: nn.Module | None = None, seed: int = 0, **config: Any) -> Any:
    """A PEFT model whose adapters are not zero, as after some training."""
    torch.manual_seed(seed)
    config = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **config}
    model = peft.get_peft_model(Net() if model is None else model, peft.LoraConfig(**config))
    shake(model)
    return model


def shake(model: nn.Module, scale: float = 0.3) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(scale * torch.randn_like(parameter))


def gpt2() -> nn.Module:
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=20, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def lora_of(model: nn.Module) -> dict[str, LoraWeight]:
    return find_lora(model, lambda name, tensor: True)[0]


def two_adapters() -> Any:
    model = wrap()
    second = peft.LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS[:2])
    model.add_adapter("second", second)
    model.base_model.set_adapter(["default", "second"])
    shake(model)
    return model


MODELS = {
    "linear": wrap,
    "conv1d of GPT-2": lambda: wrap(
        gpt2(), target_modules=["c_attn", "c_proj"], fan_in_fan_out=True
    ),
    "rsLoRA": lambda: wrap(use_rslora=True),
    "a rank and an alpha per layer": lambda: wrap(
        rank_pattern={"value": 2}, alpha_pattern={"query": 1}
    ),
    "two adapters": two_adapters,
    "convolutions": lambda: wrap(ConvNet(), target_modules=["1", "2", "4"]),
    "a scaled layer": lambda: scaled(wrap()),
}


def scaled(model: Any) -> Any:
    model.base_model.model.query.scale_layer(0.25)
    return model


@pytest.mark.parametrize("name", MODELS)
# transformers 5.23 warns of its own attribute while PEFT walks over the model
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_the_weight_measured_is_that_of_the_merged_model(name: str):
    model = MODELS[name]()
    weights = lora_of(model)
    assert weights
    adapters = model.base_model.active_adapters
    merged = dict(copy.deepcopy(model).merge_and_unload(adapter_names=adapters).named_parameters())
    for key, weight in weights.items():
        expected = merged[plain_name(key)]
        base = model.get_parameter(key)
        assert weight.shape == expected.shape
        assert weight.device == base.device
        assert not torch.allclose(base, expected, **ROUNDING)
        torch.testing.assert_close(weight.formed(), expected.detach(), **ROUNDING)
        kind = "linear" if base.ndim == 2 else "conv"
        rows = as_matrices(expected, kind).flatten(0, 1)
        places = torch.tensor([0, 3, len(rows) // 2, len(rows) - 1, 3])
        torch.testing.assert_close(weight.rows(places), rows[places], **ROUNDING)


def test_half_precision_is_widened_before_the_product_is_added():
    model = wrap().to(torch.bfloat16)
    layer = model.base_model.model.query
    a, b = (part["default"].weight.double() for part in (layer.lora_A, layer.lora_B))
    expected = layer.base_layer.weight.double() + 6 / 4 * (b @ a)
    found = lora_of(model)[TUNED[0]].formed()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected.detach(), **ROUNDING)


@pytest.mark.filterwarnings("ignore:Already.*merged:UserWarning")  # PEFT's, of merging twice
def test_merging_leaves_the_weight_as_it_is_and_disabling_takes_the_adapters_out():
    model = two_adapters()
    weight, base = lora_of(model)[TUNED[0]], model.get_parameter(TUNED[0])
    plain, full = base.detach().clone(), weight.formed()
    with model.disable_adapter():
        torch.testing.assert_close(weight.formed(), plain, rtol=0, atol=0)
    model.merge_adapter(["default"])
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    layer = model.base_model.model.query
    # What the layer does says what its weight is; merged, it ignores what was not merged.
    torch.testing.assert_close(x @ weight.formed().T, layer(x) - layer.bias, **ROUNDING)
    assert not torch.allclose(weight.formed(), full, **ROUNDING)
    model.merge_adapter(["second"])
    torch.testing.assert_close(weight.formed(), full, **ROUNDING)
    assert (base - plain).abs().max() > 0.1
    with model.disable_adapter():
        torch.testing.assert_close(weight.formed(), plain, **ROUNDING)


def test_the_weight_follows_the_active_adapter():
    model = wrap()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=TARGETS))
    shake(model)
    weight = lora_of(model)[TUNED[0]]
    seen = {}
    for adapter in ("default", "second"):
        model.set_adapter(adapter)
        merged = copy.deepcopy(model).merge_and_unload(adapter_names=[adapter])
        seen[adapter] = weight.formed()
        torch.testing.assert_close(seen[adapter], merged.query.weight.detach(), **ROUNDING)
    assert not torch.allclose(*seen.values(), **ROUNDING)


@pytest.mark.parametrize("way", ["attach", "groups"])
def test_alphas_are_those_of_the_merged_model(way: str):
    model = two_adapters()
    found = {
        "attach": lambda: tbfast.attach(
            torch.optim.SGD(model.parameters(), 0.1), model, min_eigs=4
        ),
        "groups": lambda: tbfast.TempBalance(
            torch.optim.SGD(tbfast.param_groups(model, min_eigs=4), 0.1)
        ),
    }[way]()
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["default", "second"])
    report = tbfast.analyze(merged, min_eigs=4, include=[f"{name}.weight" for name in TARGETS])
    alphas = {plain_name(name): alpha for name, alpha in found.alphas.items()}
    # Weights that differ by roundings of float32.
    assert alphas == pytest.approx(report.alphas, rel=1e-4)
    assert list(found.alphas) == TUNED


def test_the_same_layers_are_the_first_and_the_last_with_and_without_adapters():
    def chosen(model: nn.Module, preset: str) -> list[str]:
        entries = tuned_layers(model, select_options(preset, {"min_eigs": 2}))
        return [plain_name(entry.layer.name) for entry in entries]

    every = [*WIDTHS]
    for preset in ("tempbalance", "model-balancing", "llr"):
        assert chosen(wrap(target_modules=every), preset) == chosen(Net(), preset)
    # Frozen layers are counted, then fall out.
    assert chosen(wrap(target_modules=["first", "value"]), "tempbalance") == ["value.weight"]
    heads = tuned_layers(wrap(target_modules=every), select_options("llr", {}))
    assert [entry.layer.role for entry in heads] == [None, None, None, None, "head"]


def test_a_layer_without_an_active_adapter_that_trains_is_not_tuned():
    def tuned(model: nn.Module) -> list[str]:
        entries = tuned_layers(model, select_options("tempbalance", {"min_eigs": 4}))
        return [entry.layer.name for entry in entries]

    model = two_adapters()  # the second adapts query and value only
    assert tuned(model) == TUNED
    model.set_adapter("second")
    assert tuned(model) == TUNED[:2]
    model.base_model.model.query.lora_A["second"].requires_grad_(False)
    assert tuned(model) == TUNED[:2]  # B still trains
    groups = tbfast.param_groups(model, min_eigs=4)
    assert [len(group["params"]) for group in groups] == [1, 2]
    model.base_model.model.query.lora_B["second"].requires_grad_(False)
    assert tuned(model) == TUNED[1:2]
    with (
        model.disable_adapter(),
        pytest.raises(ValueError, match="no layer of the model is left to tune.*the others frozen"),
    ):
        tuned(model)


def test_of_modules_to_save_only_the_copy_in_use_is_a_layer():
    model = wrap(target_modules=["query"], modules_to_save=["down"])
    model.add_adapter("second", peft.LoraConfig(target_modules=["query"], modules_to_save=["down"]))
    model.set_adapter("default")
    entries = tuned_layers(model, select_options("tempbalance", {"min_eigs": 4}))
    down = "base_model.model.down.modules_to_save.default"
    assert [entry.layer.name for entry in entries] == [TUNED[0], f"{down}.weight"]
    assert entries[1].members == (f"{down}.weight", f"{down}.bias")
    assert entries[1].lora is None


def test_an_embedding_with_adapters_is_not_tuned():
    net = nn.Sequential(nn.Embedding(30, 16), nn.Linear(16, 16), nn.Linear(16, 3))
    model = wrap(net, target_modules=["0", "1"])
    groups = tbfast.param_groups(model, preset="llr")
    assert [group["name"] for group in groups] == [
        "untuned",
        "base_model.model.1.base_layer.weight",
    ]
    assert len(groups[0]["params"]) == 2  # lora_embedding_A and lora_embedding_B


def quantised(packed: torch.Tensor) -> Any:
    """A PEFT model whose base weight was replaced, as by a quantiser."""
    model = wrap()
    base = model.base_model.model.value.base_layer
    base.weight = nn.Parameter(packed, requires_grad=False)
    return model


class Packed(torch.Tensor):
    """A tensor class from outside torch."""


REFUSED = {
    "DoRA": (lambda: wrap(use_dora=True), "query.*Dora.*is not W . s·B·A; use plain LoRA"),
    "int8": (
        lambda: quantised(torch.zeros(24, 32, dtype=torch.int8)),
        "value.*quantised or packed .Linear, torch.int8.; load the model unquantised",
    ),
    "no weight at all": (
        lambda: without_weight(wrap()),
        "value.base_layer.weight: .* quantised or packed .Linear.; load the model unquantised",
    ),
    "float8": (
        lambda: quantised(torch.zeros(24, 32).to(torch.float8_e4m3fn)),
        "value.*torch.float8_e4m3fn",
    ),
    "4 bits stored as floats": (
        lambda: quantised(torch.zeros(24 * 32 // 8, 1)),
        "value.*B·A of the adapter 'default' is .24, 32., but its weight .Linear. is .96, 1.",
    ),
    "a tensor class from elsewhere": (
        lambda: quantised(torch.zeros(24, 32).as_subclass(Packed)),
        "value.*quantised or packed",
    ),
    "grouped convolution": (
        lambda: wrap(ConvNet(groups=2), target_modules=["1"]),
        "model.1.base_layer.weight.*is .8, 8, 3, 3., but its weight .Conv2d. is .8, 4, 3, 3.: gro",
    ),
    "attention in one module": (
        lambda: wrap(nn.Sequential(nn.MultiheadAttention(16, 2)), target_modules=["0"]),
        "model.0.base_layer.weight: its weight is quantised or packed .MultiheadAttention.",
    ),
    "a parameter as target": (
        lambda: wrap(target_modules=[], target_parameters=["query.weight"]),
        "query.*the weight of a ParamWrapper is not known here; use LoRA on a Linear",
    ),
    "AdaLoRA": (
        lambda: peft.get_peft_model(
            Net(), peft.AdaLoraConfig(target_modules=["query"], total_step=9)
        ),
        "query.*the weight of a SVDLinear is not known here",
    ),
}


def without_weight(model: Any) -> Any:
    base = model.base_model.model.value.base_layer
    base.qweight = base.weight
    del base.weight
    return model


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
def test_a_weight_that_cannot_be_known_is_refused_by_name(name: str):
    make, message = REFUSED[name]
    model = make()
    with pytest.raises(ValueError, match=message) as refusal:
        tbfast.param_groups(model, min_eigs=2)
    with pytest.raises(ValueError, match=message):
        tbfast.attach(torch.optim.SGD(model.parameters(), 0.1), model, min_eigs=2)
    layer = str(refusal.value).split(":")[0]
    assert str(refusal.value).endswith(f"or leave the layer out with exclude={layer!r}")


def test_a_refused_layer_can_be_left_out():
    model = quantised(torch.zeros(24, 32, dtype=torch.int8))
    groups = tbfast.param_groups(model, exclude=TUNED[1], min_eigs=4)
    assert [group["name"] for group in groups] == ["untuned", TUNED[0], TUNED[2]]


@pytest.mark.parametrize("of", ["grad", "momentum"])
def test_the_gradient_of_a_weight_that_has_none_is_refused(of: str):
    model = wrap()
    optimizer = torch.optim.SGD(tbfast.param_groups(model, min_eigs=4), 0.1)
    message = f"of='{of}' needs the gradient of W . s·B·A, which .*query.*use of='weight'"
    with pytest.raises(ValueError, match=message):
        tbfast.TempBalance(optimizer, of=of)
    with pytest.raises(ValueError, match=message):
        tbfast.attach(optimizer, model, min_eigs=4, of=of)


def test_groups_whose_weight_is_lost_are_refused_by_name():
    model = wrap()
    optimizer = torch.optim.SGD(tbfast.param_groups(model, min_eigs=4), 0.1)
    with pytest.raises(ValueError, match="the group '.*query.*' does not hold the LoRA parameters"):
        tbfast.TempBalance(copy.deepcopy(optimizer))
    del model
    gc.collect()
    with pytest.raises(RuntimeError, match="the model of .*query.* is gone"):
        tbfast.TempBalance(optimizer)


def test_movement_is_seen_in_a_few_rows_without_forming_the_weight(
    monkeypatch: pytest.MonkeyPatch,
):
    model = wrap()
    weight = lora_of(model)[TUNED[0]]
    layer = Layer(TUNED[0], "linear", weight.shape)
    lens = Lens([layer], resolve("tempbalance", {}))
    before = weight.formed()
    lens.show({0: weight})
    monkeypatch.setattr(LoraWeight, "formed", None)
    kept = lens.keep([0])
    places = kept_rows(weight.shape[0])
    torch.testing.assert_close(kept[0], before[places], **ROUNDING)
    assert lens.turned([0], kept) == pytest.approx([0], abs=1e-3)  # a root of roundings
    shake(model)
    monkeypatch.undo()
    now, then = weight.formed()[places].double(), before[places].double()
    cosine = (now * then).sum() / (now.norm() * then.norm())
    # The tangent of the angle, of rows that differ by roundings of float32.
    assert lens.turned([0], kept)[0] == pytest.approx(cosine.arccos().tan().item(), rel=1e-4)
