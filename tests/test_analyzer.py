"""The analyser against NumPy: sources, records and their order."""

import math
import weakref

import numpy as np
import pytest
import torch
from random_weights import gaussian
from safetensors.torch import save_file
from torch import nn

import tbfast
from tbfast import analyzer
from tbfast.analyzer import analyze
from tbfast.checkpoint import CheckpointError


def median_alpha(matrices):
    """The published fit of the pooled eigenvalues, written out in float64."""
    values = np.sort(
        np.concatenate([np.linalg.svd(np.asarray(m), compute_uv=False) ** 2 for m in matrices])
    )
    start = int(len(values) / 2)
    tail = np.log(values[start:])
    return 1 + len(tail) / (tail.sum() - len(tail) * np.log(values[start]))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(80, 60)
        self.conv = nn.Conv2d(16, 24, 3)
        self.attention = nn.MultiheadAttention(64, 4)
        self.blocks = nn.ModuleList([nn.Linear(60, 70), nn.Linear(70, 60)])
        self.norm = nn.LayerNorm(60)
        self.small = nn.Linear(60, 5)
        self.head = nn.Linear(60, 80, bias=False)
        self.head.weight = self.embedding.weight  # tied


# --- records ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(60, 60), (120, 60), (60, 240)])
def test_a_record_holds_what_numpy_finds(shape):
    weight = gaussian(*shape)
    (record,) = analyze({"w": weight})
    sigma = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    alpha = median_alpha([weight.double()])
    largest = sigma[0] ** 2
    # 1e-5 is the accuracy promised for eigenvalues; alpha's own bar is 1e-4.
    assert record.alpha == pytest.approx(alpha, rel=1e-4)
    assert record.alpha_error == pytest.approx((alpha - 1) / math.sqrt(30), rel=1e-4)
    assert record.xmin == pytest.approx(np.sort(sigma**2)[30], rel=1e-5)
    assert record.spectral_norm == pytest.approx(sigma[0], rel=1e-5)
    assert record.frobenius_norm == pytest.approx(np.linalg.norm(sigma), rel=1e-5)
    assert record.stable_rank == pytest.approx((sigma**2).sum() / largest, rel=1e-5)
    assert record.log_spectral_norm == pytest.approx(np.log10(largest), rel=1e-5)
    assert record.alpha_weighted == pytest.approx(alpha * np.log10(largest), rel=1e-4)
    assert (record.name, record.shape, record.n_eigs, record.n_tail) == ("w", shape, 60, 30)
    assert (record.method, record.reason, record.kind, record.role) == (
        "exact",
        None,
        "linear",
        None,
    )


def test_the_norms_of_a_convolution_are_those_of_its_scaled_slices():
    weight = gaussian(24, 16, 3, 3)
    (record,) = analyze({"conv.weight": weight})
    slices = [math.sqrt(0.5) * weight[:, :, i, j].double() for i in range(3) for j in range(3)]
    assert record.kind == "conv"
    assert record.n_eigs == 9 * 16
    assert record.alpha == pytest.approx(median_alpha(slices), rel=1e-4)
    assert record.frobenius_norm == pytest.approx(
        math.sqrt(0.5) * weight.double().norm().item(), rel=1e-5
    )
    assert record.spectral_norm == pytest.approx(
        max(torch.linalg.matrix_norm(s, 2).item() for s in slices), rel=1e-5
    )


def test_a_model_is_analysed_in_its_order_with_kinds_by_module_and_tied_weights_once():
    report = analyze(Net())
    assert [(x.name, x.kind, x.role) for x in report] == [
        ("embedding.weight", "linear", "embedding"),
        ("conv.weight", "conv", None),
        ("attention.in_proj_weight", "packed", None),
        ("attention.out_proj.weight", "linear", None),
        ("blocks.0.weight", "linear", None),
        ("blocks.1.weight", "linear", None),
        ("small.weight", "linear", None),
    ]
    assert report.source == "Net"


