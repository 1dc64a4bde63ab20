"""The benchmark: what it prints and writes, and that a wrong answer is never timed."""

import csv
import math
from functools import partial

import numpy as np
import pytest
import torch

from tbfast import _native, bench, bench_cases
from tbfast.backends import native
from tbfast.bench import Case
from tbfast.bench_contest import Call, Contest, Entry, race
from tbfast.bench_data import cold_layers, known_layers, singular_values, words
from tbfast.cli import main

SMALL = [
    Case("pass", partial(bench_cases.float32_pass, 48, 64, 4, size=1 << 20, bar=1e-9), 3),
    Case("bfloat16 pass", partial(bench_cases.bfloat16_pass, 48, 64, size=1 << 18), 1),
    Case("loop", partial(bench_cases.python_loop, 64, 3, bar=1e9), 1),
    Case("alpha", partial(bench_cases.against_svdvals, 128, 2, bfloat16_bar=1.0, lin_bar=1.0), 1),
    Case("exact", partial(bench_cases.exact_model, shapes=[(64, 64, 2), (96, 64, 1)]), 1),
    # rank 150 of 160: with the 8 further columns nearly the whole range, as good as the best
    Case("rsvd", partial(bench_cases.low_rank, 160, 200, 150, 2), 1),
    Case("memory", partial(bench_cases.sketch_memory, "small", [(64, 96), (96, 64)], 2)),
    Case("gradient", partial(bench_cases.gradient_memory, 64)),
    Case("busy", partial(bench_cases.beside_busy_cores, 64, 2, sketch=True, bar=1e9), 1),
]


@pytest.fixture
def small(monkeypatch):
    """The command with the smallest of everything."""
    monkeypatch.setattr(bench, "quick_cases", lambda: SMALL)
    monkeypatch.setattr(bench, "cold_bytes", lambda: 1 << 20)


