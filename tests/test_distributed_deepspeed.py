"""TempBalance under DeepSpeed's ZeRO; skipped where DeepSpeed is not installed."""

import importlib.util

import pytest
import torch
from torch import nn

import tbfast
from tbfast.zero import ZeroTempBalance

STAGES = [1, 2, 3]


def test_a_spectrum_of_zero_s_flat_gradients_is_refused():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    optimizer = torch.optim.SGD(tbfast.param_groups(model), lr=0.1)
    with pytest.raises(ValueError, match="of='grad'.*use of='weight'"):
        ZeroTempBalance(optimizer, model=model, of="grad")


@pytest.fixture(scope="module")
def worker(in_processes):
    path = in_processes.folder / "deepspeed_worker.py"
    spec = importlib.util.spec_from_file_location("deepspeed_worker", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_steps_are_counted_by_calls_of_the_scheduler(worker):
    assert [note["steps"] for note in worker.train_plainly()] == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def trained(in_processes):
    # Not imported here: DeepSpeed warns.
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    return in_processes("deepspeed_worker", 2, timeout=300)  # it compiles an extension first


@pytest.mark.parametrize("stage", STAGES)
def test_zero_gives_the_rates_of_a_plain_optimizer(trained, worker, stage):
    plain = worker.train_plainly()
    for answers in trained:
        assert answers[stage] == trained[0][stage]
    for got, expected in zip(trained[0][stage]["found"], plain, strict=True):
        assert got["steps"] == expected["steps"]
        for what in ("alphas", "factors", "rates"):
            # 1e-5: the bar; gradients are averaged over two processes.
            assert got[what] == pytest.approx(expected[what], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_the_engine_s_checkpoint_brings_the_scheduler_back(trained, stage):
    answers = trained[0][stage]
    assert answers["steps before loading"] == answers["found"][-1]["steps"] + 1
    assert answers["steps after loading"] == answers["found"][-1]["steps"]