def test_a_layer_under_min_eigs_has_norms_but_no_alpha():
    report = analyze({"w": gaussian(49, 80), "v": gaussian(50, 80)}, min_eigs=50)
    few, enough = report
    assert few.reason == "too few eigenvalues"
    assert (few.n_eigs, few.n_tail) == (49, 0)
    assert all(math.isnan(x) for x in (few.alpha, few.alpha_error, few.xmin, few.ks))
    assert math.isnan(few.alpha_weighted)
    assert few.spectral_norm > 0
    assert enough.reason is None
    assert report.alphas.keys() == {"v"}
    assert analyze({"w": gaussian(49, 80)}, min_eigs=0).alphas.keys() == {"w"}


def test_a_layer_with_nan_is_reported_and_does_not_disturb_the_others():
    broken = gaussian(60, 60)
    broken[3, 4] = math.nan
    report = analyze({"a": gaussian(60, 60), "b": broken, "c": gaussian(60, 70)})
    assert report.alphas.keys() == {"a", "c"}
    assert "not finite" in report[1].reason
    assert math.isnan(report[1].spectral_norm)
    assert report[0].alpha == analyze({"a": gaussian(60, 60)})[0].alpha


def test_an_all_zero_weight_has_a_reason_and_no_error():
    (record,) = analyze({"w": torch.zeros(60, 60)})
    assert "zero" in record.reason
    assert record.n_zeros == record.n_eigs == 60
    assert record.spectral_norm == 0
    assert math.isnan(record.stable_rank)
    assert math.isnan(record.log_spectral_norm)


def test_options_reach_the_fit():
    source = {"w": gaussian(100, 100)}
    values = tbfast.eigenvalues(source["w"])
    by_tail = analyze(source, fit="tail", k=10)[0]
    # 1e-4: a tail may be measured in float32 where all eigenvalues need float64.
    assert by_tail.alpha == pytest.approx(tbfast.fit_alpha(values, "tail", k=10).alpha, rel=1e-4)
    assert by_tail.n_tail == 10
    assert analyze(source, xmin_pos=4.0)[0].n_tail == 75
    largest = float(values[-1])
    assert analyze(source, filter_zeros=largest / 2)[0].n_zeros > 0


@pytest.mark.parametrize(
    "options",
    [
        {"fit": "mean"},
        {"unheard_of": 1},
        {"probes": 0},
        {"steps": 1.5},
        {"method": "guess"},
        {"backend": "abacus"},
        {"xmin_pos": 0.5},
    ],
)
def test_a_wrong_option_is_a_value_error_before_the_source_is_read(options):
    with pytest.raises(ValueError, match=str(next(iter(options)))):
        analyze("/nowhere.safetensors", **options)


# --- sources ------------------------------------------------------------------------------------


@pytest.fixture
def weights():
    names = ["lm_head.weight", "layers.10.w", "layers.2.w", "embed_tokens.weight", "layers.2.bias"]
    shapes = [(60, 64), (60, 60), (60, 90), (64, 60), (60,)]
    return {
        name: gaussian(*shape, seed=seed)
        for seed, (name, shape) in enumerate(zip(names, shapes, strict=True))
    }


def test_a_mapping_keeps_its_order_and_skips_vectors(weights):
    assert [x.name for x in analyze(weights)] == list(weights)[:4]


def test_a_safetensors_file_is_ordered_embeddings_first_numbers_by_value_heads_last(
    tmp_path, weights
):
    save_file(weights, tmp_path / "m.safetensors")
    report = analyze(tmp_path / "m.safetensors")
    names = ["embed_tokens.weight", "layers.2.w", "layers.10.w", "lm_head.weight"]
    assert [x.name for x in report] == names
    assert report.alphas == {name: analyze(weights).alphas[name] for name in names}
    assert report.source == str(tmp_path / "m.safetensors")


def test_a_torch_file_keeps_the_order_of_its_dict(tmp_path, weights):
    torch.save({"state_dict": weights}, tmp_path / "m.pt")
    report = analyze(tmp_path / "m.pt")
    assert [x.name for x in report] == list(weights)[:4]
    assert report.alphas == analyze(weights).alphas


