"""What users call, on the GPU backends: they are reached, and tell what the CPU's tell."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import tbfast
from tbfast import spectra
from tbfast.anchors import take_anchors
from tbfast.backends import engine_for, native
from tbfast.batch import Batch
from tbfast.fitting import FitOptions

# Sums in float32 over the same probes, from which alpha is fitted.
ALPHA_TOLERANCE = 1e-4


@pytest.fixture(params=["cuda", "triton"])
def name(request):
    """A GPU backend that reads CPU memory: on the emulator, or in Triton's interpreter."""
    if request.param == "cuda":
        request.getfixturevalue("cuda")
    else:
        pytest.importorskip("triton")
    return request.param


def matrices():
    generator = torch.Generator().manual_seed(3)
    shapes = [(96, 40), (33, 70)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("method", ["exact", "sketch"])
def test_measurements_are_those_of_native(name, method):
    weights, kinds, options = matrices(), ["linear", "linear"], FitOptions("median")
    found, expected = (
        spectra.measure(weights, kinds, options, names=["a", "b"], method=method, backend=backend)
        for backend in (name, "native")
    )
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.method == theirs.method == method
        assert mine.n_eigs == theirs.n_eigs
        assert mine.fit.alpha == pytest.approx(theirs.fit.alpha, rel=ALPHA_TOLERANCE)
        assert mine.max_eigenvalue == pytest.approx(theirs.max_eigenvalue, rel=1e-5)
        assert mine.sum_eigenvalues == pytest.approx(theirs.sum_eigenvalues, rel=1e-5)


def test_eigenvalues_and_factors_are_those_of_native(name):
    weights = matrices()
    for found, expected in zip(
        tbfast.eigenvalues(weights, backend=name), tbfast.eigenvalues(weights), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for found, expected in zip(
        tbfast.rsvd(weights, 5, backend=name), tbfast.rsvd(weights, 5), strict=True
    ):
        torch.testing.assert_close(found.S, expected.S, rtol=1e-5, atol=0)


def test_anchors_follow_a_moving_weight_as_on_the_cpu(name):
    weights = {str(row): weight for row, weight in enumerate(matrices())}
    moved = {key: weight + 0.01 * weight.flip(0) for key, weight in weights.items()}
    batch, later = Batch(weights), Batch(moved)
    options = dict(gradient=True, probes=4, backend=name)
    anchors, expected = (
        take_anchors(batch, FitOptions("median"), **options | more)
        for more in ({}, {"backend": "native"})
    )
    for verb in ("stale", "lin", "aligned"):
        found, theirs = (getattr(a, verb)(later) for a in (anchors, expected))
        np.testing.assert_allclose(found.alpha, theirs.alpha, rtol=ALPHA_TOLERANCE)


def test_training_takes_the_rates_of_native(name):
    def trained(backend):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 32), nn.Linear(32, 8))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        options = dict(method="sketch", probes=4, steps=8, every=1, min_eigs=2, backend=backend)
        balancer = tbfast.attach(optimizer, model, skip_first=False, skip_last=False, **options)
        for _ in range(2):
            model(torch.randn(16, 24)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return dict(balancer.alphas)

    found, expected = trained(name), trained("native")
    assert found.keys() == expected.keys()
    for layer, alpha in expected.items():
        assert found[layer] == pytest.approx(alpha, rel=ALPHA_TOLERANCE)


def test_layers_are_measured_where_they_are(monkeypatch):
    # A device that is not here stands for a GPU; its engine only counts.
    seen = []

    def engine(backend, device):
        if device.type == "cpu":
            return native, device

        def fake(stacks, shares):
            sides = [min(stack.shape[1:]) for stack in stacks]
            return [torch.arange(1.0, 1 + side, dtype=torch.float64) for side in sides]

        seen.append((backend, device.type))
        return SimpleNamespace(eigenvalues=fake), device

    monkeypatch.setattr(spectra, "engine_for", engine)
    weights = [torch.eye(5), torch.empty(7, 9, device="meta"), torch.eye(3)]
    found = spectra.measure(weights, ["linear"] * 3, FitOptions("median"), method="exact")
    assert [m.n_eigs for m in found] == [5, 7, 3]
    assert [m.max_eigenvalue for m in found] == [1, 7, 1]
    assert seen == [("auto", "meta")]


@pytest.mark.parametrize(
    ("backend", "place"), [("native", "cpu"), ("reference", "cpu"), ("triton", "cuda")]
)
def test_an_engine_says_where_it_reads(backend, place):
    if backend == "triton":
        pytest.importorskip("triton")
    module, where = engine_for(backend, torch.device("cuda", 1))
    assert module.__name__ == f"tbfast.backends.{backend}"
    assert where.type == place
