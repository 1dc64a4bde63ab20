"""The all-candidates Kolmogorov-Smirnov fit against ``powerlaw.Fit`` on the same spectra."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from tbfast import fit_alpha

powerlaw = pytest.importorskip("powerlaw")


def peer(values):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # by default powerlaw refuses candidates with alpha above 3
        return powerlaw.Fit(values, verbose=False, parameter_ranges={"alpha": [1, 1e9]}).power_law


def spectrum(kind, n):
    rng = np.random.default_rng(n)
    if kind == "power law":
        return np.sort(rng.pareto(1.5, n) + 1)
    return np.linalg.svd(rng.standard_normal((n, n)), compute_uv=False)[::-1] ** 2


@pytest.mark.parametrize("kind", ["power law", "Gaussian weights"])
@pytest.mark.parametrize("n", [512, 4096])
def test_ks_fit_of_one_spectrum(race, kind, n):
    values = spectrum(kind, min(n, 1024) if kind.startswith("G") else n)
    if kind.startswith("G") and n > len(values):  # an SVD of 4096 would take longer than the rest
        values = np.sort(np.concatenate([values * (1 + 1e-3 * i) for i in range(n // len(values))]))
    found, expected = fit_alpha(values, "ks"), peer(values)
    np.testing.assert_allclose(found.alpha, expected.alpha, rtol=1e-6)
    np.testing.assert_allclose(found.xmin, expected.xmin, rtol=1e-12)
    race(
        "ks fit",
        f"{n} eigenvalues, {kind}",
        ("tbfast", lambda: fit_alpha(values, "ks")),
        {"powerlaw.Fit": lambda: peer(values)},
        rounds=5,
    )


def test_ks_fit_of_a_whole_model(race):
    spectra = [spectrum("power law", 768) for _ in range(72)]
    race(
        "ks fit",
        "72 spectra of 768",
        ("tbfast, one call", lambda: fit_alpha(spectra, "ks")),
        {"tbfast, one by one": lambda: [fit_alpha(s, "ks") for s in spectra]},
        rounds=5,
    )
