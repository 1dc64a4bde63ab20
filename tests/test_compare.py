"""compare: what each variant does to an optimizer, what is kept, resumed and refused."""

import csv
import itertools
import json
import math
from statistics import fmean

import numpy as np
import pytest
import torch
from torch import nn

import tbfast
from tbfast.compare_journal import Journal
from tbfast.compare_stats import Run

NAMES = ["plain", "published", "every-step", "shape-corrected", "reverse", "fixed"]
STEPS, EVERY = 5, 3


class Net(nn.Module):
    """Two blocks of a square and an oblong layer; the first and last layer are not tuned."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 64)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"square": nn.Linear(64, 64), "up": nn.Linear(64, 160)}) for _ in "ab"
        )
        self.downs = nn.ModuleList(nn.Linear(160, 64) for _ in "ab")
        self.last = nn.Linear(64, 1)

    def forward(self, x):
        x = self.first(x).relu()
        for block, down in zip(self.blocks, self.downs, strict=True):
            x = x + down(block["up"](block["square"](x).relu()).relu())
        return self.last(x)


class Spy:
    """A ``train`` that notes, per run, the factor of every parameter inside each step."""

    def __init__(self):
        self.factors, self.alphas, self.found, self.draws, self.order = {}, {}, {}, {}, []

    def __call__(self, make_optimizer, *, seed, rate):
        key = (make_optimizer.variant, rate, seed)
        self.order.append(key)
        self.draws[key] = float(torch.rand(()) + np.random.rand())  # noqa: NPY002 - the global one
        model = Net()
        names = {id(p): name for name, p in model.named_parameters()}
        optimizer = make_optimizer(model, torch.optim.SGD, lr=rate, momentum=0.9)
        seen, alphas = self.factors.setdefault(key, []), self.alphas.setdefault(key, [])

        def look(optimizer, args, kwargs):
            alphas.append({n: hill(p) for n, p in tuned(dict(model.named_parameters())).items()})
            seen.append(
                {names[id(p)]: g["lr"] / rate for g in optimizer.param_groups for p in g["params"]}
            )

        optimizer.register_step_pre_hook(look)  # after the balancer's own
        x = torch.randn(32, 8)
        for _ in range(STEPS):
            optimizer.zero_grad()
            (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()
        self.found[key] = [dict(b.factors) for b in make_optimizer.balancers]
        return dict(validation=rate + seed, test=torch.tensor(rate + 2 * seed))


def hill(weight):
    """Alpha by the published formula: xmin at the middle of the ascending eigenvalues."""
    values = np.sort(np.linalg.svd(weight.detach().double().numpy(), compute_uv=False) ** 2)
    tail = values[len(values) // 2 :]
    return 1 + len(tail) / np.log(tail / tail[0]).sum()


def linear(alphas):
    low, high = min(alphas.values()), max(alphas.values())
    return {name: 0.5 + (a - low) / (high - low) for name, a in alphas.items()}


def tuned(by_name):
    return {n: v for n, v in by_name.items() if n.endswith("weight") and n.split(".")[0][-1] == "s"}


@pytest.fixture(scope="module")
def spied():
    spy = Spy()
    comparison = tbfast.compare(
        spy, rates=[0.003, 0.01], seeds=[3, 4], every=EVERY, method="exact", budget=None
    )
    return spy, comparison


def toy(metric):
    """A ``train`` of one small step whose metric is synthetic."""

    def train(make_optimizer, *, seed, rate):
        model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3)))
        optimizer = make_optimizer(model, torch.optim.SGD, lr=rate)
        model(torch.ones(1, 64)).sum().backward()
        optimizer.step()
        return metric(make_optimizer.variant, rate, seed)

    return train


# --- what each variant is -----------------------------------------------------------------------


def test_every_variant_runs_once_with_each_seed_and_rate_and_draws_the_same_numbers(spied):
    spy, comparison = spied
    assert list(comparison.variants) == NAMES
    assert sorted(spy.order) == sorted(itertools.product(NAMES, [0.003, 0.01], [3, 4]))
    for seed in (3, 4):
        assert len({draw for (_, _, s), draw in spy.draws.items() if s == seed}) == 1
    assert len(set(spy.draws.values())) == 2


def test_plain_has_no_factors(spied):
    spy, _ = spied
    for seen in spy.factors["plain", 0.01, 3]:
        assert set(seen.values()) == {1.0}


def test_published_maps_exact_alphas_and_keeps_the_factors_between_refreshes(spied):
    spy, _ = spied
    seen = [tuned(f) for f in spy.factors["published", 0.01, 4]]
    alphas = spy.alphas["published", 0.01, 4]
    for step in range(STEPS):
        # 1e-5: float32 Gram eigenvalues against a float64 SVD
        expected = linear(alphas[step - step % EVERY])
        assert seen[step] == pytest.approx(expected, abs=1e-5)
    assert seen[0] == seen[EVERY - 1] != seen[EVERY]


def test_every_step_is_attach_as_it_is(spied):
    spy, _ = spied
    seen = [tuned(f) for f in spy.factors["every-step", 0.01, 4]]
    alphas = spy.alphas["every-step", 0.01, 4]
    for step in range(STEPS):
        assert seen[step] == pytest.approx(linear(alphas[step]), abs=1e-5)


def test_reverse_mirrors_the_map(spied):
    spy, _ = spied
    first = tuned(spy.factors["reverse", 0.01, 4][0])
    forward = linear(spy.alphas["reverse", 0.01, 4][0])
    assert first == pytest.approx({n: 2 - f for n, f in forward.items()}, abs=1e-5)


def test_shape_corrected_takes_the_alpha_of_noise_of_the_same_shape_away(spied):
    spy, _ = spied
    alphas = spy.alphas["shape-corrected", 0.01, 4][0]
    shapes = {n: tuple(p.shape) for n, p in Net().named_parameters() if n in alphas}
    generator = torch.Generator().manual_seed(0)

    def noise_alpha(shape):
        large = [16 * side for side in shape]  # towards the limit of the shape's aspect ratio
        return hill(torch.randn(*large, generator=generator))

    of_noise = {shape: noise_alpha(shape) for shape in sorted(set(shapes.values()))}
    gaps = {n: a - of_noise[shapes[n]] for n, a in alphas.items()}
    # One draw of noise 1024 wide has an alpha within 0.01 of its limit; the gaps span 0.1 or more.
    assert tuned(spy.factors["shape-corrected", 0.01, 4][0]) == pytest.approx(linear(gaps), abs=0.1)


@pytest.mark.parametrize("rate", [0.003, 0.01])
def test_fixed_is_the_mean_by_type_of_the_first_seed_of_every_step_at_the_same_rate(spied, rate):
    spy, _ = spied
    inside = [tuned(f) for f in spy.factors["every-step", rate, 3]]
    refreshes = [*inside, spy.found["every-step", rate, 3][0]]  # one more after the last step
    by_type = {}
    for name in inside[0]:
        kind = name.replace("0", "*").replace("1", "*")
        by_type.setdefault(kind, []).append(fmean(r[name] for r in refreshes))
    for seed in (3, 4):
        for seen in spy.factors["fixed", rate, seed]:
            for name, factor in tuned(seen).items():
                kind = name.replace("0", "*").replace("1", "*")
                assert factor == pytest.approx(fmean(by_type[kind]), abs=1e-12)
    assert len(by_type) == 3


def test_variants_of_ones_own_are_options_of_attach():
    spy = Spy()
    variants = {
        "constants": {"fixed_from": "slow"},
        "nothing": None,
        "slow": {"every": 100, "high": 2.0},
        "hand": {"mapping": "fixed", "factors": {"*.up.*": 3.0}},
    }
    found = tbfast.compare(spy, variants=variants, rates=[0.01], seeds=[0], method="exact")
    assert found.baseline == "nothing"
    assert list(found.variants)[-1] == "constants"
    assert max(tuned(spy.factors["slow", 0.01, 0][0]).values()) == 2.0
    assert tuned(spy.factors["hand", 0.01, 0][-1])["blocks.1.up.weight"] == 3.0
    slow, constants = (tuned(spy.factors[v, 0.01, 0][0]) for v in ("slow", "constants"))
    for kind in ("blocks.{}.square.weight", "blocks.{}.up.weight", "downs.{}.weight"):
        mean = fmean(slow[kind.format(i)] for i in range(2))
        assert constants[kind.format(0)] == constants[kind.format(1)] == pytest.approx(mean)


def test_an_optimizer_of_ones_own_is_attached_and_let_go_after_the_run():
    kept = []

    def train(make_optimizer, *, seed, rate):
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
        groups = [{"params": [p], "lr": rate} for p in model.parameters()]
        optimizer = torch.optim.SGD(groups, lr=rate)
        assert make_optimizer.attach(optimizer, model) is optimizer
        model(torch.ones(1, 64)).sum().backward()
        optimizer.step()
        kept.append((optimizer, model))
        return 1.0

    tbfast.compare(train, variants=["plain", "every-step"], rates=[0.1], seeds=[0, 1])
    for optimizer, model in kept:
        tbfast.attach(optimizer, model).detach()  # refused while factors are attached


# --- findings -----------------------------------------------------------------------------------


def test_a_planted_gain_is_found_and_no_gain_is_called_no_difference():
    rng = np.random.default_rng(0)

    def metric(variant, rate, seed):
        gain = 0.5 * (variant == planted)
        level = abs(math.log10(rate / 0.01))
        return dict(
            validation=level - gain + 0.05 * rng.normal(), test=level - gain + 0.05 * rng.normal()
        )

    options = dict(rates=[0.001, 0.01, 0.1], seeds=range(5), variants=["plain", "published"])
    planted = "published"
    found = tbfast.compare(toy(metric), **options)
    assert found.verdict.startswith("published is better than plain by 0.")
    assert [s.rate for s in found.summaries] == [0.01, 0.01]
    planted = None
    found = tbfast.compare(toy(metric), **options)
    assert found.verdict.startswith("No difference found between plain and published (")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_run_whose_metric_is_not_finite_is_shown_and_counts_as_worst(bad, tmp_path):
    def metric(variant, rate, seed):
        return bad if variant == "published" and rate == 0.1 else 1.0 - rate

    found = tbfast.compare(
        toy(metric), variants=["plain", "published"], rates=[0.01, 0.1], seeds=[0, 1], out=tmp_path
    )
    assert [s.rate for s in found.summaries] == [0.1, 0.01]
    assert "(2 failed)" in str(found)
    assert sum(run.failed for run in found.runs) == 2
    rows = list(csv.DictReader((tmp_path / "runs.csv").read_text().splitlines()))
    assert sum(row["test"] == "" for row in rows) == 2


@pytest.mark.filterwarnings("ignore:.*has no alpha:RuntimeWarning")  # what is provoked here
def test_a_run_that_raises_once_its_weights_are_not_finite_is_a_failed_run():
    def train(make_optimizer, *, seed, rate):
        model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3)))
        optimizer = make_optimizer(model, torch.optim.SGD, lr=rate)
        for _ in range(8):
            for p in model.parameters():
                p.grad = torch.full_like(p, math.nan if rate > 1 else 0.01)
            optimizer.step()
        return math.nan if rate > 1 else 1.0

    found = tbfast.compare(train, variants=["plain", "every-step"], rates=[0.1, 2], seeds=[0, 1])
    failed = [run for run in found.runs if run.failed]
    assert {(run.variant, run.rate) for run in failed} == {("plain", 2), ("every-step", 2)}
    assert [run.note for run in failed if "diverged" in run.note]


# --- files and resuming -------------------------------------------------------------------------


def test_an_interrupted_comparison_goes_on_where_it_stopped_and_ends_the_same(tmp_path):
    calls = []

    def metric(variant, rate, seed):
        calls.append((variant, rate, seed))
        if len(calls) == stop:
            raise KeyboardInterrupt
        return math.sin(len(variant) + 10 * rate + seed)  # depends on the run alone

    options = dict(rates=[0.01, 0.1, 0.2], seeds=[0, 1, 2])
    stop = 20
    with pytest.raises(KeyboardInterrupt):
        tbfast.compare(toy(metric), out=tmp_path / "a", **options)
    # As after a crash in the middle of a write.
    with (tmp_path / "a" / "runs.jsonl").open("a") as stream:
        stream.write('{"run": {"variant": "pl')
    stop, calls[:] = None, calls[:-1]
    resumed = tbfast.compare(toy(metric), out=tmp_path / "a", **options)
    assert len(calls) == len(set(calls)) == 6 * 3 * 3
    again = tbfast.compare(toy(metric), out=tmp_path / "a", **options)
    assert len(calls) == 6 * 3 * 3
    assert str(again) == str(resumed)
    whole = tbfast.compare(toy(metric), **options)
    assert whole.verdict == resumed.verdict
    assert [run.test for run in whole.runs] == [run.test for run in resumed.runs]


def test_seeds_rates_and_variants_may_be_added_later(tmp_path):
    calls = []

    def metric(variant, rate, seed):
        calls.append((variant, rate, seed))
        return rate

    train = toy(metric)
    tbfast.compare(train, variants=["plain", "every-step"], rates=[1], seeds=[0], out=tmp_path)
    names = ["plain", "every-step", "fixed"]
    tbfast.compare(train, variants=names, rates=[1, 2], seeds=[0, 1], out=tmp_path)
    assert len(calls) == len(set(calls)) == 3 * 2 * 2


def test_a_folder_of_another_experiment_is_refused(tmp_path):
    def again(**options):
        with pytest.raises(ValueError, match="use another out= folder"):
            tbfast.compare(toy(lambda *_: 1), rates=[1], **{"seeds": [0], **options}, out=tmp_path)

    tbfast.compare(toy(lambda *_: 1), rates=[1], seeds=[0], out=tmp_path)
    again(every=7)
    again(low=0.7)
    again(goal="max")
    again(seeds=[1])  # the constants of "fixed" came from seed 0
    (tmp_path / "runs.jsonl").write_text("something else")
    again()
    assert (tmp_path / "runs.jsonl").read_text() == "something else"


def test_the_journal_keeps_every_bit_of_a_run(tmp_path):
    run = Run("v", 0.1 + 0.2, 3, math.nan, 1 / 3, 0.7, 0.01, [{"*.q.weight": 1 / 7}], "why")
    Journal(tmp_path, {"v": None}, "min").add(run)
    (found,) = Journal(tmp_path, {"v": None}, "min").runs.values()
    assert repr(found) == repr(run)  # NaN is not equal to itself


def test_the_files_hold_what_was_found(tmp_path, spied):
    _, found = spied
    found.write(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"table.md", "runs.csv", "comparison.json"}
    record = json.loads((tmp_path / "comparison.json").read_text())
    assert record["verdict"] == found.verdict
    assert len(record["runs"]) == 24
    rows = list(csv.DictReader((tmp_path / "runs.csv").read_text().splitlines()))
    assert [float(row["test"]) for row in rows] == [run.test for run in found.runs]
    table = (tmp_path / "table.md").read_text()
    assert table.startswith(f"**{found.verdict}**")
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines[:8]}) == 1
    for name in NAMES:
        assert f"| {name} |" in table
        assert f"\n{name} " in str(found)


def test_the_picture_is_drawn_and_another_suffix_refused(tmp_path, spied):
    pytest.importorskip("matplotlib")
    _, found = spied
    found.plot(tmp_path / "c.svg")
    text = (tmp_path / "c.svg").read_text()
    for name in NAMES:
        assert f"<!-- {name}" in text  # matplotlib notes the text of an outline so
    with pytest.raises(ValueError, match=r"\.png"):
        found.plot(tmp_path / "c.gif")


def test_progress_counts_the_runs():
    ticks = []
    tbfast.compare(
        toy(lambda *_: 1),
        variants=["plain", "published"],
        rates=[0.1],
        seeds=[0, 1],
        progress=lambda done, total, name: ticks.append((done, total, name)),
    )
    assert [done for done, _, _ in ticks] == [0, 1, 2, 3, 4]
    assert {total for _, total, _ in ticks} == {4}
    assert ticks[1][2] == "published, rate 0.1, seed 0"
