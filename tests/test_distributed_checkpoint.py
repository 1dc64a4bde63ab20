"""Checkpoints of sharded runs resume in another number of processes."""

import pytest
import torch

pytest.importorskip("torch.distributed.fsdp", reason="needs torch.distributed")
if not hasattr(torch.distributed.fsdp, "fully_shard"):
    pytest.skip("fully_shard is public from torch 2.6 on", allow_module_level=True)


@pytest.fixture(scope="module")
def runs(in_processes, tmp_path_factory):
    """The second half of a run in 4 processes, and resumed in 2 and in 1."""
    folder = tmp_path_factory.mktemp("checkpoint")
    worker = "checkpoint_worker"
    saved = in_processes(worker, 4, folder=folder, PHASE="save")
    resumed = {n: in_processes(worker, n, folder=folder, PHASE="load") for n in (2, 1)}
    return saved, resumed


@pytest.mark.parametrize("world", [2, 1])
@pytest.mark.parametrize("way", ["groups", "attach"])
def test_a_run_of_four_processes_goes_on_in_fewer(runs, world, way):
    saved, resumed = runs
    for answers in resumed[world]:
        assert answers[way, "measured at"] == saved[0][way, "measured at"]
        for got, expected in zip(answers[way], saved[0][way], strict=True):
            # 1e-5: the bar; gradients are averaged over another number of processes.
            assert got["factors"] == pytest.approx(expected["factors"], rel=1e-5)
            assert got["alphas"] == pytest.approx(expected["alphas"], rel=1e-5)


@pytest.mark.parametrize("way", ["groups", "attach"])
def test_resumed_processes_have_the_same_bits(runs, way):
    first, second = runs[1][2]
    assert first[way] == second[way]