def test_the_command_prints_a_line_for_each_figure_and_writes_them_all(small, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    assert main(["bench", "--quick", "--csv", str(path)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for said in ("GB/s", "Gflop/s", torch.__version__, _native.isa(), "svdvals", "SLQ p16 m20"):
        assert said in out
    table = out.split("\n\n")[1].splitlines()
    # both passes over bfloat16 have two peers; three alphas and a drift have svdvals
    assert len(table) == 1 + 13
    # Memory does not depend on the clock: the model that is too small for its bar is marked.
    marked = [line for line in table if line.startswith("memory") and line.endswith("*")]
    assert marked == [line for line in table if "small" in line]

    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == bench.FIELDS
    assert {row["bench"] for row in rows} == {"spectra"}
    ours = {r["case"]: r for r in rows if r["contender"] == "tbfast"}
    for row in rows:
        if row["contender"] in ("tbfast", "the weights"):
            continue
        ratio = float(row["p50_ms"]) / float(ours[row["case"]]["p50_ms"])
        # 2e-3: the file keeps four digits of each
        assert float(row["ratio"]) == pytest.approx(ratio, rel=2e-3)
        assert float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])


@pytest.mark.parametrize(
    ("verb", "case"),
    [
        ("gram_apply", SMALL[0]),
        ("lanczos", SMALL[3]),
        ("dot", SMALL[3]),
        ("eigenvalues", SMALL[4]),
        ("rsvd", SMALL[5]),
    ],
)
def test_a_verb_with_wrong_answers_is_not_timed(monkeypatch, verb, case):
    right = getattr(native, verb)

    def wrong(*arguments, **options):
        found = right(*arguments, **options)
        if verb == "lanczos":
            found.off_diagonal[:] = 0
        elif verb == "dot":
            return found[0] + 1e3, found[1]
        elif verb == "rsvd":
            return [(u * 0.9, s, vh, error) for u, s, vh, error in found]
        else:
            found[0][:] = found[0] ** 1.1 if verb == "eigenvalues" else 1.001 * found[0]
        return found

    monkeypatch.setattr(native, verb, wrong)
    monkeypatch.setattr(bench, "race", None)  # calling it would raise a TypeError
    with pytest.raises(RuntimeError, match="is wrong and was not timed: its relative error is"):
        bench.measured(case, 1e9)


def test_a_wrong_answer_ends_the_command_with_one_line(small, monkeypatch, capsys):
    monkeypatch.setattr(native, "gram_apply", lambda batch, x: [0 * v for v in x])
    assert main(["bench", "--quick"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "WᵀW X, float32, 4 probes is wrong" in err


@pytest.mark.parametrize("option", ["--fast", "--cs=x", "rows"])
def test_an_unknown_option_is_wrong_usage(option, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", option])
    assert stop.value.code == 2
    assert "usage: tbfast" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_timed(tmp_path, capsys):
    assert main(["bench", "--csv", str(tmp_path / "none" / "rows.csv")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "there is no folder" in err


def test_ratios_are_medians_of_interleaved_rounds_for_one_layer(monkeypatch):
    order = []

    class Clock:
        now = 0.0

        def call(self, name, seconds):
            def run():
                order.append(name)
                self.now += seconds[min(order.count(name), len(seconds)) - 1]

            return run

    clock = Clock()
    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    ours = Entry(Call("ours", clock.call("a", [9, 2, 4, 6]), layers=2), weights=8)
    peer = Call("peer", clock.call("b", [99, 30, 10, 20]))
    [row] = race(Contest("", (ours,), (peer,)), rounds=3, stream=8.0, patience=1e9)
    assert order == ["a", "b"] * 4  # the first round does not count
    assert row.ours.tolist() == [1, 2, 3]
    assert row.ratio == 10
    assert row.stream == pytest.approx(4 / 2 / 8)
    order.clear()
    [row] = race(Contest("", (ours,), (peer,)), rounds=3, stream=8.0, patience=1.0)
    assert (order, row.theirs.tolist()) == (["a", "b"], [99])


@pytest.mark.parametrize(("rows", "cols"), [(60, 60), (90, 40), (40, 90)])
def test_known_layers_have_the_spectrum_that_is_stated(rows, cols):
    first, second = known_layers(rows, cols, 2, moved=0.1)
    for layer in (first, second):
        found = np.linalg.svd(layer.double().numpy(), compute_uv=False)[::-1]
        # float32: a singular value moves by at most eps |W| for each of four transforms
        np.testing.assert_allclose(found, singular_values(rows, cols, 0.1), atol=1e-5)
    assert not torch.equal(first, second)


def test_cold_layers_lie_end_to_end_and_fill_what_is_asked_for():
    layers = cold_layers(32, 48, 1 << 16)
    assert len(layers) == (1 << 16) // (4 * 32 * 48)
    places = np.array([layer.data_ptr() for layer in layers])
    assert (np.diff(places) == 4 * 32 * 48).all()


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("n", [0, 1, 63, 64, 1000, (1 << 17) + 5])
def test_the_bare_read_adds_every_word_once(monkeypatch, isa, n):
    monkeypatch.setenv("TBFAST_ISA", isa)
    values = np.random.default_rng(n).integers(0, 2**64, n, dtype=np.uint64, endpoint=False)
    expected = sum(map(int, values)) % 2**64
    assert [_native.stream_sum(values, threads=t) for t in (1, 2, 4)] == [expected] * 3


def test_words_see_the_memory_of_a_tensor_without_a_copy():
    floats = torch.arange(7, dtype=torch.float32)
    seen = words(floats)
    assert seen.nbytes == 24
    assert seen.ctypes.data == floats.data_ptr()


@pytest.mark.parametrize("isa", _native.isas())
def test_multiply_adds_run_at_least_as_many_operations_as_asked(monkeypatch, isa):
    monkeypatch.setenv("TBFAST_ISA", isa)
    for flops in (1, 10**6):
        # a step: 12 chains of at most 16 lanes, two operations each, on 2 threads
        assert flops <= _native.multiply_adds(flops, threads=2) < flops + 2 * 12 * 16 * 2
    with pytest.raises(ValueError, match="1 or more"):
        _native.multiply_adds(0, threads=1)


def test_the_tables_hold_what_they_promise():
    for cases in (bench.quick_cases(), bench.full_cases()):
        names = [case.name for case in cases]
        assert len(set(names)) == len(names)
        assert all(case.rounds >= 2 for case in cases)
    assert math.isnan(Entry(Call("", int)).error)
