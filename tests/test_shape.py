"""What shape does to alpha, against the Marchenko-Pastur law's closed form and NumPy spectra."""

import math

import numpy as np
import pytest
import torch

from tbfast.shape import aspect_ratio, is_noise, noise_alpha, sides, square_blocks


def median_alpha(eigenvalues, xmin_pos=2.0):
    """The published fit."""
    values = np.sort(np.asarray(eigenvalues))
    tail = values[int(len(values) / xmin_pos) :]
    return 1 + len(tail) / np.log(tail / tail[0]).sum()


def marchenko_pastur_cdf(x, y):
    """Closed form of the distribution function at aspect y < 1 (Bai and Silverstein 2010)."""
    a, b = (1 - math.sqrt(y)) ** 2, (1 + math.sqrt(y)) ** 2
    r = math.sqrt((b - x) / (x - a))
    inner = math.pi * y + math.sqrt((b - x) * (x - a))
    inner -= (1 + y) * math.atan((r * r - 1) / (2 * r))
    inner += (1 - y) * math.atan((a * r * r - b) / (2 * (1 - y) * r))
    return inner / (2 * math.pi * y)


@pytest.mark.parametrize(("ratio", "xmin_pos"), [(1.25, 2.0), (2, 2.0), (4, 2.0), (4, 1.5)])
def test_noise_alpha_is_that_of_the_closed_form_quantile(ratio, xmin_pos):
    y = 1 / ratio
    low, high = (1 - math.sqrt(y)) ** 2, (1 + math.sqrt(y)) ** 2
    left, right = low * (1 + 1e-12), high * (1 - 1e-12)
    for _ in range(100):  # bisection for the quantile
        middle = (left + right) / 2
        above = marchenko_pastur_cdf(middle, y) > 1 / xmin_pos
        left, right = (left, middle) if above else (middle, right)
    # Midpoint rule in x itself on the tail: slow but plain. 4e5 nodes reach 1e-8 (square root
    # at the upper edge).
    nodes = 400_000
    x = left + (np.arange(nodes) + 0.5) * (high - left) / nodes
    density = np.sqrt((high - x) * (x - low)) / (2 * math.pi * y * x)
    mean = (density * np.log(x / left)).sum() * (high - left) / nodes
    # 1e-6: the quadrature's one cut cell at the quantile, of 4096
    assert noise_alpha(ratio, xmin_pos) == pytest.approx(1 + (1 - 1 / xmin_pos) / mean, rel=1e-6)


@pytest.mark.parametrize(("ratio", "published"), [(1, 2.13), (2, 2.69), (4, 3.50), (64, 11.3)])
def test_noise_alpha_is_near_the_values_measured_at_finite_size(ratio, published):
    # 1.5 %: the published figures are of matrices with some hundred eigenvalues; 7 % at 64:1,
    # where the short side was a few dozen and the finite-size bias goes as 1 / side.
    assert noise_alpha(ratio) == pytest.approx(published, rel=0.07 if ratio == 64 else 0.015)


@pytest.mark.parametrize("xmin_pos", [1.5, 2.0, 4.0])
@pytest.mark.parametrize("shape", [(400, 400), (200, 400), (960, 240)])
def test_noise_alpha_is_the_alpha_of_large_gaussian_matrices(shape, xmin_pos):
    rng = np.random.default_rng(3)
    found = np.mean(
        [
            median_alpha(np.linalg.svd(rng.standard_normal(shape), compute_uv=False) ** 2, xmin_pos)
            for _ in range(4)
        ]
    )
    ratio = max(shape) / min(shape)
    # One matrix scatters by 4 (alpha - 1) / side; the mean of 4 by half of that; three of these.
    tolerance = 6 * (noise_alpha(ratio, xmin_pos) - 1) / min(shape)
    assert found == pytest.approx(noise_alpha(ratio, xmin_pos), abs=tolerance)


def test_noise_alpha_grows_with_the_aspect_ratio():
    found = [noise_alpha(r) for r in (1, 1.001, 1.5, 2, 8, 64, 1e4)]
    assert found == sorted(found)
    assert all(math.isfinite(a) for a in found)


def test_noise_alpha_refuses_ratios_that_are_none():
    with pytest.raises(ValueError, match=r"ratio must be at least 1 .* got 0.5"):
        noise_alpha(0.5)
    with pytest.raises(ValueError, match=r"xmin_pos must be above 1, got 1.0"):
        noise_alpha(2.0, 1.0)


@pytest.mark.parametrize("make", ["gaussian", "uniform"])
@pytest.mark.parametrize("shape", [(96, 96), (64, 256)])
def test_random_starts_lie_in_the_band_of_noise(make, shape):
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(40):
        w = rng.standard_normal(shape) if make == "gaussian" else rng.uniform(-1, 1, shape)
        alpha = median_alpha(np.linalg.svd(w, compute_uv=False) ** 2)
        inside += is_noise(alpha, shape, "linear", 2.0)
    assert inside >= 38  # three standard deviations: 0.3 % outside, a little more in heavy tails


def test_pooled_kernel_positions_narrow_the_band():
    rng = np.random.default_rng(1)
    w = rng.standard_normal((9, 64, 32))
    alpha = median_alpha(np.linalg.svd(w, compute_uv=False).ravel() ** 2)
    assert is_noise(alpha, (64, 32, 3, 3), "conv", 2.0)
    one = 12 * (noise_alpha(2.0) - 1) / 32
    assert is_noise(noise_alpha(2.0) + 0.9 * one, (64, 32), "linear", 2.0)
    assert not is_noise(noise_alpha(2.0) + 0.9 * one, (64, 32, 3, 3), "conv", 2.0)


def test_a_low_rank_signal_leaves_the_band():
    rng = np.random.default_rng(2)
    w = rng.standard_normal((96, 96)) + 3 * rng.standard_normal((96, 40)) @ rng.standard_normal(
        (40, 96)
    )
    alpha = median_alpha(np.linalg.svd(w, compute_uv=False) ** 2)
    assert not is_noise(alpha, (96, 96), "linear", 2.0)


@pytest.mark.parametrize(
    ("shape", "kind", "expected"),
    [
        ((30, 10), "linear", (30, 10)),
        ((8, 16, 3, 3), "conv", (8, 16)),
        ((96, 32), "packed", (32, 32)),
        ((5, 4, 12), "experts", (4, 12)),
    ],
)
def test_sides_are_those_of_the_matrices(shape, kind, expected):
    assert sides(shape, kind) == expected
    assert aspect_ratio(shape, kind) == max(expected) / min(expected)


@pytest.mark.parametrize("shape", [(70, 20), (20, 70), (20, 20)])
def test_square_blocks_cut_the_long_side_in_order(shape):
    w = torch.arange(shape[0] * shape[1], dtype=torch.float64).reshape(shape)
    blocks = square_blocks(w, "linear")
    assert blocks.shape == (max(shape) // 20, 20, 20)
    tall = w if shape[0] >= shape[1] else w.T
    for index, block in enumerate(blocks):
        assert torch.equal(block, tall[20 * index : 20 * index + 20])


def test_square_blocks_take_every_kernel_position():
    w = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    blocks = square_blocks(w, "conv")
    assert blocks.shape == (18, 4, 4)
    assert torch.equal(blocks[1], w[4:, :, 0, 0])
    assert torch.equal(blocks[2], w[:4, :, 0, 1])
