"""Balancer: from weights to factors over a run."""

import math
import time
import warnings

import numpy as np
import pytest
import torch

from tbfast import Balancer, lr_factors
from tbfast.matrices import Layer
from tbfast.shape import noise_alpha, square_blocks

NAMES = ["blocks.0.q.weight", "blocks.0.up.weight", "blocks.1.q.weight", "blocks.1.up.weight"]
SHAPES = [(12, 12), (24, 12), (12, 12), (24, 12)]


def median_alpha(weight, xmin_pos=2.0):
    """The published fit on one matrix, in NumPy."""
    values = np.sort(np.linalg.svd(np.asarray(weight, np.float64), compute_uv=False) ** 2)
    tail = values[int(len(values) / xmin_pos) :]
    return 1 + len(tail) / np.log(tail / tail[0]).sum()


def make_layers(names=NAMES, shapes=SHAPES):
    return [Layer(name=n, kind="linear", shape=s) for n, s in zip(names, shapes, strict=True)]


def make_weights(seed, names=NAMES, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {
        name: torch.tensor(rng.standard_normal(shape) * rng.lognormal(0, 1, shape[1]))
        for name, shape in zip(names, shapes, strict=True)
    }


def run(balancer, seeds):
    for seed in seeds:
        balancer.advance()
        if balancer.due:
            balancer.update(make_weights(seed))


def test_factors_are_the_map_of_the_published_alphas():
    balancer = Balancer(make_layers())
    weights = make_weights(0)
    assert list(balancer.factors.values()) == [1.0] * 4
    assert all(math.isnan(a) for a in balancer.alphas.values())
    balancer.update(weights)
    alpha = [median_alpha(w) for w in weights.values()]
    # 1e-6: LAPACK's singular values against those of the Gram matrix
    np.testing.assert_allclose(list(balancer.alphas.values()), alpha, rtol=1e-6)
    expected = np.interp(alpha, [min(alpha), max(alpha)], [0.5, 1.5])
    np.testing.assert_allclose(list(balancer.factors.values()), expected, rtol=1e-5)
    found = balancer.errors.values()
    # Straight after an exact measurement only rounding is left.
    assert all(0 < error < 1e-5 for error in found)


def test_model_balancing_uses_block_means_and_leaves_other_layers_alone():
    names, shapes = [*NAMES, "head.weight"], [*SHAPES, (12, 12)]
    balancer = Balancer(make_layers(names, shapes), preset="model-balancing")
    weights = make_weights(1, names, shapes)
    balancer.update(weights)
    alpha = [median_alpha(w, 1.5) for w in weights.values()]
    means = np.array([np.mean(alpha[:2]), np.mean(alpha[2:4])])
    gap = means - means.mean()
    blocks = 10 ** (1 / (1 + np.exp(-10 * gap)) - 0.5)
    expected = [blocks[0], blocks[0], blocks[1], blocks[1], 1.0]
    np.testing.assert_allclose(list(balancer.factors.values()), expected, rtol=1e-5)


def test_group_by_type_gives_one_factor_to_each_type():
    balancer = Balancer(make_layers(), group_by="type")
    balancer.update(make_weights(2))
    found = list(balancer.factors.values())
    assert found[0] == found[2]
    assert found[1] == found[3]
    assert {found[0], found[1]} == {0.5, 1.5}
    assert Balancer(make_layers(), preset="model-balancing", group_by="layer").options.group_by == (
        "layer"
    )


def test_llr_gives_embeddings_and_heads_the_largest_rate_without_measuring_them():
    layers = [
        Layer(name="embed.weight", kind="linear", shape=(40, 12), role="embedding"),
        *make_layers(),
        Layer(name="lm_head.weight", kind="linear", shape=(40, 12), role="head"),
    ]
    balancer = Balancer(layers, preset="llr")
    broken = torch.full((40, 12), math.nan)
    balancer.update({"embed.weight": broken, "lm_head.weight": broken, **make_weights(3)})
    found = balancer.factors
    assert found["embed.weight"] == found["lm_head.weight"] == 5.0
    middle = [found[name] for name in NAMES]
    assert (min(middle), max(middle)) == (1.0, 5.0)
    assert math.isnan(balancer.alphas["embed.weight"])


def test_fixed_factors_need_no_weights():
    balancer = Balancer(make_layers(), mapping="fixed", factors={"*.q.*": 0.5})
    assert not balancer.due
    balancer.update({})
    assert list(balancer.factors.values()) == [0.5, 1.0, 0.5, 1.0]


def test_null_correction_subtracts_the_noise_of_the_shape():
    plain, corrected = Balancer(make_layers()), Balancer(make_layers(), shape_correction="null")
    for balancer in (plain, corrected):
        balancer.update(make_weights(4))
    shift = [0, noise_alpha(1) - noise_alpha(2)] * 2
    expected = np.array(list(plain.alphas.values())) + shift
    np.testing.assert_allclose(list(corrected.alphas.values()), expected, rtol=1e-12)


def test_farms_measures_square_blocks():
    balancer = Balancer(make_layers(), shape_correction="farms")
    weights = make_weights(5)
    balancer.update(weights)
    values = np.concatenate(
        [
            np.linalg.svd(block, compute_uv=False) ** 2
            for block in square_blocks(weights[NAMES[1]], "linear").numpy()
        ]
    )
    tail = np.sort(values)[12:]
    expected = 1 + 12 / np.log(tail / tail[0]).sum()
    assert balancer.alphas[NAMES[1]] == pytest.approx(expected, rel=1e-6)
    # A square layer is its own block.
    assert balancer.alphas[NAMES[0]] == pytest.approx(median_alpha(weights[NAMES[0]]), rel=1e-6)


def test_ema_averages_alpha_over_refreshes():
    balancer = Balancer(make_layers(), ema=0.75)
    balancer.update(make_weights(6))
    balancer.update(make_weights(7))
    first, second = (np.array([median_alpha(w) for w in make_weights(s).values()]) for s in (6, 7))
    np.testing.assert_allclose(
        list(balancer.alphas.values()), 0.75 * first + 0.25 * second, rtol=1e-6
    )


def test_a_ramp_reaches_the_factor_linearly():
    balancer = Balancer(make_layers(), ramp=4, every=100)
    balancer.update(make_weights(8))
    plain = Balancer(make_layers())
    plain.update(make_weights(8))
    target = np.array(list(plain.factors.values()))
    for step in range(6):
        share = min(1, step / 4)
        # 1e-12: rounding of the interpolation
        np.testing.assert_allclose(
            list(balancer.factors.values()), 1 + (target - 1) * share, rtol=1e-12
        )
        balancer.advance()


def test_rate_classes_leave_only_so_many_rates():
    names = [f"layers.{i}.weight" for i in range(20)]
    shapes = [(12, 12)] * 20
    balancer = Balancer(make_layers(names, shapes), rate_classes=5)
    weights = make_weights(9, names, shapes)
    weights[names[0]] = torch.eye(12)  # no alpha: 1, whatever the classes
    balancer.update(weights)
    assert set(balancer.factors.values()) <= {0.5, 0.75, 1.0, 1.25, 1.5}
    assert balancer.factors[names[0]] == 1.0


def test_start_holds_the_factors_at_one_until_that_step():
    balancer = Balancer(make_layers(), start=3, every=10)
    balancer.update(make_weights(10))
    seen = []
    for _ in range(4):
        seen.append(set(balancer.factors.values()))
        balancer.advance()
    assert seen[:3] == [{1.0}] * 3
    assert seen[3] != {1.0}
    assert not math.isnan(balancer.alphas[NAMES[0]])


def test_start_auto_waits_for_each_layer_to_leave_the_noise_and_then_stays():
    rng = np.random.default_rng(0)
    names, shapes = ["a.weight", "b.weight", "c.weight"], [(96, 96)] * 3
    noise = {n: torch.tensor(rng.standard_normal((96, 96))) for n in names}
    learnt = {n: w * torch.tensor(rng.lognormal(0, 1, 96)) for n, w in noise.items()}
    balancer = Balancer(make_layers(names, shapes), start="auto")
    balancer.update(noise)
    assert set(balancer.factors.values()) == {1.0}
    balancer.update({**noise, "a.weight": learnt["a.weight"]})
    assert set(balancer.factors.values()) == {1.0}  # one layer alone: the middle
    balancer.update({**noise, "a.weight": learnt["a.weight"], "b.weight": learnt["b.weight"]})
    assert sorted(balancer.factors.values()) == [0.5, 1.0, 1.5]
    assert balancer.factors["c.weight"] == 1.0
    balancer.update(noise)
    assert balancer.factors["c.weight"] == 1.0
    assert {balancer.factors["a.weight"], balancer.factors["b.weight"]} == {0.5, 1.5}


@pytest.mark.parametrize("by", ["type", "block", None])
def test_freezing_keeps_the_mean_factors_and_stops_measuring(by):
    balancer = Balancer(make_layers())
    found = []
    for seed in range(5):
        balancer.update(make_weights(seed))
        found.append(list(balancer.factors.values()))
    mean = np.mean(found, axis=0)
    groups = {"type": [[0, 2], [1, 3]], "block": [[0, 1], [2, 3]], None: [[i] for i in range(4)]}
    for group in groups[by]:
        mean[group] = mean[group].mean()
    balancer.freeze(by)
    np.testing.assert_allclose(list(balancer.factors.values()), mean, rtol=1e-12)
    balancer.advance()
    assert not balancer.due
    balancer.update(make_weights(9))
    np.testing.assert_allclose(list(balancer.factors.values()), mean, rtol=1e-12)


def test_freezing_before_the_first_refresh_keeps_ones():
    balancer = Balancer(make_layers())
    balancer.freeze()
    assert set(balancer.factors.values()) == {1.0}
    with pytest.raises(ValueError, match="by must be type, block or None; got 'shape'"):
        balancer.freeze("shape")


def test_explained_is_the_correlation_ratio_of_each_label():
    balancer = Balancer(make_layers())
    assert balancer.explained() == {"shape": 0.0, "type": 0.0, "block": 0.0}
    balancer.update(make_weights(11))
    f = np.array(list(balancer.factors.values()))

    def eta_squared(groups):
        within = sum(((f[g] - f[g].mean()) ** 2).sum() for g in groups)
        return 1 - within / ((f - f.mean()) ** 2).sum()

    types, blocks = [[0, 2], [1, 3]], [[0, 1], [2, 3]]
    expected = {
        name: eta_squared(g) for name, g in {"shape": types, "type": types, "block": blocks}.items()
    }
    assert balancer.explained() == pytest.approx(expected, rel=1e-9)


def test_a_layer_that_turns_nan_keeps_its_factor_and_one_warning_names_it():
    balancer = Balancer(make_layers())
    balancer.update(make_weights(12))
    before, alpha = balancer.factors, balancer.alphas
    broken = {**make_weights(13), NAMES[1]: torch.full(SHAPES[1], math.nan)}
    with pytest.warns(
        RuntimeWarning, match=r"blocks\.0\.up\.weight has no alpha .*not finite"
    ) as w:
        balancer.update(broken)
    assert len(w) == 1
    assert balancer.factors[NAMES[1]] == before[NAMES[1]]
    assert balancer.alphas[NAMES[1]] == alpha[NAMES[1]]
    assert balancer.factors[NAMES[0]] != before[NAMES[0]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balancer.update(broken)  # said once
    balancer.update(make_weights(14))
    healthy = Balancer(make_layers())
    healthy.update(make_weights(14))
    assert balancer.factors == healthy.factors


def test_a_layer_that_never_had_an_alpha_has_factor_one_silently():
    balancer = Balancer(make_layers())
    balancer.update({**make_weights(15), NAMES[0]: torch.eye(12), NAMES[2]: torch.zeros(12, 12)})
    assert balancer.factors[NAMES[0]] == balancer.factors[NAMES[2]] == 1.0
    assert math.isnan(balancer.alphas[NAMES[0]])
    assert sorted(balancer.factors.values()) == [0.5, 1.0, 1.0, 1.5]


def test_three_refreshes_without_a_finite_layer_end_the_run():
    balancer = Balancer(make_layers())
    balancer.update(make_weights(16))
    broken = {name: w * math.nan for name, w in make_weights(16).items()}
    with pytest.warns(RuntimeWarning, match="no alpha"):
        balancer.update(broken)
    balancer.update(broken)
    balancer.update(make_weights(17))  # one finite refresh starts the count again
    balancer.update(broken)
    balancer.update(broken)
    with pytest.raises(RuntimeError, match="3 refreshes in a row .*lower the learning rate"):
        balancer.update(broken)


def test_a_missing_tensor_leaves_its_layer_as_it_was():
    balancer = Balancer(make_layers())
    weights = make_weights(18)
    balancer.update({name: weights[name] for name in NAMES[:2]})
    assert sorted(balancer.factors.values()) == [0.5, 1.0, 1.0, 1.5]
    balancer.update({})
    assert len(balancer.history) == 1


def test_every_sets_how_many_steps_lie_between_refreshes():
    balancer = Balancer(make_layers(), every=3)
    balancer.update(make_weights(0))
    run(balancer, range(10))
    assert [step for step, _, _ in balancer.history] == [0, 3, 6, 9]


def test_history_is_bounded_and_holds_what_was_in_force():
    balancer = Balancer(make_layers(), history=2)
    for seed in range(4):
        balancer.advance()
        balancer.update(make_weights(seed))
    assert [step for step, _, _ in balancer.history] == [3, 4]
    assert balancer.history[-1][1:] == (balancer.alphas, balancer.factors)


def test_state_survives_torch_load_with_weights_only(tmp_path):
    options = {"ema": 0.5, "ramp": 3, "every": 2}
    straight, half = (Balancer(make_layers(), **options) for _ in range(2))
    for balancer in (straight, half):
        balancer.update(make_weights(0))
        run(balancer, range(1, 8))
    torch.save(half.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    turned = Balancer(list(reversed(make_layers())), **options)  # rows are found by name
    turned.load_state_dict(state)
    for balancer in (straight, turned):
        run(balancer, range(8, 15))
    assert turned.factors == straight.factors
    assert turned.alphas == straight.alphas
    assert turned.history == straight.history
    assert turned.steps == straight.steps == 14


def test_state_of_other_layers_is_refused_by_name():
    state = Balancer(make_layers()).state_dict()
    with pytest.raises(ValueError, match=r"only the state has the layer 'blocks\.1\.up\.weight'"):
        Balancer(make_layers(NAMES[:3], SHAPES[:3])).load_state_dict(state)
    smaller = Balancer(make_layers(NAMES[:3], SHAPES[:3])).state_dict()
    with pytest.raises(ValueError, match="only this Balancer has the layer"):
        Balancer(make_layers()).load_state_dict(smaller)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"preset": "best"}, ValueError, "preset must be one of tempbalance, .*'best'"),
        ({"mapping": "cubic"}, ValueError, "mapping must be one of"),
        ({"wiggle": 1}, TypeError, "unknown option 'wiggle'"),
        ({"every": 0}, ValueError, "every must be a whole number of at least 1, got 0"),
        ({"ramp": -1}, ValueError, "ramp must be"),
        ({"start": "later"}, ValueError, "start must be"),
        ({"history": 1.5}, ValueError, "history must be"),
        ({"rate_classes": 1}, ValueError, "rate_classes must be a whole number of at least 2"),
        ({"budget": 0.0}, ValueError, "budget must lie in"),
        ({"ema": 1.0}, ValueError, r"ema must lie in \[0, 1\)"),
        ({"of": "bias"}, ValueError, "of must be one of weight, grad, momentum"),
        ({"group_by": "depth"}, ValueError, "group_by must be one of"),
        ({"shape_correction": "rmt"}, ValueError, "shape_correction must be one of"),
        ({"probes": 0}, ValueError, "probes must be a whole number from 1 to 8192, got 0"),
        ({"method": "guess"}, ValueError, "method must be one of"),
        ({"backend": "fortran"}, ValueError, "backend must be one of"),
        ({"fit": "mean"}, ValueError, "fit must be one of"),
        ({"xmin_pos": 1.0}, ValueError, "xmin_pos must be above 1"),
        ({"mapping": "fixed"}, ValueError, "needs factors"),
        ({"start": "auto", "fit": "ks"}, ValueError, "fit='median' only, got fit='ks'"),
        ({"shape_correction": "null", "fit": "ks"}, ValueError, "shape_correction='null'"),
        ({"start": "auto", "of": "grad"}, ValueError, "of='grad'"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, error, words):
    with pytest.raises(error, match=words):
        Balancer(make_layers(), **options)


def test_layers_need_names_of_their_own():
    with pytest.raises(ValueError, match=r"group_by='block' needs .* got 'fc1\.weight'"):
        Balancer(make_layers(["fc1.weight"], [(12, 12)]), preset="model-balancing")
    with pytest.raises(ValueError, match="one or more"):
        Balancer([])
    with pytest.raises(ValueError, match="own name"):
        Balancer([*make_layers(), make_layers()[0]])
    with pytest.raises(ValueError, match=r"must have shape \(12, 12\), got \(144,\)"):
        Balancer(make_layers()).update({NAMES[0]: torch.ones(144)})


def test_explicit_options_win_over_the_preset():
    options = Balancer(make_layers(), preset="llr", high=3.0, xmin_pos=4.0).options
    assert (options.low, options.high, options.fit.xmin_pos) == (1.0, 3.0, 4.0)
    assert Balancer(make_layers(), budget=None).options.budget is None


def test_overhead_is_the_measured_share_of_time():
    balancer = Balancer(make_layers())
    assert balancer.overhead == 0.0
    run(balancer, range(3))
    time.sleep(0.01)
    assert 0 < balancer.overhead < 1


def test_plot_writes_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    balancer = Balancer(make_layers())
    with pytest.raises(RuntimeError, match="nothing to plot"):
        balancer.plot(tmp_path / "none.png")
    balancer.update(make_weights(0))
    balancer.plot(tmp_path / "one.png")
    run(balancer, range(3))
    balancer.plot(tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "run.png").read_bytes() != (tmp_path / "one.png").read_bytes()


def test_plot_says_how_to_get_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    balancer = Balancer(make_layers())
    balancer.update(make_weights(0))
    with pytest.raises(RuntimeError, match=r"pip install 'tbfast\[plot\]'"):
        balancer.plot(tmp_path / "run.png")


def test_the_map_is_lr_factors():
    balancer = Balancer(make_layers(), mapping="log2")
    balancer.update(make_weights(19))
    expected = lr_factors(list(balancer.alphas.values()), "log2").tolist()
    assert list(balancer.factors.values()) == expected
