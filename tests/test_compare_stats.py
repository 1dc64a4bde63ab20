"""Statistics of a comparison against SciPy and hand-computed figures, and the verdict in words."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from scipy import stats

from tbfast.compare_stats import Run, holm, paired, summarise, two_sided_p
from tbfast.compare_verdict import notes, plus_minus, verdict

CONTROLS = ("reverse", "fixed")
NAMES = ("plain", "published", "every-step", "shape-corrected", *CONTROLS)


def make_runs(tests, validations=None):
    """Runs from ``{variant: {rate: [metric of each seed]}}``."""
    validations = validations or tests
    return {
        (variant, rate, seed): Run(variant, rate, seed, validations[variant][rate][seed], metric)
        for variant, by_rate in tests.items()
        for rate, metrics in by_rate.items()
        for seed, metric in enumerate(metrics)
    }


def summaries(tests, validations=None, goal="min", fixed=("fixed",)):
    first = next(iter(tests.values()))
    found = summarise(
        make_runs(tests, validations),
        variants=list(tests),
        baseline="plain",
        fixed=[name for name in fixed if name in tests],
        rates=list(first),
        seeds=range(len(next(iter(first.values())))),
        goal=goal,
    )
    return {s.variant: s for s in found}


def said(tests, goal="min"):
    """The verdict on one rate."""
    found = summaries({name: {0.1: metrics} for name, metrics in tests.items()}, goal=goal)
    return verdict(list(found.values()), baseline="plain", controls=CONTROLS, goal=goal)


# --- the pieces ---------------------------------------------------------------------------------


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 9, 29, 100])
@pytest.mark.parametrize("t", [0.0, 0.3, -1.0, 2.5, 7.0, 60.0])
def test_the_p_value_is_that_of_student(t, freedom):
    # 1 - A(t) in float64 cancels: an absolute error of a few 1e-16 is what there is.
    assert two_sided_p(t, freedom) == pytest.approx(2 * stats.t.sf(abs(t), freedom), abs=5e-15)


def test_paired_differences_are_those_of_scipy():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(2, 7))
    found, oracle = paired(ours, theirs), stats.ttest_rel(ours, theirs)
    # 1e-12: two ways of summing 7 numbers
    assert found.p == pytest.approx(oracle.pvalue, rel=1e-12)
    assert found.mean == pytest.approx((ours - theirs).mean(), rel=1e-12)
    assert found.error == pytest.approx(stats.sem(ours - theirs), rel=1e-12)
    assert found.n == 7


def test_pairs_with_a_failed_run_do_not_count():
    assert paired([1.0, math.nan, 3.0, 5.0], [0.0, 0.0, 1.0, math.nan]).n == 2


def test_one_pair_has_a_difference_but_no_error():
    found = paired([2.0], [1.5])
    assert found.mean == 0.5
    assert math.isnan(found.error)
    assert math.isnan(found.p)


def test_equal_runs_have_p_1_and_a_constant_gap_has_p_0():
    assert paired([1.0, 2.0], [1.0, 2.0]).p == 1
    assert paired([1.0, 2.0], [2.0, 3.0]).p == 0


def test_holm_is_its_definition():
    # Smallest of 4: times 4; next: times 3; next: times 2; never below one that came before.
    assert holm([0.03, 0.01, 0.2, 0.029]) == pytest.approx([0.087, 0.04, 0.2, 0.087])
    assert holm([0.9, math.nan]) == [1, 1]
    assert holm([]) == []


def test_plus_minus_shows_two_digits_of_the_error():
    assert plus_minus(0.123456, 0.0123) == "0.123 ± 0.012"
    assert plus_minus(-12.34, 3.21) == "-12.3 ± 3.2"
    assert plus_minus(1234.5, 123.0) == "1234 ± 123"
    assert plus_minus(0.25, math.nan) == "0.25"
    assert plus_minus(math.nan, math.nan) == "-"


# --- the best rate ------------------------------------------------------------------------------


def test_the_rate_is_chosen_by_validation_and_never_by_test():
    validations = {"plain": {0.1: [1.0, 1.0], 0.2: [2.0, 2.0]}, "v": {0.1: [3, 3], 0.2: [1, 3.5]}}
    tests = {"plain": {0.1: [9.0, 9.0], 0.2: [0.0, 0.0]}, "v": {0.1: [0.0, 0.0], 0.2: [7.0, 8.0]}}
    found = summaries(tests, validations)
    assert found["plain"].rate == 0.1
    assert found["v"].rate == 0.2
    assert found["v"].difference.mean == -1.5
    assert found["v"].equal_rates[0.1].mean == -9
    assert found["v"].equal_rates[0.2].mean == 7.5


def test_a_failed_run_counts_as_worst():
    tests = {"plain": {0.1: [5.0, 5.0, 5.0], 0.2: [1.0, 1.0, math.nan]}}
    found = summaries(tests)["plain"]
    assert found.rate == 0.1
    assert found.failed == 0


def test_a_variant_that_fails_more_often_than_plain_is_not_better_whatever_the_rest_says():
    tests = {"plain": {0.1: [2.0, 2.1, 2.2, 2.3]}, "v": {0.1: [0.1, 0.2, 0.3, math.nan]}}
    found = summaries(tests)["v"]
    assert found.outcome == "failed"
    assert found.failed == 1


def test_every_run_may_fail():
    nan = [math.nan] * 3
    found = summaries({"plain": {0.1: nan, 0.2: nan}, "v": {0.1: nan, 0.2: nan}})
    assert found["v"].outcome == "none"
    assert math.isnan(found["v"].test)


@pytest.mark.parametrize(("best", "edge"), [(0.1, True), (0.2, False), (0.3, True)])
def test_a_best_rate_at_the_edge_of_the_grid_is_flagged(best, edge):
    tests = {"plain": {rate: [1.0 + (rate != best)] * 3 for rate in (0.3, 0.1, 0.2)}}
    found = summaries(tests)["plain"]
    assert found.rate == best
    assert found.at_edge == edge
    lines = notes([found], baseline="plain", rates=(0.3, 0.1, 0.2), seeds=range(3))
    assert any(f"edge of the grid: plain ({best:g})" in line for line in lines) == edge


def test_with_goal_max_everything_is_mirrored():
    rng = np.random.default_rng(1)
    tests = {v: {r: list(rng.normal(size=5)) for r in (0.1, 0.2, 0.3)} for v in ("plain", "v")}
    mirrored = {v: {r: [-m for m in x] for r, x in by.items()} for v, by in tests.items()}
    small, large = summaries(tests), summaries(mirrored, goal="max")
    for v in tests:
        assert small[v].rate == large[v].rate
        assert small[v].outcome == large[v].outcome
        assert small[v].test == -large[v].test


# --- what it finds, and what it does not --------------------------------------------------------


def draw(rng, seeds, curve=(0.1, 0.0, 0.15), gain=0.0):
    """Metrics around a curve over rates; seeds differ more than variants within a seed do."""
    of_seed = rng.normal(size=seeds)
    return {
        name: {
            rate: list(2 + level - gain * (name == "every-step") + of_seed + noise)
            for rate, (level, noise) in enumerate(
                zip(curve, rng.normal(scale=0.2, size=(len(curve), seeds)), strict=True)
            )
        }
        for name in NAMES
    }


@pytest.mark.parametrize("seeds", [4, 10])
@pytest.mark.parametrize("curve", [(0.1, 0.0, 0.15), (0.0,)])
def test_a_null_experiment_is_called_different_at_most_as_often_as_promised(seeds, curve):
    rng, draws = np.random.default_rng(2), 500
    wrong = 0
    for _ in range(draws):
        found = summaries(draw(rng, seeds, curve), draw(rng, seeds, curve)).values()
        wrong += any(s.outcome != "none" for s in found)
    # 5 % promised, and 3 standard errors of a share of 500.
    assert wrong / draws <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)
    # With one rate nothing is given away but to Holm: five differences to one baseline.
    assert wrong / draws >= 0.015 or len(curve) > 1


def test_a_planted_gain_is_found_as_often_as_the_t_distribution_promises():
    rng, draws, seeds, gain = np.random.default_rng(3), 300, 10, 0.35
    found = [
        summaries(draw(rng, seeds, curve=(0.0,), gain=gain))["every-step"].outcome
        for _ in range(draws)
    ]
    # Oracle: power of a two-sided t-test at 5 %/5 by the noncentral t; a paired difference has
    # noise 0.2·√2. Holm adds where another variant was rejected first, so the upper end is open.
    critical = stats.t.isf(0.005, seeds - 1)
    power = stats.nct.sf(critical, seeds - 1, gain / (0.2 * math.sqrt(2 / seeds)))
    assert 0.5 < power < 0.9
    assert found.count("better") / draws > power - 3 * math.sqrt(power * (1 - power) / draws)
    assert "worse" not in found


def test_a_baseline_caught_at_a_bad_rate_makes_no_variant_better():
    # Validation prefers plain's rate 0.1; at 0.2 its test metric is as good as the variant's.
    rng = np.random.default_rng(4)
    noise = rng.normal(scale=0.01, size=(4, 6))
    tests = {
        "plain": {0.1: list(1.5 + noise[0]), 0.2: list(1.0 + noise[1])},
        "v": {0.1: list(1.5 + noise[2]), 0.2: list(1.0 + noise[3])},
    }
    validations = {"plain": {0.1: [1.0] * 6, 0.2: [1.1] * 6}, "v": {0.1: [1.1] * 6, 0.2: [1.0] * 6}}
    found = summaries(tests, validations)["v"]
    assert found.difference.mean == pytest.approx(-0.5, abs=0.02)  # noise of a mean: 0.006
    assert found.outcome == "none"
    best = summaries({"plain": tests["plain"], "v": {0.1: [0.5] * 6, 0.2: [0.4] * 6}})["v"]
    assert best.outcome == "better"


# --- the verdict --------------------------------------------------------------------------------

NOISE = [NormalDist().inv_cdf((i + 0.5) / 8) * 0.01 for i in (3, 0, 7, 5, 1, 6, 2, 4)]


def around(mean, shift):
    """Eight metrics near a mean whose noise differs between shifts."""
    return [mean + NOISE[(i + shift) % 8] for i in range(8)]


def test_no_difference_is_said_in_these_words_with_the_controls():
    sentence = said({name: around(1.0, k) for k, name in enumerate(NAMES)})
    assert sentence.startswith(
        "No difference found between plain and published, every-step or shape-corrected ("
    )
    assert "; controls: reverse (" in sentence
    assert "fixed (" in sentence
    assert sentence.count(".") == sentence.count("0.") + 1  # one sentence


def test_a_gain_that_fixed_ratios_share_says_so():
    means = dict(zip(NAMES, [1.0, 1.0, 0.8, 1.0, 1.1, 0.8], strict=True))
    sentence = said({name: around(means[name], k) for k, name in enumerate(NAMES)})
    assert sentence.startswith("every-step is better than plain by 0.2")
    assert "(8 seeds), but fixed ratios do as well (" in sentence
    assert "no difference found between plain and published or shape-corrected" in sentence
    assert "reverse (worse by 0.1" in sentence
    assert "fixed (better by 0.2" in sentence


def test_a_gain_over_fixed_ratios_says_so():
    means = dict(zip(NAMES, [1.0, 1.3, 0.7, 1.0, 1.1, 0.9], strict=True))
    sentence = said({name: around(means[name], k) for k, name in enumerate(NAMES)})
    assert "every-step is better than plain by 0.3" in sentence
    assert "and better than fixed by 0.2" in sentence
    assert "published is worse than plain by 0.3" in sentence


def test_fixed_ratios_that_beat_the_variant_are_named():
    means = dict(zip(NAMES, [1.0, 1.0, 0.9, 1.0, 1.0, 0.7], strict=True))
    sentence = said({name: around(means[name], k) for k, name in enumerate(NAMES)})
    assert "but worse than fixed by 0.2" in sentence


def test_the_verdict_on_accuracies_calls_large_better():
    sentence = said({"plain": around(0.7, 0), "published": around(0.9, 1)}, goal="max")
    assert sentence.startswith("published is better than plain by 0.2")
    assert sentence.endswith("; no control was run.")


def test_failures_come_first():
    bad = [math.nan, *around(1.0, 1)[1:]]
    tests = {"plain": around(1.0, 0), "published": bad, "every-step": around(1.0, 2)}
    assert said(tests).startswith("published fails in 1 run at its best rate; no difference found")
    assert said({"plain": bad, "published": around(1.0, 1)}).startswith("plain fails in 1 run")


def test_one_seed_finds_no_difference_and_says_why():
    sentence = said({"plain": [1.0], "published": [0.2], "fixed": [0.3]})
    assert sentence.startswith("No difference found, nor could be, between plain and published")
    assert "2 seeds or more" in sentence
