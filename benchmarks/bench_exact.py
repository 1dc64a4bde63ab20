"""Exact spectra of a batch of layers against a loop of ``torch.linalg.svdvals``.

``make bench`` or ``pytest benchmarks/bench_exact.py --benchmark-only``. Agreement with float64
LAPACK is asserted before anything is timed.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from tbfast import eigenvalues, fit_alpha
from tbfast.backends import exact
from tbfast.fitting import FitOptions
from tbfast.spectra import measure

# The shapes of all-MiniLM-L6-v2: rows, cols, layers.
MINILM = [(384, 384, 25), (1536, 384, 6), (384, 1536, 6)]
# rows, cols, layers in the batch: what two threads do in about a second
BATCHES = [(64, 64, 64), (384, 384, 8), (768, 768, 4), (768, 3072, 4), (2048, 2048, 2)]


def layers(rows, cols, count):
    generator = torch.Generator().manual_seed(rows + cols)
    return [torch.randn(rows, cols, generator=generator) for _ in range(count)]


def alphas(weights, fit="median"):
    return [m.fit.alpha for m in measure(weights, ["linear"] * len(weights), FitOptions(fit))]


@pytest.mark.parametrize(("rows", "cols", "count"), BATCHES)
@pytest.mark.parametrize("what", ["alpha, median fit", "all eigenvalues"])
def test_exact_spectra_of_a_batch(race, what, rows, cols, count):
    weights = layers(rows, cols, count)
    expected = np.linalg.svd(weights[0].double().numpy(), compute_uv=False)[::-1] ** 2
    np.testing.assert_allclose(eigenvalues(weights[0]).numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(alphas(weights)[0], fit_alpha(expected).alpha, rtol=1e-4)

    ours = (lambda: alphas(weights)) if what.startswith("alpha") else lambda: eigenvalues(weights)
    race(
        "exact",
        f"{count} x {rows}x{cols} float32",
        (f"tbfast, {what}", ours),
        {"torch.linalg.svdvals, float32": lambda: [torch.linalg.svdvals(w) for w in weights]},
        rounds=5,
    )


def test_the_shapes_of_minilm(race):
    weights = [weight for shape in MINILM for weight in layers(*shape)]
    expected = [np.linalg.svd(w.double().numpy(), compute_uv=False)[::-1] ** 2 for w in weights]
    np.testing.assert_allclose(alphas(weights), [fit_alpha(e).alpha for e in expected], rtol=1e-4)
    race(
        "exact",
        "37 layers of MiniLM's shapes, float32",
        ("tbfast, alpha, median fit", lambda: alphas(weights)),
        {"torch.linalg.svdvals, float32": lambda: [torch.linalg.svdvals(w) for w in weights]},
        rounds=5,
    )


@pytest.mark.parametrize(("rows", "cols", "count"), [b for b in BATCHES if b[0] > 64])
def test_one_layer_alone(race, rows, cols, count):
    [weight] = layers(rows, cols, 1)
    race(
        "exact",
        f"1 x {rows}x{cols} float32",
        ("tbfast, all eigenvalues", lambda: eigenvalues(weight)),
        {"torch.linalg.svdvals, float32": lambda: torch.linalg.svdvals(weight)},
        rounds=5,
    )


@pytest.mark.parametrize(("rows", "cols", "count"), [b for b in BATCHES if b[0] > 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_share_of_gram_product_eigensolver_and_certificate(race, rows, cols, count, dtype):
    stack = layers(rows, cols, 1)[0][None]
    tall = stack if rows >= cols else stack.mT
    exponents = torch.zeros(1, dtype=torch.float64)
    gram = exact._gram(tall, exponents, dtype)
    assert exact._rank_floor(tall.float(), exponents) is not None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the pool
    try:
        race(
            "exact parts",
            f"1 x {rows}x{cols} {dtype}".replace("torch.", ""),
            ("Gram product", lambda: exact._gram(tall, exponents, dtype)),
            {
                "eigensolver, ours": lambda: exact._symmetric_eigenvalues(gram),
                "eigensolver, LAPACK": lambda: torch.linalg.eigvalsh(gram, UPLO="U"),
                "certificate of rank, float32": lambda: exact._rank_floor(tall.float(), exponents),
            },
            rounds=5,
        )
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    start = time.perf_counter()
    code = pytest.main([__file__, "--benchmark-enable", "--benchmark-only", "-q"])
    print(f"{time.perf_counter() - start:.0f} s")
    raise SystemExit(code)
