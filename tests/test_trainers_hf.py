"""TempBalanceCallback in the Hugging Face Trainer, and TempBalance as the Trainer's schedule.

Run by itself under torchrun, the file is the two processes of its last tests.
"""

import json
import os
import runpy
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import tbfast.trainers

transformers = pytest.importorskip("transformers")
if not transformers.utils.is_torch_available():
    pytest.skip("this transformers needs a newer torch", allow_module_level=True)
pytest.importorskip("accelerate")

TempBalanceCallback = tbfast.trainers.TempBalanceCallback
EXAMPLES = Path(__file__).parents[1] / "examples" / "integrations"
# The state counts: an every-step refresh without memory would resume as well from nothing.
STATEFUL = dict(every=3, ema=0.5, ramp=2)

pytestmark = [
    # the Trainer asks for pinned memory where there is no accelerator
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),
]


class Recorder(transformers.TrainerCallback):
    """A reporter: it stands before the callbacks that come after it."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def make_model(dropout=0.1):
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    dropouts = dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    config = transformers.BertConfig(
        vocab_size=100, max_position_embeddings=32, **sizes, **dropouts
    )
    return transformers.BertForSequenceClassification(config)


def make_data():
    ids = torch.randint(0, 100, (64, 16), generator=torch.Generator().manual_seed(1))
    return [dict(input_ids=row, labels=row[0] % 2) for row in ids]


def make_trainer(out, callbacks=(), kind=transformers.Trainer, model=None, **options):
    defaults = dict(
        max_steps=16,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=4,
        save_steps=8,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    args = transformers.TrainingArguments(str(out), **defaults | options)
    model = make_model() if model is None else model
    return kind(
        model, args, train_dataset=make_data(), eval_dataset=make_data(), callbacks=list(callbacks)
    )


def train(out, callback=None, resume=None, **options):
    trainer = make_trainer(out, [] if callback is None else [callback], **options)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def equal(a, b):
    pairs = zip(a.model.parameters(), b.model.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def published_factors(weights):
    """Zhou et al. 2023 in float64: alpha by the median rule, then linear from 0.5 to 1.5."""
    alphas = {}
    for name, weight in weights.items():
        eigs = np.sort(np.linalg.svd(weight.double().numpy(), compute_uv=False) ** 2)
        tail = eigs[len(eigs) // 2 :]
        alphas[name] = 1 + len(tail) / np.log(tail / tail[0]).sum()
    low, high = min(alphas.values()), max(alphas.values())
    return {name: 0.5 + (alpha - low) / (high - low) for name, alpha in alphas.items()}


def test_a_tuned_parameter_moves_by_its_published_factor_and_the_others_as_without(tmp_path):
    options = dict(
        max_steps=1, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0, learning_rate=0.1
    )
    start = dict(make_model(dropout=0).named_parameters())
    plain = train(tmp_path / "a", model=make_model(dropout=0), **options)
    callback = TempBalanceCallback(start=0)
    balanced = train(tmp_path / "b", callback, model=make_model(dropout=0), **options)
    tuned = {name: start[name].detach() for name in callback.balancer.factors}
    assert len(tuned) == 12
    factors = published_factors(tuned)
    there = dict(plain.model.named_parameters())
    for name, parameter in balanced.model.named_parameters():
        factor = factors.get(name.replace("bias", "weight"), 1.0)
        p0 = start[name].detach().double()
        expected = p0 + factor * (there[name].detach().double() - p0)
        # float32 weights up to 1, each rounded twice; the update itself is 1e-3 or less
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=0, atol=2e-7)


def test_the_summary_is_in_the_log_history_and_reaches_reporters_listed_before(tmp_path):
    reporter, callback = Recorder(), TempBalanceCallback()
    trainer = make_trainer(tmp_path, [reporter, callback], eval_strategy="steps", eval_steps=8)
    trainer.train()
    training = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in training] == [4, 8, 12, 16]
    factors, alphas = callback.balancer.factors.values(), callback.balancer.alphas.values()
    expected = {
        f"tempbalance/{what}_{statistic}": function(list(values))
        for what, values in (("factor", factors), ("alpha", alphas))
        for statistic, function in (("min", min), ("mean", np.mean), ("max", max))
    }
    # the mean is summed in another order
    assert {k: training[-1][k] for k in expected} == pytest.approx(expected, rel=1e-12)
    assert 0 < training[-1]["tempbalance/overhead"] < 1
    ours = [{k: v for k, v in e.items() if k.startswith("tempbalance/")} for e in training]
    reported = [e for e in reporter.logs if "loss" in e]
    assert [{k: v for k, v in e.items() if k in ours[0]} for e in reported] == ours
    others = [e for e in trainer.state.log_history if "loss" not in e]
    assert len(others) == 3  # two evaluations, one summary of the run
    assert not any(key.startswith("tempbalance/") for entry in others for key in entry)


def test_log_layers_adds_alpha_and_factor_of_every_layer(tmp_path):
    callback = TempBalanceCallback(log="layers")
    entry = train(tmp_path, callback, save_strategy="no").state.log_history[-2]
    for what in ("alpha", "factor"):
        for name, value in getattr(callback.balancer, f"{what}s").items():
            assert entry[f"tempbalance/{what}/{name}"] == value
    assert "tempbalance/factor_min" in entry


def test_the_schedule_and_its_log_are_those_of_the_plain_trainer(tmp_path):
    plain = train(tmp_path / "a", save_strategy="no")
    balanced = train(tmp_path / "b", TempBalanceCallback(), save_strategy="no")
    rates = [
        [e["learning_rate"] for e in t.state.log_history if "loss" in e] for t in (plain, balanced)
    ]
    assert len(rates[0]) == 4
    assert rates[0] == rates[1]
    assert not equal(plain, balanced)


@pytest.mark.parametrize(("budget", "accumulation"), [(None, 1), (0.01, 2)])
def test_a_resumed_run_ends_bitwise_where_the_whole_one_does(tmp_path, budget, accumulation):
    options = dict(gradient_accumulation_steps=accumulation)
    whole = TempBalanceCallback(budget=budget, **STATEFUL)
    first = train(tmp_path / "a", whole, **options)
    # from another folder than the checkpoint's
    half = TempBalanceCallback(budget=budget, **STATEFUL)
    second = train(tmp_path / "b", half, tmp_path / "a" / "checkpoint-8", **options)
    assert equal(first, second)
    assert half.balancer.factors == whole.balancer.factors
    assert half.balancer.alphas == whole.balancer.alphas
    assert half.balancer.steps == whole.balancer.steps == 16


def test_restoring_callbacks_by_the_trainers_own_flag_is_as_exact_and_keeps_the_options(tmp_path):
    first = train(tmp_path, TempBalanceCallback(**STATEFUL, log="layers"))
    trainer = make_trainer(
        tmp_path / "b",
        [TempBalanceCallback()],
        restore_callback_states_from_checkpoint=True,
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert equal(first, trainer)
    found = trainer.pop_callback(TempBalanceCallback)
    assert found.balancer.options.every == STATEFUL["every"]


def test_an_option_that_json_cannot_hold_is_refused_with_that_flag_and_works_without(tmp_path):
    def chosen(name, tensor):
        return "attention" in name

    first = train(tmp_path, TempBalanceCallback(include=chosen, **STATEFUL))
    checkpoint = tmp_path / "checkpoint-8"
    second = train(tmp_path / "b", TempBalanceCallback(include=chosen, **STATEFUL), checkpoint)
    assert equal(first, second)
    with pytest.raises(ValueError, match="cannot hold the option 'include'.*leave that flag out"):
        train(
            tmp_path / "c",
            TempBalanceCallback(include=chosen),
            checkpoint,
            restore_callback_states_from_checkpoint=True,
        )


def test_a_checkpoint_without_the_state_warns_and_is_another_run(tmp_path):
    first = train(tmp_path, TempBalanceCallback(**STATEFUL))
    path = tmp_path / "checkpoint-8" / "trainer_state.json"
    saved = json.loads(path.read_text())
    del saved["stateful_callbacks"]["TempBalanceCallback"]
    path.write_text(json.dumps(saved))
    with pytest.warns(UserWarning, match="step 8 was saved without TempBalanceCallback"):
        second = train(tmp_path / "b", TempBalanceCallback(**STATEFUL), path.parent)
    assert not equal(first, second)
    assert (tmp_path / "b" / "checkpoint-16").is_dir()


def test_a_state_of_other_layers_is_refused(tmp_path):
    train(tmp_path, TempBalanceCallback(), max_steps=8)
    with pytest.raises(ValueError, match="only the state has the layer 'bert.pooler"):
        train(tmp_path, TempBalanceCallback(exclude="*pooler*"), tmp_path / "checkpoint-8")


def test_the_optimizer_is_free_after_training_and_after_a_failure(tmp_path):
    callback = TempBalanceCallback()

    class Failing(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    trainer = make_trainer(tmp_path, [callback, failing := Failing()], save_strategy="no")
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(failing)
    trainer.train()
    assert callback.balancer.steps == 16
    tbfast.attach(trainer.optimizer, trainer.model).detach()


def test_training_in_bfloat16_counts_every_step_and_stays_finite(tmp_path):
    callback = TempBalanceCallback()
    train(tmp_path, callback, bf16=True, save_strategy="no")
    assert callback.balancer.steps == 16
    assert all(0.5 <= factor <= 1.5 for factor in callback.balancer.factors.values())
    assert np.isfinite(list(callback.balancer.alphas.values())).all()


def test_two_callbacks_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, [TempBalanceCallback(), TempBalanceCallback()])
    with pytest.raises(ValueError, match="2 callbacks TempBalanceCallback.*keep one"):
        trainer.train()


def test_deepspeed_and_an_unknown_log_are_refused_by_name():
    args = types.SimpleNamespace(deepspeed="zero3.json")
    with pytest.raises(ValueError, match="does not work with DeepSpeed.*param_groups"):
        TempBalanceCallback().on_train_begin(args, None, None, model=None, optimizer=None)
    with pytest.raises(ValueError, match="log must be summary or layers; got 'all'"):
        TempBalanceCallback(log="all")


def test_a_missing_package_is_an_import_error_that_says_what_to_install():
    code = """
