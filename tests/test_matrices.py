"""Which matrix a parameter stands for."""

import numpy as np
import pytest
import torch
from torch import nn

from tbfast.matrices import (
    as_matrices,
    block_of,
    count_eigenvalues,
    find_layers,
    guess_kind,
    guess_role,
    name_filter,
    type_of,
)


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.conv1 = nn.Conv1d(4, 6, 3)
        self.grouped = nn.Conv2d(8, 12, (3, 5), groups=4)
        self.conv3 = nn.Conv3d(2, 3, 2)
        self.up = nn.ConvTranspose2d(6, 10, 2, groups=2)
        self.norm = nn.BatchNorm1d(8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.spectral = nn.Parameter(torch.randn(5, 7, 3, 2, dtype=torch.complex64))
        self.experts = nn.Parameter(torch.randn(4, 6, 9))
        self.tied = nn.Linear(8, 30, bias=False)
        self.tied.weight = self.embed.weight
        self.head = nn.Linear(8, 5)
        self.register_buffer("table", torch.randn(9, 9))


def test_layers_of_a_model_in_order_each_once():
    layers = {layer.name: layer for layer in find_layers(Everything())}
    assert {name: (layer.kind, layer.n_eigs) for name, layer in layers.items()} == {
        "spectral": ("spectral", 5 * 6),
        "experts": ("experts", 4 * 6),
        "embed.weight": ("linear", 8),
        "conv1.weight": ("conv", 4 * 3),
        "grouped.weight": ("conv", 2 * 15),
        "conv3.weight": ("conv", 2 * 8),
        "up.weight": ("conv", 5 * 4),
        "attention.in_proj_weight": ("packed", 24),
        "attention.out_proj.weight": ("linear", 8),
        "head.weight": ("linear", 5),
    }
    assert layers["embed.weight"].role == "embedding"
    assert layers["head.weight"].role == "head"
    assert layers["attention.in_proj_weight"].bias == "attention.in_proj_bias"
    assert layers["conv1.weight"].bias == "conv1.bias"
    assert layers["spectral"].bias is None


def test_convolutions_give_one_slice_per_kernel_position():
    weight = torch.randn(12, 2, 3, 5)
    stack = as_matrices(weight, "conv")
    assert stack.shape == (15, 12, 2)
    assert torch.equal(stack[1 * 5 + 2], weight[:, :, 1, 2])


def test_transposed_convolution_has_the_eigenvalues_of_its_swapped_weight():
    weight = torch.randn(6, 5, 2, 2, dtype=torch.float64)
    plain, swapped = as_matrices(weight, "conv"), as_matrices(weight.transpose(0, 1), "conv")
    torch.testing.assert_close(torch.linalg.svdvals(plain), torch.linalg.svdvals(swapped))


def test_packed_projection_is_query_key_and_value():
    attention = nn.MultiheadAttention(8, 2)
    query, key, value = as_matrices(attention.in_proj_weight, "packed")
    weight = attention.in_proj_weight
    assert torch.equal(query, weight[:8])
    assert torch.equal(key, weight[8:16])
    assert torch.equal(value, weight[16:])


def test_spectral_weights_give_one_complex_matrix_per_mode():
    weight = torch.randn(5, 7, 3, 2, dtype=torch.complex64)
    stack = as_matrices(weight, "spectral")
    assert stack.shape == (6, 5, 7)
    assert torch.equal(stack[2 * 2 + 1], weight[:, :, 2, 1])


def test_stacks_are_views_and_carry_no_gradient():
    weight = nn.Parameter(torch.randn(12, 9))
    for kind in ("linear", "packed"):
        stack = as_matrices(weight, kind)
        assert stack.data_ptr() == weight.data_ptr()
        assert not stack.requires_grad


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "kind"),
    [
        ("fc.weight", (4, 5), torch.float32, "linear"),
        ("attn.in_proj_weight", (12, 4), torch.float32, "packed"),
        ("attn.in_proj_weight", (13, 4), torch.float32, "linear"),
        ("conv.weight", (4, 5, 3), torch.float16, "conv"),
        ("mlp.experts.gate_up_proj", (4, 5, 3), torch.bfloat16, "experts"),
        ("fno.weight", (4, 5, 3), torch.complex64, "spectral"),
    ],
)
def test_kind_is_guessed_from_name_shape_and_dtype(name, shape, dtype, kind):
    assert guess_kind(name, torch.zeros(shape, dtype=dtype)) == kind


def test_counted_eigenvalues_are_those_of_the_stack():
    cases = [
        ("linear", (7, 5)),
        ("packed", (12, 3)),
        ("experts", (4, 6, 9)),
        ("conv", (6, 3, 2, 2)),
    ]
    for kind, shape in cases:
        sigma = np.linalg.svd(as_matrices(torch.randn(shape), kind).numpy(), compute_uv=False)
        assert count_eigenvalues(shape, kind) == sigma.size


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("transformer.wte.weight", "embedding"),
        ("embeddings.word_embeddings.weight", "embedding"),
        ("model.embed_tokens.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("classifier.dense.weight", "head"),
        ("encoder.layer.0.attention.self.query.weight", None),
        ("layers.3.overhead.weight", None),
    ],
)
def test_role_is_guessed_from_the_name(name, role):
    assert guess_role(name) == role


def test_filters_take_globs_lists_and_callables():
    weight = torch.zeros(2, 2)
    keep = name_filter(["a.*", "b.*"], "*.bias")
    assert [keep(n, weight) for n in ("a.weight", "b.bias", "c.weight")] == [True, False, False]
    square = name_filter(lambda name, tensor: tensor.shape[0] == tensor.shape[1], None)
    assert square("x", weight)
    assert not square("x", torch.zeros(2, 3))
    with pytest.raises(TypeError, match="globs .* got 3"):
        name_filter([3], None)


def test_a_bilinear_weight_is_one_matrix_per_output():
    [layer] = find_layers(nn.Bilinear(6, 7, 4))
    assert (layer.kind, layer.n_eigs) == ("experts", 4 * 6)


def test_include_and_exclude_select_layers():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    names = [layer.name for layer in find_layers(model, include="*.weight", exclude="1.*")]
    assert names == ["0.weight", "2.weight"]


def test_blocks_and_types_come_from_the_first_index_and_all_indices():
    name = "encoder.layer.3.output.1.dense.weight"
    assert block_of(name) == "encoder.layer.3"
    assert type_of(name) == "encoder.layer.*.output.*.dense.weight"
    assert block_of("0.weight") == "0"
    assert block_of("pooler.dense.weight") is None
    assert type_of("fc1.weight") != type_of("fc2.weight")


def test_lazy_and_foreign_modules_are_refused_by_name():
    with pytest.raises(TypeError, match=r"0\.weight is not initialised; run one forward pass"):
        find_layers(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got dict"):
        find_layers({})
