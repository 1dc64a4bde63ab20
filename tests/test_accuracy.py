"""The accuracy benchmark at a tiny size: its rows, and the report made of them."""

from __future__ import annotations

import csv
import importlib
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Adam

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ANCHORED = {"stale", "lin", "aligned", "floor"}
ALONE = {"fresh p4", "fresh p8", "fresh p16", "exact"}


@pytest.fixture(scope="module")
def modules():
    """The benchmark's modules; torch on one thread, as it runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        names = ("accuracy", "accuracy_runs", "accuracy_report")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def rows(modules):
    runs = modules.accuracy_runs

    def begin():
        return runs.mlp(lambda m: Adam(m.parameters(), lr=3e-3), widths=(64, 96, 80), batch=16)

    training = runs.Training("init", "tiny", begin, {0: (1, 3), 2: (3,)})
    matrices = [runs.Drawn(spectrum, 60, 0, 2) for spectrum in runs.SPECTRA]
    return [*modules.accuracy.compared(training), *modules.accuracy.sketched(matrices)]


def table_after(report: str, heading: str) -> list[list[str]]:
    """Cells of the first table below a heading, without its rule."""
    lines = report.split(f"## {heading}\n")[1].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    table = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return [table[0], *table[2:]]


def test_every_method_has_a_row_for_every_layer_step_and_anchor(rows):
    trained = [row for row in rows if row.run == "tiny"]
    layers = {row.layer for row in trained}
    assert layers == {"0", "2", "4"}
    found = [(row.layer, row.anchor, row.step, row.method) for row in trained]
    pairs = [(None, 1, ALONE), (None, 3, ALONE), (0, 1, ANCHORED), (0, 3, ANCHORED)]
    pairs += [(2, 3, ANCHORED)]
    expected = [(x, a, s, m) for x in layers for a, s, methods in pairs for m in methods]
    assert sorted(map(str, found)) == sorted(map(str, expected))


def test_exact_rows_have_no_error(rows):
    exact = [row for row in rows if row.method == "exact"]
    assert len(exact) == 3 * 2 + 7
    for row in exact:
        # method="exact" promises eigenvalues to 5e-5; alpha errs by a tenth of that or less.
        assert row.alpha == pytest.approx(row.exact, rel=5e-6)
        assert row.error == 0


def test_anchored_methods_are_right_where_nothing_has_moved(modules):
    torch.manual_seed(0)
    followed = modules.accuracy.Followed(nn.Sequential(nn.Linear(120, 70), nn.Linear(70, 90)))
    held = followed.hold()
    exact = followed.exact()
    assert followed.drift(held) == [0, 0]
    found = followed.from_anchor(held)
    assert set(found) == ANCHORED
    for method, (alpha, _) in found.items():
        # Nothing to follow: float64 rounding. Quadrature in float32 resolves 5e-4 of T at best.
        rtol = 1e-3 if method == "aligned" else 1e-9
        np.testing.assert_allclose(alpha, exact, rtol=rtol, err_msg=method)


def test_drift_is_the_relative_frobenius_norm_of_the_movement(rows, modules):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 60))
    followed = modules.accuracy.Followed(model)
    held = followed.hold()
    with torch.no_grad():
        model[0].weight *= 1.25
    assert followed.drift(held) == pytest.approx([0.25])


def test_report_has_a_cell_for_every_method_and_bucket(rows, modules):
    report = modules.accuracy_report.report(rows, "versions")
    for heading in ("All trainings", "Training from initialisation"):
        table = table_after(report, heading)
        assert len(table) == 2 + 8  # the head, the number of cases, the methods
        assert {len(line) for line in table} == {1 + 7 + 1}
        counts = list(map(int, table[1][1:8]))
        assert 0 < sum(counts) <= 9
        for line in table[2:]:
            for count, cell in zip(counts, line[1:8], strict=True):
                assert (cell == "–") == (count == 0)
        exact = next(line for line in table if line[0] == "exact")
        assert set(exact[1:8]) <= {"0.00 / 0.00", "–"}
    synthetic = table_after(report, "Known spectra")
    assert [line[0] for line in synthetic[1:]] == list(modules.accuracy_runs.SPECTRA)
    assert synthetic[0][1:4] == ["60 p4", "60 p8", "60 p16"]


def case(module: ModuleType, drift: float, alpha: float, error: float):
    found = {"stale": (alpha, error)}
    return module.Case("run", drift, 2.0, 0.5, found)


def test_errors_are_root_mean_squares_and_coverage_counts_two_standard_errors(modules):
    report = modules.accuracy_report
    some = [case(report, 0.01, 2.2, 0.2), case(report, 0.01, 1.0, 0.4)]
    assert report.relative(some, "stale") == pytest.approx(math.sqrt((0.1**2 + 0.5**2) / 2))
    errors = [(one.miss("stale"), one.found["stale"][1]) for one in some]
    assert report.coverage(errors) == 0.5
    assert math.isnan(report.coverage([(0.1, math.nan)]))
    assert case(report, 0.8, 2.0, 0.1).bucket() is None
    assert case(report, 0.02, 2.0, 0.1).bucket() == (0.02, 0.05)


def test_csv_reads_back(rows, modules, tmp_path):
    path = tmp_path / "new" / "accuracy.csv"
    modules.accuracy.write_csv(rows, path)
    with path.open(newline="") as file:
        back = list(csv.DictReader(file))
    assert len(back) == len(rows)
    for line, row in zip(back, rows, strict=True):
        assert line["method"] == row.method
        assert float(line["alpha"]) == pytest.approx(row.alpha, rel=1e-5)  # six digits
        assert (line["anchor"], line["drift"] == "") == (
            ("", True) if row.anchor is None else (str(row.anchor), False)
        )
