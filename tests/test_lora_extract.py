"""``extract_lora``: as near as any adapter of its rank, and PEFT loads it."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import tbfast
from tbfast.cli import main
from tbfast.errors import CheckpointError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),  # PEFT's, of transformers
    pytest.mark.filterwarnings("ignore:Sparse CSR"),
]


def low_rank(shape, rank, generator, scale=0.1):
    left = torch.randn(shape[0], rank, generator=generator)
    return scale * left @ torch.randn(rank, shape[1], generator=generator)


@pytest.fixture
def llama(tmp_path):
    """A small Llama and one whose linear layers were changed by matrices of rank 4."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight += low_rank(weight.shape, 4, generator)
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path, model


def test_peft_loads_the_adapter_and_gives_the_tuned_model(llama):
    peft = pytest.importorskip("peft")
    from transformers import LlamaForCausalLM

    folder, tuned = llama
    report = tbfast.extract_lora(folder / "base", folder / "tuned", folder / "adapter", rank=4)
    assert len(report.modules) == 14
    assert report.energy == pytest.approx(1, abs=1e-5)
    base = LlamaForCausalLM.from_pretrained(folder / "base").eval()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        plain, expected = base(tokens).logits, tuned(tokens).logits
        model = peft.PeftModel.from_pretrained(base, str(folder / "adapter"))
        found = model(tokens).logits
        merged = model.merge_and_unload()(tokens).logits
    assert (plain - expected).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4)


def test_ranks_that_differ_by_module_are_loaded_too(llama):
    peft = pytest.importorskip("peft")
    from transformers import LlamaForCausalLM

    folder, tuned = llama
    weights = load_file(folder / "tuned/model.safetensors")
    base = load_file(folder / "base/model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = base[name] + low_rank(base[name].shape, 9, torch.Generator().manual_seed(2))
    save_file(weights, folder / "tuned/model.safetensors", {"format": "pt"})
    report = tbfast.extract_lora(
        folder / "base", folder / "tuned", folder / "adapter", rank="auto", energy=0.9999
    )
    ranks = {module.name: module.rank for module in report.modules}
    assert ranks["model.layers.1.mlp.down_proj"] == 9
    assert set(ranks.values()) == {4, 9}
    assert all(module.energy >= 0.9999 for module in report.modules)
    model = peft.PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(folder / "base").eval(), str(folder / "adapter")
    )
    tuned.load_state_dict(weights, strict=False)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, tuned(tokens).logits, rtol=0, atol=1e-3)


def test_layers_that_store_their_weights_transposed(tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("c_attn.weight", "c_fc.weight")):
                weight += low_rank(weight.shape, 3, generator)
    model.save_pretrained(tmp_path / "tuned")
    tbfast.extract_lora(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=3)
    base = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(tokens).logits, model(tokens).logits, rtol=0, atol=1e-4)


