"""The Triton backend: every verb for all layers at once, on NVIDIA and AMD GPUs.

Kernels work in phases, so that a Lanczos refresh is one cooperative launch where the device has
them; see ``triton_launch``. With ``TRITON_INTERPRET=1``, set before this is imported, the same
kernels run on the CPU, slowly: that is how they are tested.
"""

from __future__ import annotations

from tbfast.backends.exact_gpu import eigenvalues
from tbfast.backends.triton_fit import fit
from tbfast.backends.triton_rsvd import rsvd
from tbfast.backends.triton_slq import quadrature_fit
from tbfast.backends.triton_spectra import gram_apply, lanczos
from tbfast.backends.triton_sums import dot, drift

__all__ = ["dot", "drift", "eigenvalues", "fit", "gram_apply", "lanczos", "quadrature_fit", "rsvd"]
