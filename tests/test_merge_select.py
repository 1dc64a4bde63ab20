"""Parameter selection: its random numbers, its law, its bits."""

import hashlib
from collections import Counter
from fractions import Fraction
from itertools import accumulate, product

import numpy as np
import pytest
import torch
from merge_oracle import arrays, drawn

import tbfast
from tbfast import _native
from tbfast.merging.draws import bounds, key

ISAS = _native.isas()
FLOATS = ("float8_e4m3fn", "float8_e5m2", "bfloat16", "float16", "float32", "float64")


@pytest.mark.parametrize(
    "weights", [[1, 1], [1, 1, 1], [0.2, 0.5, 0.3], [0, 1, 0], [3, 0, 2, 1, 1]]
)
@pytest.mark.parametrize("start", [0, 5, 2**32 - 40, 2**40 + 3])
def test_every_element_comes_from_the_model_its_number_points_to(weights, start):
    count = 200
    models = [np.full(count, i, np.uint8) for i in range(len(weights))]
    found = tbfast.merge_tensors(models, name="a.b", weights=weights, seed=9, start=start)
    numbers = drawn(key(9, "select", "a.b"), np.arange(start, start + count, dtype=np.uint64))
    shares = [Fraction(w) for w in weights]
    limits = [float(2**32 * part / sum(shares)) for part in accumulate(shares)]
    expected = [next(i for i, limit in enumerate(limits) if n < np.floor(limit)) for n in numbers]
    np.testing.assert_array_equal(found, expected)


