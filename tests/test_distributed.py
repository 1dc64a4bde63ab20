"""Weights that several processes hold: the same answers as of one process that holds them all."""

import importlib.util
import math

import pytest
import torch

from tbfast.distributed import make_lens, shared_out
from tbfast.lens import Lens
from tbfast.matrices import Layer
from tbfast.presets import resolve

pytest.importorskip("torch.distributed.fsdp", reason="needs torch.distributed")
if not hasattr(torch.distributed.fsdp, "fully_shard"):
    pytest.skip("fully_shard is public from torch 2.6 on", allow_module_level=True)

WORLD = 4
COPIES = ("copies", "replicated")
PARTS = ("rows", "columns", "rows twice", "blocks", "rows of copies", "half of the processes")
TRAININGS = {
    2: [("ddp", "attach"), ("ddp", "groups"), ("tp", "groups")],
    4: [("fsdp", "attach"), ("fsdp", "groups"), ("hsdp", "attach"), ("fsdp of tp", "groups")],
}


@pytest.fixture(scope="module")
def looked_at(in_processes):
    return in_processes("lens_worker", WORLD)


@pytest.fixture(scope="module")
def faulty(in_processes):
    return in_processes("faults_worker", 3, GROUP_TIMEOUT="5")


@pytest.fixture(scope="module")
def trained(in_processes):
    return {world: in_processes("training_worker", world) for world in TRAININGS}


@pytest.mark.parametrize("way", COPIES + PARTS)
def test_every_process_sees_the_same_bits(looked_at, way):
    first = looked_at[0][way]
    for other in looked_at[1:]:
        for what, value in first.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other[way][what]), what
            else:
                assert value == other[way][what]


