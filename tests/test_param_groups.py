"""param_groups: which layers are tuned, and which parameters go with them."""

import pytest
import torch
from small_model import make_groups, make_mlp
from torch import nn

from tbfast import TempBalance, param_groups


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