def test_bounds_are_exact_and_end_at_the_whole_range():
    assert bounds([1 / 3, 1 / 3, 1 / 3]) == [2**32 // 3, 2 * 2**32 // 3, 2**32]
    assert bounds([0.0, 1.0]) == [0, 2**32]
    assert bounds([1e-30, 1.0])[-1] == 2**32


def test_keys_differ_by_seed_purpose_and_name():
    made = {
        key(s, p, n) for s in (0, 1, 2**64 - 1) for p in ("select", "drop/0") for n in ("a", "b")
    }
    assert len(made) == 12
    assert all(k[3] % 2 == 0 for k in made)


def picks(name="w", seed=0, models=2, count=1 << 20, start=0, weights=None):
    labels = [np.full(count, i, np.uint8) for i in range(models)]
    return tbfast.merge_tensors(labels, name=name, seed=seed, start=start, weights=weights)


@pytest.mark.parametrize("weights", [[1, 1], [1, 2, 3], [0.1, 0.2, 0.3, 0.4]])
def test_picked_shares_follow_the_weights(weights):
    count = 1 << 20
    found = np.bincount(picks(models=len(weights), weights=weights, count=count))
    expected = count * np.array(weights) / sum(weights)
    # Chi-squared with up to 3 degrees of freedom: 16.3 is exceeded once in a thousand seeds.
    assert ((found - expected) ** 2 / expected).sum() < 16.3


def test_picks_of_neighbours_tensors_and_seeds_are_independent():
    count = 1 << 20
    a = picks() - 0.5
    others = {
        "lag 1": np.roll(a, 1),
        "lag 4": np.roll(a, 4),
        "lag 16": np.roll(a, 16),
        "lag 2048": np.roll(a, 2048),
        "neighbours swapped": a.reshape(-1, 2)[:, ::-1].ravel(),
        "another tensor": picks("v") - 0.5,
        "another seed": picks(seed=1) - 0.5,
        "another tensor, shifted": np.roll(picks("v"), 1) - 0.5,
        "another seed, swapped": (picks(seed=1) - 0.5).reshape(-1, 2)[:, ::-1].ravel(),
    }
    for name, b in others.items():
        # A correlation of independent signs has standard deviation 1 / sqrt(count).
        assert abs(4 * (a * b).mean()) < 4 / np.sqrt(count), name


def test_slices_get_the_draws_of_the_whole():
    base, models = arrays(3, 5000)
    whole = tbfast.merge_tensors(models, name="w", base=base)
    for first, last in [(0, 1), (1, 17), (17, 4096), (4095, 5000)]:
        part = tbfast.merge_tensors(
            [m[first:last] for m in models], name="w", base=base[first:last], start=first
        )
        np.testing.assert_array_equal(part, whole[first:last])


@pytest.mark.parametrize("resample", ["auto", 1, 3])
@pytest.mark.parametrize("weights", [[1, 1, 1], [0.5, 0.3, 0.2]])
def test_the_law_of_resampling_for_every_pattern_of_changed_models(resample, weights):
    count = 60_000
    w = np.array(weights) / sum(weights)
    for pattern in product([False, True], repeat=3):
        base = np.zeros(count, np.float32)
        models = [np.full(count, i + 1 if c else 0, np.float32) for i, c in enumerate(pattern)]
        found = tbfast.merge_tensors(
            models, name=str(pattern), base=base, weights=weights, resample=resample
        )
        unchanged = sum(p for p, c in zip(w, pattern, strict=True) if not c)
        if not any(pattern):
            law = {0.0: 1.0}
        elif resample == "auto":
            law = {i + 1.0: w[i] / w[list(pattern)].sum() for i in range(3) if pattern[i]}
        else:
            # Drawn until changed, at most 1 + resample times.
            hits = (1 - unchanged ** (resample + 1)) / (1 - unchanged)
            law = {i + 1.0: w[i] * hits for i in range(3) if pattern[i]}
            if unchanged:
                law[0.0] = unchanged ** (resample + 1)
        seen = Counter(found.tolist())
        assert seen.keys() == law.keys()
        for value, share in law.items():
            # 4.5 standard deviations of a binomial share, over some hundred shares
            assert abs(seen[value] / count - share) <= 4.5 * np.sqrt(share * (1 - share) / count)


def test_resampling_leaves_what_had_changed_as_plain_selection_has_it():
    base, models = arrays(4, 20_000)
    plain = tbfast.merge_tensors(models, name="w", base=base, resample="off")
    again = tbfast.merge_tensors(models, name="w", base=base)
    changed = plain != base
    np.testing.assert_array_equal(again[changed], plain[changed])
    everywhere_same = np.all([m == base for m in models], axis=0)
    np.testing.assert_array_equal(again == base, everywhere_same)


def test_selection_is_the_average_in_the_mean():
    _, models = arrays(3, 400)
    mean = np.mean(
        [tbfast.merge_tensors(models, name="w", seed=s) for s in range(400)], axis=0, dtype=float
    )
    spread = np.std(models, axis=0) / np.sqrt(400)
    # 5 standard errors over 400 elements; rounding where the models agree
    assert (np.abs(mean - np.mean(models, axis=0, dtype=float)) <= 5 * spread + 1e-6).all()


@pytest.mark.parametrize("dtype", [*FLOATS, "complex64", "int8", "uint8", "bool", "int16", "int64"])
def test_selection_copies_the_bits_of_every_dtype(dtype):
    kind = getattr(torch, dtype)
    width = torch.empty(0, dtype=kind).element_size()
    generator = torch.Generator().manual_seed(0)
    raw = [torch.randint(0, 2 if dtype == "bool" else 256, (1000 * width,), generator=generator,
                         dtype=torch.uint8) for _ in range(3)]  # fmt: skip
    models = [r.view(kind).view(10, 100) for r in raw]
    merged = tbfast.merge_tensors(models, name="w")
    assert merged.dtype == kind
    assert merged.shape == (10, 100)
    words = merged.flatten().view(torch.uint8).view(-1, width)
    choices = torch.stack([r.view(-1, width) for r in raw])
    assert (choices == words).all(2).any(0).all()  # whole elements, NaN payloads and -0 included
    assert len({i for i in range(3) if (choices[i] == words).all(1).any()}) == 3


def test_minus_zero_is_a_change_and_nan_of_the_same_bits_is_none():
    base = np.array([0.0, np.nan] * 500, np.float32)
    models = [base.copy(), np.array([-0.0, np.nan] * 500, np.float32)]
    merged = tbfast.merge_tensors(models, name="w", base=base)
    assert np.signbit(merged[::2]).all()  # the only model that changed it
    np.testing.assert_array_equal(merged.view(np.uint32)[1::2], base.view(np.uint32)[1::2])


# Merges must be repeatable for ever: these change only with the "v1" of merging/draws.py.
GOLDEN = {
    ("bfloat16", 1): "c36117ed6975fb5d",
    ("bfloat16", 2): "f8beaa0937c4aeb5",
    ("bfloat16", 3): "e1db493d696a680f",
    ("bfloat16", 5): "caa7a01c112a04c2",
    ("float16", 1): "c36117ed6975fb5d",
    ("float16", 2): "f8beaa0937c4aeb5",
    ("float16", 3): "e1db493d696a680f",
    ("float16", 5): "caa7a01c112a04c2",
    ("float32", 1): "c36117ed6975fb5d",
    ("float32", 2): "983187df3f4b708a",
    ("float32", 3): "0289d7f0203ea62d",
    ("float32", 5): "a7e4103c848c52ba",
    ("float8_e4m3fn", 1): "c36117ed6975fb5d",
    ("float8_e4m3fn", 2): "eb3c8f73f9aa4a1f",
    ("float8_e4m3fn", 3): "0ba9a6c5920ea422",
    ("float8_e4m3fn", 5): "ff4434b9ded8c6e4",
    ("uint8", 1): "c36117ed6975fb5d",
    ("uint8", 2): "eb3c8f73f9aa4a1f",
    ("uint8", 3): "0ba9a6c5920ea422",
    ("uint8", 5): "ff4434b9ded8c6e4",
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float8_e4m3fn", "uint8"])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("isa", ISAS)
def test_golden_hashes(dtype, count, isa, monkeypatch):
    monkeypatch.setenv("TBFAST_ISA", isa)
    kind = getattr(torch, dtype)
    # Bytes of a linear congruence: nothing that a library might change.
    raw = np.cumprod(np.full(6 * 8000, 1664525, np.uint32), dtype=np.uint32)
    raw = (raw >> 13).astype(np.uint8).reshape(6, 8000)
    base, *models = (torch.from_numpy(r).view(kind) for r in raw)
    for i in range(count):
        models[i].view(torch.uint8)[i :: count + 1] = base.view(torch.uint8)[i :: count + 1]
    plain = tbfast.merge_tensors(models[:count], name="layer.0.weight", seed=42)
    again = tbfast.merge_tensors(models[:count], name="layer.0.weight", seed=42, base=base)
    digest = hashlib.sha256(
        plain.view(torch.uint8).numpy().tobytes() + again.view(torch.uint8).numpy().tobytes()
    ).hexdigest()[:16]
    assert digest == GOLDEN[dtype, count]