import sys, torch, tbfast.trainers
assert "transformers" not in sys.modules and "lightning" not in sys.modules
sys.modules["transformers"] = sys.modules["lightning"] = None
for name in ("TempBalanceCallback", "LightningTempBalance"):
    try:
        getattr(tbfast.trainers, name)
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("pip install 'tbfast[trainers]'" in line for line in lines)


def balanced_trainer():
    return runpy.run_path(str(EXAMPLES / "hf_trainer.py"))["BalancedTrainer"]


def test_tempbalance_as_the_trainers_schedule_resumes_bitwise(tmp_path):
    kind = balanced_trainer()
    first = train(tmp_path / "a", kind=kind)
    second = train(tmp_path / "b", kind=kind, resume=tmp_path / "a" / "checkpoint-8")
    assert equal(first, second)
    assert second.lr_scheduler.factors == first.lr_scheduler.factors
    assert second.lr_scheduler.balancer.steps == 16


def test_tempbalance_as_the_trainers_schedule_is_its_linear_decay_times_the_factors(tmp_path):
    trainer = train(tmp_path, kind=balanced_trainer(), save_strategy="no", weight_decay=0.1)
    logged = [e["learning_rate"] for e in trainer.state.log_history if "loss" in e]
    # The rate of step s, logged after it: 1e-3 (1 - (s - 1) / 16).
    assert logged == pytest.approx([1e-3 * (1 - (s - 1) / 16) for s in (4, 8, 12, 16)])
    decays = dict.fromkeys(trainer.get_decay_parameter_names(trainer.model), 0.1)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    groups = trainer.optimizer.param_groups
    found = {names[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}
    assert found == {name: decays.get(name, 0.0) for name in names.values()}


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hf_trainer.py", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "hf_trainer.py"), run_name="__main__")
    printed = [line for line in capsys.readouterr().out.splitlines() if ": loss 0." in line]
    assert [line.split(":")[0] for line in printed] == ["Trainer", "BalancedTrainer"]


def two_processes(out):
    """What each of two processes writes: factors, alphas and whether resuming was exact."""
    found = {}
    for kind, callback in (
        (transformers.Trainer, TempBalanceCallback),
        (balanced_trainer(), lambda **kwargs: None),
    ):
        here = Path(out) / kind.__name__
        trainers, callbacks = [], []
        for resume in (None, here / "checkpoint-8"):
            callbacks.append(callback(**STATEFUL))
            trainers.append(train(here, callbacks[-1], resume, kind=kind, ddp_backend="gloo"))
        balancers = [
            trainer.lr_scheduler.balancer if used is None else used.balancer
            for trainer, used in zip(trainers, callbacks, strict=True)
        ]
        found[kind.__name__] = dict(
            exact=equal(*trainers),
            steps=[b.steps for b in balancers],
            factors=[b.factors for b in balancers],
            alphas=[b.alphas for b in balancers],
            parameters=[float(p.double().sum()) for p in trainers[0].model.parameters()],
        )
    Path(out, f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", __file__, str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("kind", ["Trainer", "BalancedTrainer"])
def test_two_processes_have_the_same_factors_bitwise_and_resume_exactly(ranks, kind):
    one, other = (rank[kind] for rank in ranks)
    assert one == other
    assert one["exact"]
    assert one["steps"] == [16, 16]
    assert one["factors"][0] == one["factors"][1]
    assert len(one["factors"][0]) == 12


if __name__ == "__main__":
    two_processes(sys.argv[1])
