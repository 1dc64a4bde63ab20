"""LightningTempBalance, and TempBalance from configure_optimizers, in Lightning's Trainer."""

import logging
import math
import runpy
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

import tbfast.trainers

pytest.importorskip("lightning")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Lightning's own imports
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import (
        LearningRateMonitor,
        StochasticWeightAveraging,
    )
    from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment

LightningTempBalance = tbfast.trainers.LightningTempBalance
EXAMPLES = Path(__file__).parents[1] / "examples" / "integrations"
TUNED = ["net.2.weight", "net.4.weight"]
# The state counts, and without a budget every refresh is on the step it is due.
STATEFUL = dict(every=3, ema=0.5, ramp=2, budget=None)

pytestmark = [
    # Lightning calls torch's pytree and its own loader checks in ways that they warn about.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
    # true of the loader, but what a batch holds depends on the step alone
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable.*"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Numbered(Dataset):
    """The numbers of batches: what a batch holds depends on the step alone, also after a resume."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return index


def make_net(norm=False):
    torch.manual_seed(0)
    sizes = [16, 64, 64, 96, 4]
    layers = [part for pair in pairwise(sizes) for part in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*([nn.BatchNorm1d(16)] * norm), *layers[:-1])


def make_batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 16, generator=generator), torch.randn(8, 4, generator=generator)


def decay(step):
    return 0.9**step


class Module(pl.LightningModule):
    def __init__(
        self, groups=False, norm=False, manual=False, scheduler=True, optimizers=1, **options
    ):
        super().__init__()
        self.net = make_net(norm)
        self.groups, self.scheduler, self.optimizers_wanted = groups, scheduler, optimizers
        self.options = options
        self.automatic_optimization = not manual
        self.micro = 0

    def training_step(self, batch, batch_idx):
        step = self.global_step if self.automatic_optimization else self.micro
        x, y = make_batch(step)
        loss = F.mse_loss(self.net(x), y)
        if not self.automatic_optimization:
            self.micro += 1
            self.manual_backward(loss / 2)
            if self.micro % 2 == 0:
                self.optimizers().step()
                self.optimizers().zero_grad()
                self.lr_schedulers().step()
        return loss

    def configure_optimizers(self):
        if self.optimizers_wanted > 1:
            return [torch.optim.SGD(self.parameters(), lr=1e-3)] * 2, []
        groups = tbfast.param_groups(self.net, min_eigs=60) if self.groups else self.parameters()
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
        if not self.scheduler:
            return optimizer
        scheduler = LambdaLR(optimizer, decay)
        if self.groups:
            options = STATEFUL | self.options
            scheduler = self.balance = tbfast.TempBalance(optimizer, scheduler, **options)
        named = dict(scheduler=scheduler, interval="step", name="rates")
        return dict(optimizer=optimizer, lr_scheduler=named)


class Memory(Logger):
    """A logger that keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.rows = []

    @property
    def name(self):
        return "memory"

    @property
    def version(self):
        return 0

    @property
    @rank_zero_experiment
    def experiment(self):
        return self

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))


def make_callback(**options):
    return LightningTempBalance(**{"min_eigs": 60, **STATEFUL, **options})


def fit(tmp_path, module, callbacks=(), logger=False, resume=None, **options):
    trainer = pl.Trainer(
        **{"max_steps": 10, "max_epochs": -1, **options},
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=logger,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader(Numbered()), ckpt_path=resume)
    return trainer


