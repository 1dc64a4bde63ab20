"""What each kind of GPU has room for, and how many blocks of a kernel fit.

Source: CUDA C++ Programming Guide 13.0, "Technical Specifications per Compute Capability"; the
granularities are those of NVIDIA's occupancy calculator.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_REGISTERS = 128  # at 256 threads: two blocks of a kernel on a multiprocessor, 16 warps
_KIB = 1024
_LANES = 32
_REGISTER_UNIT = 256  # registers that a warp is given at a time
_SHARED_UNIT = 128
_RESERVED = 1024  # bytes of shared memory that the system takes from every block
_PARTS = 4  # of a multiprocessor, among which its registers and its warps are divided


@dataclass(frozen=True)
class Architecture:
    """Limits of a multiprocessor, and what one block may ask for.

    Attributes:
        shared_per_block: Bytes.
        shared: Bytes that all blocks of a multiprocessor share.
        warps: Most of them at a time.
        blocks: Likewise.
        registers: Of 32 bits.
    """

    shared_per_block: int
    shared: int
    warps: int
    blocks: int
    registers: int = 65536


ARCHITECTURES = {
    80: Architecture(163 * _KIB, 164 * _KIB, 64, 32),
    90: Architecture(227 * _KIB, 228 * _KIB, 64, 32),
    100: Architecture(227 * _KIB, 228 * _KIB, 64, 32),
    120: Architecture(99 * _KIB, 100 * _KIB, 48, 24),
}


def resident_blocks(target: int, threads: int, registers: int, shared: int) -> int:
    """Blocks of a kernel that a multiprocessor holds at once; 0 if not even one fits.

    Args:
        target: Compute capability, 90 for 9.0.
        threads: Of a block.
        registers: Of a thread.
        shared: Bytes of a block, static and dynamic together.
    """
    limits = ARCHITECTURES[target]
    if shared > limits.shared_per_block:
        return 0
    warps = -(-threads // _LANES)
    of_a_warp = _rounded(max(registers, 1) * _LANES, _REGISTER_UNIT)
    by_registers = limits.registers // _PARTS // of_a_warp * _PARTS // warps
    by_shared = limits.shared // _rounded(shared + _RESERVED, _SHARED_UNIT)
    return min(limits.warps // warps, limits.blocks, by_registers, by_shared)


def occupancy(target: int, threads: int, registers: int, shared: int) -> float:
    """Share of the warps of a multiprocessor that the resident blocks make up."""
    blocks = resident_blocks(target, threads, registers, shared)
    return blocks * -(-threads // _LANES) / ARCHITECTURES[target].warps


def broken_budgets(
    target: int, threads: int, registers: int, spills: int, shared: int
) -> list[str]:
    """What a kernel takes too much of, in words; nothing if all is well.

    Args:
        target: Compute capability, 90 for 9.0.
        threads: Of a block.
        registers: Of a thread.
        spills: Bytes of registers that are stored to memory and loaded again.
        shared: Bytes of a block.
    """
    found = []
    if spills > 0:
        found.append(f"spills {spills} bytes")
    # The same number of registers on a multiprocessor whatever the block. More cost nothing where
    # shared memory leaves room for no other block.
    within = resident_blocks(target, threads, MAX_REGISTERS * 256 // threads, shared)
    if registers * threads > MAX_REGISTERS * 256 and (
        resident_blocks(target, threads, registers, shared) < within
    ):
        found.append(f"{registers} registers at {threads} threads, {MAX_REGISTERS} at 256 allowed")
    limit = ARCHITECTURES[target].shared_per_block
    if shared > limit:
        found.append(f"{shared} bytes of shared memory, sm_{target} has {limit}")
    elif not found and resident_blocks(target, threads, registers, shared) == 0:
        found.append("not one block fits")
    return found


def _rounded(value: int, unit: int) -> int:
    return -(-value // unit) * unit
