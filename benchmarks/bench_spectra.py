"""The table of ``tbfast bench``, with scikit-learn and skerch beside where they are installed.

``make bench`` or ``pytest benchmarks/bench_spectra.py --benchmark-enable --benchmark-only``. What
pytest-benchmark shows is the time of a whole case; the figures are those of the rows.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from tbfast.bench import Case, csv_rows, full_cases, machine, measured
from tbfast.bench_cases import least_residual, low_rank, residual
from tbfast.bench_contest import Call
from tbfast.bench_data import known_layers

MINILM = Path(__file__).parents[1] / "build/data/minilm/model.safetensors"


def sklearn_svd(weight, rank):
    from sklearn.utils.extmath import randomized_svd

    u, s, vh = randomized_svd(weight.numpy(), rank, random_state=0)
    return torch.from_numpy((u * s) @ vh)


def skerch_svd(weight, rank):
    from skerch.algorithms import ssvd

    # It has no power iterations. More measurements take their place.
    u, s, vh = ssvd(weight, weight.device, weight.dtype, 4 * rank)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


OTHERS = {"sklearn": ("randomized_svd", sklearn_svd), "skerch": ("skerch ssvd", skerch_svd)}


def low_rank_beside_others(rows, cols, rank, count, *, bar):
    contest = low_rank(rows, cols, rank, count, bar=bar)
    layers = known_layers(rows, cols, count)
    others = []
    for package, (name, svd) in OTHERS.items():
        if importlib.util.find_spec(package) is not None:
            left = residual(svd(layers[0], rank), layers[0]) / least_residual(layers[0], rank)
            loop = lambda svd=svd: [svd(w, rank) for w in layers]  # noqa: E731
            others.append(Call(f"{name} (left {left:.2f})", loop, count))
    return replace(contest, peers=(*contest.peers, *others))


def cases():
    found = []
    for case in full_cases(MINILM if MINILM.exists() else None):
        if case.name == "rsvd":
            make = partial(low_rank_beside_others, *case.make.args, **case.make.keywords)
            case = Case(case.name, make, case.rounds)
        found.append(case)
    return found


@pytest.fixture(scope="module")
def this():
    return machine()


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name.replace(" ", "-"))
def test_row_of_the_table(benchmark, results, commit, this, case):
    rows = benchmark.pedantic(measured, (case, this.stream))
    results += [{"ratio": "", "p50_ms": ""} | row for row in csv_rows(rows, this.cpu, commit)]