@pytest.mark.parametrize("way", COPIES + PARTS)
def test_kept_rows_are_those_of_the_whole_weights(looked_at, way):
    whole = looked_at[0]["plain"]
    assert torch.equal(looked_at[0][way]["kept"], whole["kept"])
    for what in ("unmoved", "turned", "one"):
        # 1e-12: sums of the same float64 numbers in another order.
        torch.testing.assert_close(looked_at[0][way][what], whole[what], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", COPIES + PARTS)
@pytest.mark.parametrize("look", ["exact", "auto"])
def test_exact_spectra_are_bitwise_those_of_the_whole_weights(looked_at, way, look):
    assert torch.equal(looked_at[0][way][look], looked_at[0]["plain"][look])
    assert looked_at[0][way][f"{look} reasons"] == looked_at[0]["plain"][f"{look} reasons"]


@pytest.mark.parametrize("way", COPIES)
def test_sketches_of_copies_are_bitwise_those_of_one_process(looked_at, way):
    assert torch.equal(looked_at[0][way]["sketch"], looked_at[0]["plain"]["sketch"])


@pytest.mark.parametrize("way", PARTS)
def test_sketches_from_sums_agree_with_those_of_whole_weights(looked_at, way):
    got, whole = looked_at[0][way]["sketch"], looked_at[0]["plain"]["sketch"]
    # Rows 5 and 6 pool several matrices, whose many nodes are thinned out by their order: which one
    # is left out turns on the last bit. Their standard errors are 0.05 and more.
    alpha, single = 0, [0, 1, 2, 3, 4]
    torch.testing.assert_close(got[single, alpha], whole[single, alpha], rtol=1e-5, atol=0)
    torch.testing.assert_close(got[5:, alpha], whole[5:, alpha], rtol=2e-4, atol=0)
    # Everything but ks and the sketch's own error, which are differences of such numbers.
    steady = [1, 2, 5, 6, 7, 8, 10]
    torch.testing.assert_close(got[:, steady], whole[:, steady], rtol=1e-5, atol=0)


def test_square_blocks_of_parts_are_those_of_the_whole(looked_at):
    for answers in looked_at:
        shared, plain = answers["farms"]
        torch.testing.assert_close(shared, plain, rtol=0, atol=0, equal_nan=True)


def test_a_layer_with_fewer_rows_than_processes_is_measured_alike(looked_at):
    row, alpha = 2, 0
    assert looked_at[0]["rows"]["exact"][row, alpha] == looked_at[0]["plain"]["exact"][row, alpha]


def test_a_process_that_dies_ends_the_wait_of_the_others(looked_at):
    for answers in looked_at[:-1]:
        assert answers["waited"] < 10
        assert answers["error"]


def test_a_process_that_hangs_is_waited_for_as_long_as_the_time_out_of_the_group(faulty):
    for answers in faulty[:-1]:
        assert answers["error"]
        assert answers["waited"] < 10  # the time-out is 5 s


@pytest.mark.parametrize("of", range(3))
def test_a_weight_that_is_broken_in_one_process_is_seen_by_all(faulty, of):
    for answers in faulty:
        assert [math.isfinite(t) for t in answers[f"turned {of}"]] == [True, False, True]
        reasons = [None, "weights or eigenvalues are not finite", None]
        assert answers[f"reasons {of}"] == reasons
        assert answers[f"alphas {of}"][::2] == faulty[0]["alphas 0"][::2]


def test_processes_agree_on_the_largest_number(faulty):
    assert [answers["agreed"] for answers in faulty] == [3.0] * 3


def test_a_sketch_takes_one_sum_for_each_step_and_makes_no_whole_weight(faulty):
    for answers in faulty:
        calls, wholes = answers["sketch"]
        assert calls == ["allreduce_"] * (4 + 1)  # 4 steps, and the results
        assert wholes == 0


def test_an_exact_look_makes_each_weight_whole_in_one_process_only(faulty):
    for answers in faulty:
        calls, wholes = answers["exact"]
        # One of three layers comes here from two others, two go out, then the results.
        assert sorted(calls) == ["allreduce_", "recv_", "recv_", "send", "send"]
        assert wholes == 1


def test_looking_at_kept_rows_makes_no_whole_weight(faulty):
    for answers in faulty:
        assert answers["rows"] == (["allreduce_"] * 2, 0)


def test_processes_with_different_layers_are_told_so(faulty):
    for answers in faulty:
        assert "tune different layers" in answers["different layers"]


@pytest.mark.parametrize(("world", "how"), [(w, h) for w, hows in TRAININGS.items() for h in hows])
def test_factors_are_bitwise_equal_in_all_processes(trained, world, how):
    for other in trained[world][1:]:
        assert other[(*how, "weight")] == trained[world][0][(*how, "weight")]


@pytest.mark.parametrize(("world", "how"), [(w, h) for w, hows in TRAININGS.items() for h in hows])
def test_factors_are_those_of_a_single_process(trained, one_process, world, how):
    assert_equal_runs(trained[world][0][(*how, "weight")], one_process(how[1], "weight"))


def test_processes_decide_alike_what_the_budget_is_spent_on(trained):
    runs = [answers["budget"] for answers in trained[2]]
    assert runs[0] == runs[1]
    assert len(runs[0]) > 64  # past the step at which the clock is first believed


def test_rows_that_two_cuts_have_spread_are_found_again(trained):
    for answers in trained[4]:
        got, whole = answers["twice cut"]
        for a, b in zip(got["kept"], whole["kept"], strict=True):
            assert torch.equal(a, b)
        # 1e-5: the bar; sums of float32 products in another order.
        assert got["alphas"] == pytest.approx(whole["alphas"], rel=1e-5)


@pytest.mark.parametrize("of", ["grad", "momentum"])
def test_spectra_of_sharded_gradients_and_momenta_are_those_of_whole_ones(trained, one_process, of):
    runs = [answers["fsdp", "groups", of] for answers in trained[4]]
    assert all(run == runs[0] for run in runs)
    assert_equal_runs(runs[0], one_process("groups", of))


@pytest.fixture(scope="module")
def one_process(in_processes):
    path = in_processes.folder / "training_worker.py"
    spec = importlib.util.spec_from_file_location("training_worker", path)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    known = {}

    def run(way, of):
        if (way, of) not in known:
            known[way, of] = worker.train(worker.build(), way, of)
        return known[way, of]

    return run


def assert_equal_runs(got, expected):
    assert len(got) == len(expected)
    for found, right in zip(got, expected, strict=True):
        # 1e-5: the bar; gradients are summed in another order, so weights differ in the last bits.
        assert found == pytest.approx(right, rel=1e-5, nan_ok=True)


def test_one_process_without_a_group_has_the_plain_lens():
    layers, options = [Layer("w", "linear", (8, 8))], resolve("tempbalance", {})
    assert type(make_lens(layers, options, {0: torch.ones(8, 8)})) is Lens


def test_the_longest_job_goes_first_to_the_one_with_the_least():
    assert shared_out([1, 5, 3, 3], 2) == [0, 0, 1, 1]
    assert shared_out([2, 2, 2], 4) == [0, 1, 2]
    assert shared_out([], 2) == []