def decaying(decay, shape=(300, 500), seed=0):
    """A matrix with singular values i^-decay."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(shape[0], shape[0], generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(shape[1], shape[0], generator=generator, dtype=torch.float64)).Q
    s = torch.arange(1.0, shape[0] + 1, dtype=torch.float64) ** -decay
    return (u * s) @ v.T, s


@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
def test_the_error_is_that_of_the_best_matrix_of_this_rank(decay):
    delta, s = decaying(decay)
    a, b, energy = tbfast.lora_factors(delta, 32)
    error = float(torch.linalg.norm(delta - (b @ a).double()))
    optimal = float(s[32:].square().sum().sqrt())
    assert error <= 1.005 * optimal
    assert energy == pytest.approx(1 - (error / float(s.norm())) ** 2, abs=1e-5)
    # Both factors carry half of each singular value, and signs are fixed.
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-4, atol=1e-6)
    assert (b.gather(0, b.abs().argmax(0, keepdim=True)) > 0).all()


def test_sparse_differences_are_taken():
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(60, 80, generator=generator)
    dense[torch.rand(60, 80, generator=generator) > 0.01] = 0
    expected = tbfast.lora_factors(dense, 8)
    for sparse in (dense.to_sparse(), dense.to_sparse_csr()):
        found = tbfast.lora_factors(sparse, 8)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@pytest.fixture
def models(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {"h.0.fc.weight": (40, 30), "h.0.proj.weight": (30, 40), "h.1.fc.weight": (40, 30)}
    base = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    base |= {
        "embed.weight": torch.randn(50, 30, generator=generator),
        "h.0.fc.bias": torch.zeros(40),
    }
    tuned = {n: w + 0.1 * torch.randn(w.shape, generator=generator) for n, w in base.items()}
    tuned["h.1.fc.weight"] = base["h.1.fc.weight"].clone()
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    return tmp_path


def extract(models, **options):
    return tbfast.extract_lora(
        models / "base.safetensors", models / "tuned.safetensors", models / "out", **options
    )


def test_the_report_says_what_is_kept_unchanged_and_left_out(models):
    with pytest.warns(UserWarning, match=r"the adapter keeps \d+ % of the squared differences"):
        report = extract(models, rank=2)
    assert [m.name for m in report.modules] == ["h.0.fc", "h.0.proj"]
    assert report.unchanged == ["h.1.fc.weight"]
    assert report.left_out == ["embed.weight", "h.0.fc.bias"]
    base, tuned = (load_file(models / f"{n}.safetensors") for n in ("base", "tuned"))
    adapter = load_file(models / "out/adapter_model.safetensors")
    kept = whole = 0.0
    for module in report.modules:
        name = f"base_model.model.{module.name}"
        delta = tuned[f"{module.name}.weight"] - base[f"{module.name}.weight"]
        product = adapter[f"{name}.lora_B.weight"] @ adapter[f"{name}.lora_A.weight"]
        left = float((delta - product).square().sum())
        assert module.energy == pytest.approx(1 - left / float(delta.square().sum()), abs=1e-4)
        kept, whole = kept + float(delta.square().sum()) - left, whole + float(delta.square().sum())
    assert report.energy == pytest.approx(kept / whole, abs=1e-4)
    assert json.loads((models / "out/extract_report.json").read_text())["unchanged"]
    assert not list(models.glob(".*"))


def test_auto_takes_the_least_rank_that_keeps_the_energy(models):
    report = extract(models, rank="auto", energy=0.8)
    base, tuned = (load_file(models / f"{n}.safetensors") for n in ("base", "tuned"))
    for module in report.modules:
        delta = tuned[f"{module.name}.weight"] - base[f"{module.name}.weight"]
        shares = torch.linalg.svdvals(delta).square().cumsum(0) / delta.square().sum()
        assert module.rank == int((shares < 0.8).sum()) + 1
        assert math.isclose(module.energy, float(shares[module.rank - 1]), rel_tol=1e-3)


def test_targets_choose_modules_and_ranks_stay_within_the_matrix(models):
    report = extract(models, rank=1000, targets="*.proj")
    assert [(m.name, m.rank) for m in report.modules] == [("h.0.proj", 30)]
    assert report.left_out == ["embed.weight", "h.0.fc.bias", "h.0.fc.weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be 'auto' or a number above 0, got 0"),
        ({"rank": "all"}, "rank must be 'auto'"),
        ({"energy": 0}, "energy must be above 0"),
        ({"max_rank": 0}, "max_rank must be above 0"),
        ({"seed": -1}, "seed must be from 0"),
        ({"targets": "none"}, "targets='none' takes none of the modules of"),
    ],
)
def test_options_out_of_range_are_refused(models, options, message):
    with pytest.raises(ValueError, match=message):
        extract(models, **options)
    assert not (models / "out").exists()


def test_a_model_that_is_the_base_is_refused(models):
    base = models / "base.safetensors"
    with pytest.raises(ValueError, match=r"does not differ from .* in the \d+ modules taken"):
        tbfast.extract_lora(base, base, models / "out")


def test_models_that_do_not_fit_are_refused(models):
    tuned = load_file(models / "tuned.safetensors")
    save_file(tuned | {"embed.weight": torch.zeros(60, 30)}, models / "tuned.safetensors")
    with pytest.raises(CheckpointError, match=r"\[60, 30\], the base with \[50, 30\]; it was not"):
        extract(models)
    tuned["h.0.fc.weight"][0, 0] = torch.nan
    save_file(tuned, models / "tuned.safetensors")
    with pytest.raises(CheckpointError, match=r"holds NaN or infinity in 'h.0.fc.weight'"):
        extract(models)
    save_file({"other": torch.zeros(3)}, models / "tuned.safetensors")
    with pytest.raises(CheckpointError, match="has no tensor in common"):
        extract(models)
    (models / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists; choose another output"):
        extract(models)


def test_the_command_says_what_it_did(models, capsys):
    files = [str(models / f"{n}.safetensors") for n in ("base", "tuned")]
    arguments = ["extract-lora", *files, "-o", str(models / "out"), "--rank", "auto"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "2 modules, ranks" in printed
    assert "% of the squared differences" in printed
    assert "differ and are left out: embed.weight, h.0.fc.bias" in printed
    assert main(arguments) == 1
    assert "exists; choose another output" in capsys.readouterr().err
