"""A plain two-dimensional Fourier neural operator (Li et al., ICLR 2021, arXiv 2010.08895)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@lru_cache(maxsize=8)
def fourier_basis(nx: int, ny: int, modes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Real DFT of the lowest modes and its inverse, float64: (nx ny, 2 modes), (2 modes, nx ny).

    Wave numbers -modes_x/2 .. modes_x/2 - 1 along x and 0 .. modes_y - 1 along y; the columns are
    the real and imaginary part of each mode. With so few modes a product beats the FFT.
    """
    kx, ky = torch.cartesian_prod(torch.arange(modes[0]) - modes[0] // 2, torch.arange(modes[1])).T
    x, y = torch.cartesian_prod(torch.arange(nx), torch.arange(ny)).double().T[..., None]
    angle = 2 * math.pi * (x * kx / nx + y * ky / ny)
    basis = torch.stack([angle.cos(), -angle.sin()], dim=-1)
    # A real field's modes at -ky are the conjugates of those at ky, so that these count twice.
    twice = torch.where(ky == 0, 1.0, 2.0)[:, None]
    return basis.flatten(1) / (nx * ny), (basis * twice).flatten(1).T


class SpectralConv2d(nn.Module):
    """A complex linear map of the channels for each of the lowest Fourier modes."""

    def __init__(self, width: int, modes: tuple[int, int]) -> None:
        super().__init__()
        # The original initialisation: real and imaginary parts uniform in [0, 1) / width^2.
        self.weight = nn.Parameter(torch.rand(width, width, *modes, dtype=torch.cfloat) / width**2)

    def forward(self, field: Tensor) -> Tensor:  # (batch, width, x, y)
        modes = self.weight.shape[2:]
        analysis, synthesis = (b.to(field) for b in fourier_basis(*field.shape[2:], tuple(modes)))
        low = torch.view_as_complex((field.flatten(2) @ analysis).unflatten(2, (*modes, 2)))
        low = torch.einsum("bixy,ioxy->boxy", low, self.weight)
        return (torch.view_as_real(low).flatten(2) @ synthesis).view_as(field)


class FNO2d(nn.Module):
    """Operator from a coefficient field a(x, y) to a solution u(x, y), on a grid of any size."""

    def __init__(self, width: int = 24, modes: tuple[int, int] = (6, 4), depth: int = 4) -> None:
        super().__init__()
        self.lift = nn.Conv2d(3, width, 1)
        self.spectral = nn.ModuleList(SpectralConv2d(width, modes) for _ in range(depth))
        self.conv = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(depth))
        self.project = nn.Conv2d(width, width, 1)
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, a: Tensor) -> Tensor:  # (batch, x, y) -> (batch, x, y)
        axes = [torch.linspace(0, 1, n, device=a.device, dtype=a.dtype) for n in a.shape[1:]]
        x, y = torch.meshgrid(*axes, indexing="ij")
        field = self.lift(torch.stack([a, x.expand_as(a), y.expand_as(a)], dim=1))
        for depth, (spectral, conv) in enumerate(zip(self.spectral, self.conv, strict=True)):
            field = spectral(field) + conv(field)
            if depth + 1 < len(self.conv):
                field = F.gelu(field)
        return self.out(F.gelu(self.project(field))).squeeze(1)