def test_arrays_give_what_tensors_give_whatever_their_strides():
    weight = gaussian(60, 80).numpy()
    frozen = weight.copy()
    frozen.flags.writeable = False
    sources = {"a": weight, "turned": weight[::-1, ::-1], "frozen": frozen, "fortran": weight.T}
    # Transposing and reversing rows keep the singular values; 1e-9 is float64 rounding of alpha.
    for alpha in analyze(sources).alphas.values():
        assert alpha == pytest.approx(analyze({"w": torch.tensor(weight)})[0].alpha, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_float8_weight_is_measured_as_the_numbers_it_holds(dtype):
    weight = gaussian(64, 64).to(dtype)
    (record,) = analyze({"w": weight})
    assert record.alpha == pytest.approx(median_alpha([weight.double()]), rel=1e-4)


def test_a_sparse_weight_is_measured_as_the_dense_one():
    weight = gaussian(64, 64)
    (record,) = analyze({"w": weight.to_sparse()})
    assert record.alpha == analyze({"w": weight})[0].alpha


def test_integer_weights_are_left_out():
    packed = torch.zeros(60, 60, dtype=torch.uint8)
    report = analyze({"packed": packed, "w": gaussian(60, 60), "empty": torch.zeros(0, 5)})
    assert [x.name for x in report] == ["w"]


def test_a_source_of_integers_alone_is_refused_with_its_dtypes(tmp_path):
    tensors = {"a": torch.zeros(60, 60, dtype=torch.int8), "b": torch.zeros(3)}
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"m\.safetensors.*1 of int8, 1 of float32"):
        analyze(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="1 of int8"):
        analyze(tensors)
    with pytest.raises(ValueError, match="tensors: none"):
        analyze({})
    with pytest.raises(ValueError, match="ReLU"):
        analyze(nn.ReLU())


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (3, "int"),
        ([torch.ones(2, 2)], "list"),
        ({"w": [[1.0, 2.0]]}, "w must be a tensor"),
        ({"w": np.array([["a", "b"]])}, "w has the dtype"),
    ],
)
def test_a_source_of_another_type_is_a_type_error_that_names_it(source, words):
    with pytest.raises(TypeError, match=words):
        analyze(source)


def test_a_weight_without_values_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^weight is on the meta device"):
        analyze(nn.Linear(60, 60, device="meta"))


def test_include_and_exclude_select_by_glob_list_and_callable(weights):
    def names(**patterns):
        return [x.name for x in analyze(weights, **patterns)]

    assert names(include="layers.*") == ["layers.10.w", "layers.2.w"]
    assert names(include=["layers.2.*", "lm_head*"]) == ["lm_head.weight", "layers.2.w"]
    assert names(include="layers.*", exclude="*.10.*") == ["layers.2.w"]
    assert names(exclude=lambda name, tensor: tensor.shape[1] == 60) == [
        "lm_head.weight",
        "layers.2.w",
    ]


def test_patterns_that_leave_nothing_are_refused_with_an_example(weights):
    with pytest.raises(ValueError, match=r"include='layer\.\*'.*lm_head\.weight"):
        analyze(weights, include="layer.*")


def test_the_source_is_not_changed():
    model = Net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    analyze(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_only_one_batch_of_a_checkpoint_is_in_memory_at_a_time(tmp_path, monkeypatch):
    save_file({f"{i}": gaussian(60, 60, seed=i) for i in range(9)}, tmp_path / "m.safetensors")
    sizes, alive = [], []
    real = analyzer.measure

    def measure(batch, *args, **kwargs):
        assert not any(reference() for reference in alive), "the last batch is still held"
        sizes.append(len(batch))
        alive[:] = [weakref.ref(weight) for weight in batch]
        return real(batch, *args, **kwargs)

    monkeypatch.setattr(analyzer, "measure", measure)
    monkeypatch.setattr(analyzer, "_BATCH_ELEMENTS", 1)
    report = analyze(tmp_path / "m.safetensors")
    threads = torch.get_num_threads()
    assert [x.name for x in report] == [str(i) for i in range(9)]
    assert max(sizes) == min(threads, 9)


def test_progress_is_told_of_each_layer_in_order(weights, capsys):
    seen = []
    analyze(weights, progress=lambda done, total, name: seen.append((done, total, name)))
    assert seen == [(i + 1, 4, name) for i, name in enumerate(list(weights)[:4])]
    analyze(weights)
    assert capsys.readouterr() == ("", "")
    analyze(weights, progress=True)
    assert capsys.readouterr().out == ""
    with pytest.raises(TypeError, match="progress"):
        analyze(weights, progress=3)
