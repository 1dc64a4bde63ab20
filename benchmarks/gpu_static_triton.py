"""What the Triton kernels become on real GPUs, found by compiling them here, without a GPU.

One row for each kernel and target: registers, spills, shared memory, and what the generated code
reads and multiplies with. Compiled offline; nothing is run.

Every launch is one program of eight warps for each processor, whose registers and warps it has to
itself: 255 of the 256 registers that there are for each thread cost no second program. What keeps
the memory busy is not the number of warps but the loads that each has under way.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tbfast.backends import (
    triton_fit,
    triton_launch,
    triton_slq,
    triton_spectra,
    triton_sums,
)
from tbfast.backends.triton_fit_kernels import fit_phases
from tbfast.backends.triton_lanczos import spectral_phases
from tbfast.backends.triton_quadrature_kernels import quadrature_phases, sketch_errors
from tbfast.backends.triton_rsvd import draw_signs
from tbfast.backends.triton_sums import sum_phases
from tbfast.fitting import FIT_KINDS

TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# Shared memory that one program may use, bytes.
SHARED_LIMIT = {
    "sm_80": 163 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}

# Registers of one program, of 32 bits: a processor of NVIDIA has 64 Ki of them, one of AMD 128 Ki.
REGISTER_LIMIT = dict.fromkeys(TARGETS, 64 << 10) | {"gfx942": 128 << 10}

_WIDE_LOAD = {
    "cuda": r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|cp\.async\S*[^;]*, (?:0x10|16)\b",
    "hip": r"(?:global|buffer)_load_dwordx4",
}
_TENSOR_CORE = {"cuda": r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", "hip": r"\bv_mfma"}
_LOAD = {"cuda": r"ld\.global|cp\.async\S*\s*\[", "hip": r"(?:global|buffer)_load"}
_STORE = {"cuda": r"st\.global", "hip": r"(?:global|buffer)_store"}


@dataclass(frozen=True)
class Kernel:
    """A kernel as a launch on a GPU would choose it.

    Attributes:
        name: Of the row in the table.
        function: The kernel.
        pointers: Types of its pointers, by name; other arguments are int32.
        constants: What is compiled in; None stands for an argument that is not there.
        reads_weights: Whether it reads all weights, by 16 bytes where they lie together.
        multiplies: Whether it uses tensor cores.
        spills: Bytes that a thread may keep in memory, stores and loads, by target; none in a loop
            over weights.
    """

    name: str
    function: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    reads_weights: bool = False
    multiplies: bool = False
    spills: dict[str, int] = field(default_factory=dict)

    def types(self) -> dict[str, str]:
        """Type of each argument, as the compiler wants it."""
        wanted = dict.fromkeys(self.function.arg_names, "i32")
        wanted |= {"seed_low": "i64", "seed_high": "i64", "counter": "*i32"}
        wanted |= self.pointers | dict.fromkeys(self.constants, "constexpr")
        return {name: wanted[name] for name in self.function.arg_names}


def _named(kinds: dict[str, str]) -> dict[str, str]:
    return {name: kind for kind, names in kinds.items() for name in names.split()}


_SPECTRAL = _named(
    {
        "*i64": "table items",
        "*i32": "going exponents flagged taken",
        "*fp32": "vectors given out",
        "*fp64": "tops state products diagonal off_diagonal",
    }
)
_QUADRATURE = _named(
    {
        "*i64": "first layer_of counts grid_points limits row_sizes row_starts blocks",
        "*i32": "sizes points",
        "*fp64": "diagonal off_diagonal scales eps nodes weights x mass totals tops grid "
        "probe_masses means values room",
    }
)
_FIT = _named(
    {
        "*i64": "starts sizes blocks first_block",
        "*fp64": "values options logs excess best results",
    }
)
_SUMS = _named({"*i64": "items firsts", "*fp32": "scales", "*fp64": "partial out"})
_ERRORS = _named({"*i64": "row_starts row_sizes", "*fp64": "fits values choice out"})


def kernels(platform: str) -> list[Kernel]:
    """All kernels as they are launched on ``"cuda"`` or ``"hip"``."""
    spectral = triton_spectra.TILES | {"INTERPRETED": False}
    absent = {"out": None, "given": None}
    slq = triton_slq.TILES | {"SB": 32, "HALVINGS": 7}
    fits = [
        Kernel(f"fit {kind}", fit_phases, _FIT, {"KIND": place, "BINS": 128, **triton_fit.TILES})
        for place, kind in enumerate(FIT_KINDS)
    ]
    return [
        Kernel(
            "lanczos",
            spectral_phases,
            _SPECTRAL,
            {**spectral, **absent, "GROUP": triton_spectra.GROUPS[platform]},
            reads_weights=True,
            multiplies=True,
            spills={"sm_80": 16},  # an address of the outer loop
        ),
        Kernel("dot", sum_phases, _SUMS | {"others": "*i8"}, triton_sums.TILES, reads_weights=True),
        Kernel(
            "drift",
            sum_phases,
            _SUMS | {"others": "*fp32"},
            {**triton_sums.TILES, "scales": None},
            reads_weights=True,
        ),
        Kernel("quadrature", quadrature_phases, _QUADRATURE, slq),
        *fits,
        Kernel("sketch errors", sketch_errors, _ERRORS, {"PB": 8, "C": triton_slq.CHUNK}),
        Kernel("signs", draw_signs, {"out": "*i8"}, {"BR": 128}),
    ]


def compiled(kernel: Kernel, target: str) -> Any:
    """The kernel compiled for a target, which need not be here."""
    signature = kernel.types()
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.function.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(
        fn=kernel.function, signature=signature, constexprs=kernel.constants, attrs=attributes
    )
    options = triton_launch.compile_options(TARGETS[target].backend)
    return triton.compile(source, target=TARGETS[target], options=options)


def static_row(kernel: Kernel, target: str) -> dict[str, Any]:
    """One row of the table, with what is wrong with it in words under ``faults``."""
    made = compiled(kernel, target)
    backend = TARGETS[target]
    nvidia = backend.backend == "cuda"
    code = made.asm["ptx"] if nvidia else made.asm["amdgcn"]
    registers, spilled, scalars = _ptx_figures(code, target) if nvidia else _gcn_figures(code)
    row = {
        "kernel": kernel.name,
        "target": target,
        "threads": made.metadata.num_warps * backend.warp_size,
        "registers": registers,
        "spill_bytes": spilled,
        "scalar_spills": scalars,
        "shared_bytes": made.metadata.shared,
        "loads": _count(_LOAD[backend.backend], code),
        "ld128": _count(_WIDE_LOAD[backend.backend], code),
        "stores": _count(_STORE[backend.backend], code),
        "tensor_core": _count(_TENSOR_CORE[backend.backend], code),
    }
    return row | {"faults": faults(kernel, row)}


def faults(kernel: Kernel, row: dict[str, Any]) -> list[str]:
    """What is wrong with a row."""
    found = []
    target, spilled = row["target"], row["spill_bytes"] - kernel.spills.get(row["target"], 0)
    if spilled > 0:
        found.append(f"spills {spilled} bytes")
    if row["registers"] * row["threads"] > REGISTER_LIMIT[target]:
        found.append(f"{row['registers']} registers at {row['threads']} threads")
    if row["shared_bytes"] > SHARED_LIMIT[target]:
        found.append(f"{row['shared_bytes']} bytes of shared memory")
    if kernel.reads_weights and row["ld128"] == 0:
        found.append("no load of 16 bytes")
    if kernel.multiplies and row["tensor_core"] == 0:
        found.append("no product on tensor cores")
    return found


def triton_static_rows(targets: Sequence[str] = tuple(TARGETS)) -> Iterator[dict[str, Any]]:
    """Rows of all kernels for the given targets."""
    for target in targets:
        for kernel in kernels(TARGETS[target].backend):
            yield static_row(kernel, target)


def _count(pattern: str, code: str) -> int:
    return len(re.findall(pattern, code))


def _ptx_figures(ptx: str, target: str) -> tuple[int, int, int]:
    """Registers and spilled bytes as ptxas tells them, with the flags that Triton gives it."""
    architecture = int(target.removeprefix("sm_"))
    tool = knobs.nvidia.ptxas if architecture < 90 else knobs.nvidia.ptxas_blackwell
    name = target + ("a" if architecture >= 90 else "")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        log = subprocess.run(
            [tool.path, "-v", "--regAllocOptLevel=2", f"--gpu-name={name}", str(source), "-o",
             str(source.with_suffix(".cubin"))],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log)))
    found = re.search(r"Used (\d+) registers", log)
    assert found is not None, log
    return int(found[1]), spilled, 0


def _gcn_figures(assembly: str) -> tuple[int, int, int]:
    """Vector registers, bytes of them spilled to memory, and scalars kept in vector registers."""

    def of(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", assembly)
        assert found is not None, key
        return int(found[1])

    return of("vgpr_count"), 4 * of("vgpr_spill_count"), of("sgpr_spill_count")


if __name__ == "__main__":
    for row in triton_static_rows():
        print(*(f"{key}={value}" for key, value in row.items()))