class Saving(pl.Callback):
    """Saves at step 5, where ModelCheckpoint would, and has no state to be missed on resuming."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 5:
            trainer.save_checkpoint(self.path)


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def plain_loop(accumulation=1, steps=10, fresh_batches=False):
    """The same training without Lightning: attach and LambdaLR in a loop."""
    model = nn.Module()
    model.net = make_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = LambdaLR(optimizer, decay)
    balancer = tbfast.attach(optimizer, model, min_eigs=60, **STATEFUL)
    for step in range(steps):
        for micro in range(accumulation):
            x, y = make_batch(step * accumulation + micro if fresh_batches else step)
            (F.mse_loss(model.net(x), y) / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return model, balancer


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_callback_trains_as_attach_in_a_plain_loop(tmp_path, accumulation):
    module, callback = Module(), make_callback()
    fit(tmp_path, module, [callback], accumulate_grad_batches=accumulation)
    model, balancer = plain_loop(accumulation)
    assert equal(module, model)
    assert callback.balancer.factors == balancer.factors
    assert list(balancer.factors) == TUNED
    assert callback.balancer.steps == 10


def test_manual_optimization_with_its_own_accumulation_counts_optimizer_steps(tmp_path):
    module, callback = Module(manual=True), make_callback()
    fit(tmp_path, module, [callback], max_steps=10)
    model, balancer = plain_loop(accumulation=2, fresh_batches=True)
    assert equal(module, model)
    assert callback.balancer.steps == balancer.steps == 10
    assert callback.balancer.alphas == balancer.alphas


@pytest.mark.parametrize("budget", [None, 0.01])
@pytest.mark.parametrize("way", ["callback", "TempBalance"])
def test_a_resumed_run_ends_bitwise_where_the_whole_one_does(tmp_path, way, budget):
    def start():
        if way == "TempBalance":
            return Module(groups=True, budget=budget), []
        return Module(), [make_callback(budget=budget)]

    first, callbacks = start()
    fit(tmp_path, first, [*callbacks, Saving(tmp_path / "step=5.ckpt")])
    second, others = start()
    fit(tmp_path, second, others, resume=tmp_path / "step=5.ckpt")
    assert equal(first, second)
    one, other = (
        m.balance.balancer if way == "TempBalance" else c[0].balancer
        for m, c in ((first, callbacks), (second, others))
    )
    assert one.factors == other.factors
    assert one.alphas == other.alphas
    assert one.steps == other.steps == 10


def test_a_checkpoint_without_the_state_warns_and_is_another_run(tmp_path):
    first = Module()
    fit(tmp_path, first, [make_callback(), Saving(tmp_path / "step=5.ckpt")])
    path = tmp_path / "step=5.ckpt"
    checkpoint = torch.load(path, weights_only=True)  # what we add to it is plain
    del checkpoint["callbacks"]["LightningTempBalance"]
    torch.save(checkpoint, path)
    second = Module()
    with pytest.warns(UserWarning, match=r"step=5.ckpt was saved without LightningTempBalance"):
        fit(tmp_path, second, [make_callback()], resume=path)
    assert not equal(first, second)


def test_a_state_of_other_layers_is_refused(tmp_path):
    fit(tmp_path, Module(), [make_callback(), Saving(tmp_path / "step=5.ckpt")])
    other = make_callback(exclude="net.2.*", skip_first=False)
    with pytest.raises(ValueError, match="only the state has the layer 'net.2.weight'"):
        fit(tmp_path, Module(), [other], resume=tmp_path / "step=5.ckpt")


@pytest.mark.parametrize("log", ["summary", "layers"])
def test_metrics_are_logged_each_log_every_n_steps_with_the_values_of_that_step(tmp_path, log):
    logger, callback = Memory(), make_callback(every=1, log=log)
    trainer = fit(tmp_path, Module(), [callback], logger, log_every_n_steps=2)
    rows = {step: row for step, row in logger.rows if "tempbalance/overhead" in row}
    assert list(rows) == [1, 3, 5, 7, 9]  # Lightning counts from 0
    after = {step: (alphas, factors) for step, alphas, factors in callback.balancer.history}
    for step, row in rows.items():
        alphas, factors = after[step + 1]
        for what, by_layer in (("alpha", alphas), ("factor", factors)):
            low, high = min(by_layer.values()), max(by_layer.values())
            # Lightning logs float32
            assert row[f"tempbalance/{what}_min"] == pytest.approx(low, rel=1e-6)
            assert row[f"tempbalance/{what}_max"] == pytest.approx(high, rel=1e-6)
            mean = math.fsum(by_layer.values()) / len(by_layer)
            assert row[f"tempbalance/{what}_mean"] == pytest.approx(mean, rel=1e-6)
            for name, value in by_layer.items():
                found = row.get(f"tempbalance/{what}/{name}")
                assert found == (pytest.approx(value, rel=1e-6) if log == "layers" else None)
        assert 0 < row["tempbalance/overhead"] < 1
    assert "tempbalance/factor_min" in trainer.callback_metrics


def test_the_rate_monitor_sees_each_layer_by_name_and_base_rate_times_factor(tmp_path):
    logger, module = Memory(), Module(groups=True)
    fit(tmp_path, module, [LearningRateMonitor("step")], logger, log_every_n_steps=1)
    names = ["rates/untuned", "rates/2.weight", "rates/4.weight"]
    rows = [row for _, row in logger.rows if names[0] in row]
    assert [sorted(row) for row in rows] == [sorted(names)] * 10
    # logged before each step
    assert [row[names[0]] for row in rows] == pytest.approx([1e-3 * 0.9**s for s in range(10)])
    factors = module.balance.history[-1][2]  # of step 9, before the ramp began: those of step 8
    assert list(factors) == ["2.weight", "4.weight"]
    for name, factor in factors.items():
        assert rows[-1][f"rates/{name}"] == pytest.approx(1e-3 * 0.9**9 * factor)


@pytest.mark.parametrize("norm", [False, True])
def test_stochastic_weight_averaging_averages_the_balanced_weights(tmp_path, norm):
    swa = StochasticWeightAveraging(5e-4, swa_epoch_start=2, annealing_epochs=1)
    module, callback = Module(norm=norm, scheduler=False), make_callback()
    epochs = []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            epochs.append([p.detach().clone() for p in pl_module.parameters()])

    options = dict(max_epochs=4, max_steps=-1)
    trainer = fit(tmp_path, module, [callback, swa, Watch()], **options)
    # With a BatchNorm, SWA adds an epoch for its statistics, and at its end Lightning takes one
    # more step with the last gradients, whoever balances or not.
    assert callback.balancer.steps == trainer.global_step == 40 + norm
    # SWA adds the weights at the beginning of epochs 1, 2, 3, and ends with their mean.
    means = [torch.stack(ps).mean(0) for ps in zip(*epochs[:3], strict=True)]
    for parameter, mean in zip(module.parameters(), means, strict=True):
        # a running mean of three in float32; that step is a rate of 5e-4 times Adam's unit, ×1.5
        atol = 1e-3 if norm else 1e-6
        torch.testing.assert_close(parameter.detach(), mean, rtol=1e-5, atol=atol)
    twin = Module(norm=norm, scheduler=False)
    swa = StochasticWeightAveraging(5e-4, swa_epoch_start=2, annealing_epochs=1)
    fit(tmp_path, twin, [swa], **options)
    assert not equal(module, twin)


def test_several_optimizers_are_refused_by_number(tmp_path):
    with pytest.raises(ValueError, match="needs one optimizer, got 2.*configure_optimizers"):
        fit(tmp_path, Module(optimizers=2, manual=True), [make_callback()])


def test_the_optimizer_is_free_after_training_and_after_a_failure(tmp_path):
    callback = make_callback()

    class Failing(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 2:
                raise RuntimeError("the batch failed")

    with pytest.raises(RuntimeError, match="the batch failed"):
        fit(tmp_path, Module(), [callback, Failing()])
    module = Module()
    trainer = fit(tmp_path, module, [callback])
    assert callback.balancer.steps == 10
    tbfast.attach(trainer.optimizers[0], module, min_eigs=60).detach()


def test_the_example_runs(capsys):
    runpy.run_path(str(EXAMPLES / "lightning_module.py"), run_name="__main__")
    printed = [line for line in capsys.readouterr().out.splitlines() if ": loss " in line]
    assert [line.split(":")[0] for line in printed] == ["Classifier", "NamedGroups"]
