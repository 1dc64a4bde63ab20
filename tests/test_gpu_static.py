"""The static check of the GPU kernels: what it reads, what it computes, and what it refuses."""

import csv
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def listings():
    return _module("gpu_listings")


@pytest.fixture(scope="module")
def limits():
    return _module("gpu_occupancy")


@pytest.fixture
def static(monkeypatch, tmp_path):
    """The script, with its cache and its results in the test's folder and no rows of Triton."""
    module = _module("gpu_static")
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "gpu_static_triton", triton_module())
    return module


def triton_module(*rows):
    """The script for Triton, with these rows."""
    return SimpleNamespace(triton_static_rows=lambda: rows)


def triton_row(**more):
    found = dict(kernel="k", target="sm_90", threads=128, registers=160, spill_bytes=0)
    found |= dict(shared_bytes=41984, loads=9, ld128=8, stores=3, tensor_core=16, faults=[])
    return found | more


def _module(name):
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


# Output of nvcc 13.0 -Xptxas -v, cut: a function that was not inlined, spills, a number.
LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z22dynamic_shared_of_stepILx8000EEvv' for 'sm_90'
ptxas info    : Function properties for _Z22dynamic_shared_of_stepILx8000EEvv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 4 registers, used 0 barriers
ptxas info    : Compiling entry function '_ZN2tb3gpu12_GLOBAL__N_14stepENS0_4ArgsE' for 'sm_90'
ptxas info    : Function properties for _ZN2tb3gpu12_GLOBAL__N_14stepENS0_4ArgsE
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Function properties for _ZN2tb3gpu6helperEi
    24 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 77 registers, used 1 barriers, 40 bytes cumulative stack size, 2048 bytes smem
ptxas info    : Compile time = 5.999 ms
ptxas info    : Compiling entry function '_Z5otherILi8EEvPf' for 'sm_90'
ptxas info    : Function properties for _Z5otherILi8EEvPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 18 registers, used 0 barriers
"""

# cuobjdump 13.0 -sass, cut likewise.
SASS = """\
	code for sm_90
		Function : _ZN2tb3gpu12_GLOBAL__N_14stepENS0_4ArgsE
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;              /* 0x00000a00ff017b82 */
                                                                       /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;  /* 0x000000040d0278 */
        /*0020*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;    /* 0x000000040d0278 */
        /*0030*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64] ;  /* 0x000000040d */
        /*0040*/             @!UP1 HMMA.16816.F32.BF16 R4, R4, R6, R8 ;  /* 0x000000040d0278 */
        /*0050*/               @P1 FFMA R4, R4, R6, R8 ;               /* 0x000000040d0278 */
        /*0060*/                   FFMA2 R4, R4, R6, R8 ;              /* 0x000000040d0278 */
        /*0070*/                   DFMA R4, R4, R6, R8 ;               /* 0x000000040d0278 */
        /*0080*/                   DMMA.8x8x4 R4, R4, R6, R8 ;         /* 0x000000040d0278 */
        /*0090*/                   LDSM.16.M88.4 R4, [R9] ;            /* 0x000000040d0278 */
        /*00a0*/                   STS.128 [R9], R4 ;                  /* 0x000000040d0278 */
        /*00b0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;       /* 0x000000040d0278 */
        /*00c0*/                   IMAD.WIDE.U32 R2, R13, 0x4, R2 ;    /* 0x000000040d0278 */
        /*00d0*/                   NOP;                                /* 0x0000000000007918 */
		..........
		Function : _Z22dynamic_shared_of_stepILx8000EEvv
        /*0000*/                   EXIT ;                              /* 0x000000000000794d */
"""


def test_the_compilers_log_gives_every_kernel_with_what_it_takes(listings):
    step, other = listings.resources(LOG)
    assert (step.kernel, step.registers, step.shared_static) == ("step", 77, 2048)
    # Those of the function that was not inlined are the kernel's.
    assert (step.spills, step.stack) == (8 + 12 + 4 + 4, 16 + 24)
    assert step.shared_dynamic == 8000
    assert (other.kernel, other.registers, other.spills) == ("other<Li8E>", 18, 0)
    assert other.shared_dynamic is None


def test_an_empty_log_has_no_kernels(listings):
    assert listings.resources("ptxas info    : 0 bytes gmem\n") == []


def test_every_instruction_is_counted_in_one_class_and_padding_in_none(listings):
    mixes = listings.instruction_mix(SASS)
    assert list(mixes) == ["step"]
    assert mixes["step"] == dict(
        ffma=2, dfma=1, mma=2, lds=1, ldgsts=1, ldg=2, sts=1, bar=1, other=2, ld128=2
    )


LOOPS = """
	code for sm_90
		Function : _ZN2tb3gpu4stepEv
        /*0000*/                   LDL R1, [R1] ;                      /* 0x00000a00ff017b82 */
        /*0010*/                   LDL R2, [R1+0x8] ;                  /* 0x000000040d0278 */
        /*0020*/                   STL [R1], R4 ;                      /* 0x000000040d0278 */
{work}
        /*00b0*/              @!P0 BRA 0x20 ;                          /* 0x000000040d0278 */
        /*00c0*/                   LDL R4, [R1] ;                      /* 0x000000040d0278 */
        /*00d0*/               @P1 BRA 0x10 ;                          /* 0x000000040d0278 */
        /*00e0*/                   LDL R4, [R1] ;                      /* 0x000000040d0278 */
        /*00f0*/               @P1 BRA 0xe0 ;                          /* 0x000000040d0278 */
        /*0100*/                   EXIT ;                              /* 0x000000040d0278 */
        /*0110*/                   BRA 0x110 ;                         /* 0x000000040d0278 */
"""


@pytest.mark.parametrize(
    ("many", "last", "count"), [(8, "FADD", 1), (7, "FADD", 0), (8, "CALL.REL.NOINC", 0)]
)
def test_spills_count_in_the_innermost_loops_that_multiply(listings, many, last, count):
    # In order: before the loops, in the outer one, in the inner one, in the outer one again, and in
    # a loop that only waits.
    line = "        /*{:04x}*/                   FFMA R4, R4, R6, R8 ;  /* 0x0000 */"
    work = [line.format(0x30 + 16 * i) for i in range(many)]
    work = "\n".join([*work, f"        /*00a8*/              {last} R4, 0x300 ;  /* 0x0000 */"])
    assert listings.spills_in_loops(LOOPS.format(work=work)) == {"step": count}


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        ("_Z4stepPf", "step"),
        ("_ZN2tb3gpu4stepENS0_4ArgsE", "step"),
        ("_ZN2tb3gpu4stepILi8EEEvPf", "step<Li8E>"),
        ("plain_c", "plain_c"),
    ],
)
def test_mangled_names_are_read_without_help(listings, mangled, name):
    assert listings.kernel_name(mangled) == name


@pytest.mark.parametrize(
    ("target", "registers", "shared", "blocks"),
    [
        # From NVIDIA's occupancy calculator, for blocks of 256 threads.
        (90, 32, 0, 8),
        (90, 64, 0, 4),
        (90, 65, 0, 3),  # registers are given in units of 256 to a warp
        (90, 128, 0, 2),
        (90, 129, 0, 1),
        (90, 255, 0, 1),
        (120, 32, 0, 6),  # 48 warps
        (80, 64, 81 * 1024, 2),  # with the 1 KiB that the system takes: 164 KiB
        (80, 64, 81 * 1024 + 1, 1),
        (90, 64, 227 * 1024, 1),
        (90, 64, 227 * 1024 + 1, 0),
    ],
)
def test_resident_blocks_are_those_of_nvidias_calculator(limits, target, registers, shared, blocks):
    assert limits.resident_blocks(target, 256, registers, shared) == blocks


def test_occupancy_is_a_share_of_the_warps(limits):
    assert limits.occupancy(90, 256, 64, 0) == 4 * 8 / 64
    assert limits.occupancy(120, 256, 32, 0) == 1


@pytest.mark.parametrize(
    ("target", "kib"), [(80, 163), (90, 227), (100, 227), (120, 99)], ids=lambda v: str(v)
)
def test_shared_memory_of_the_architecture_is_a_budget(limits, target, kib):
    assert limits.broken_budgets(target, 256, 64, 0, kib * 1024) == []
    (fault,) = limits.broken_budgets(target, 256, 64, 0, kib * 1024 + 1)
    assert f"sm_{target} has {kib * 1024}" in fault


def test_registers_and_spills_are_budgets(limits):
    assert limits.broken_budgets(90, 256, 128, 0, 0) == []
    assert limits.broken_budgets(90, 128, 255, 0, 0) == []  # as many on a multiprocessor
    assert "129 registers at 256" in limits.broken_budgets(90, 256, 129, 0, 0)[0]
    assert limits.broken_budgets(90, 256, 64, 4, 0) == ["spills 4 bytes"]
    # Shared memory leaves room for one block, and that one may have all registers.
    assert limits.broken_budgets(120, 256, 255, 0, 51 * 1024) == []
    assert "129 registers" in limits.broken_budgets(100, 256, 129, 0, 51 * 1024)[0]


def test_an_array_in_a_working_loop_that_lies_in_memory_is_a_fault(static):
    row = dict(kernel="rsvd_step", target="sm_100", threads=256, registers=128)
    row |= dict(shared_static=0, shared_dynamic=0, spills=0)
    assert static.faults([row | dict(spills_in_loops=0)]) == []
    (fault,) = static.faults([row | dict(spills_in_loops=2)])
    assert fault == "rsvd_step on sm_100: 2 spills in innermost loops"


def test_a_kernel_that_the_script_does_not_know_is_a_fault(static, listings):
    rows = [static.row(kernel, 90) for kernel in listings.resources(LOG)]
    spilling, unknown = static.faults(rows)
    assert spilling == "step on sm_90: spills 28 bytes"
    assert unknown.startswith("other<Li8E> on sm_90: unknown; say in KERNELS")


def test_every_kernel_of_the_sources_is_known_to_the_script(static):
    found = {k for s in (static.SOURCES / "cuda").glob("*.cu") for k in static.kernels_of(s)}
    assert found == set(static.KERNELS)


def test_without_nvcc_the_script_says_so_and_succeeds(static, monkeypatch, capsys):
    monkeypatch.setattr(static, "find_nvcc", lambda: None)
    assert static.main([]) == 0
    assert "skipped, because nvcc was not found" in capsys.readouterr().out


def test_rows_of_triton_are_merged_with_what_is_wrong_with_them(static, monkeypatch):
    found = triton_row(), triton_row(target="gfx942", faults=["spills 4 bytes"])
    monkeypatch.setitem(sys.modules, "gpu_static_triton", triton_module(*found))
    rows, bad, missing = static.triton_rows()
    assert (bad, missing) == (["k (Triton) on gfx942: spills 4 bytes"], None)
    # 160 registers at 128 threads: three blocks of four warps, of 64 warps.
    assert rows[0]["occupancy"] == pytest.approx(12 / 64, abs=6e-4)  # three digits
    assert {key for row in rows for key in row} <= set(static.FIELDS)


def test_without_triton_the_reason_is_given(static, monkeypatch):
    monkeypatch.setitem(sys.modules, "gpu_static_triton", None)
    rows, bad, missing = static.triton_rows()
    assert (rows, bad) == ([], [])
    assert "gpu_static_triton" in missing


SOURCE = """
#include "cuda/device.h"
namespace tb::gpu {
struct Copied { float rows[40][8]; };
__global__ void __launch_bounds__(kThreads) reversed(const float* in, float* out) {
  TB_DYNAMIC_SHARED(float, kept);
  kept[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = kept[kThreads - 1 - threadIdx.x] * in[0] + in[1];
}
}
"""


@pytest.fixture
def sources(static, monkeypatch, tmp_path):
    """A folder with one small kernel, and the real headers."""
    if static.find_nvcc() is None:
        pytest.skip("no nvcc on this machine: nothing is compiled for a GPU")
    folder = tmp_path / "csrc"
    (folder / "cuda").mkdir(parents=True)
    for header in (static.SOURCES / "cuda").glob("*.h"):
        (folder / "cuda" / header.name).symlink_to(header)
    (folder / "cuda/reversed.cu").write_text(SOURCE)
    monkeypatch.setattr(static, "SOURCES", folder)
    monkeypatch.setattr(static, "KERNELS", {"reversed": static.Launch("sizeof(Copied)", 4.0)})
    return folder


def test_a_kernel_is_compiled_read_and_written_down(static, sources, tmp_path, capsys):
    out = tmp_path / "rows.csv"
    assert static.main(["--targets", "90", "--out", str(out)]) == 0
    with out.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["kernel"], row["target"]) == ("reversed", "sm_90")
    assert (row["spills"], row["shared_static"], row["shared_dynamic"]) == ("0", "0", "1280")
    assert 0 < int(row["registers"]) <= 40
    if "cuobjdump was not found" not in capsys.readouterr().out:
        assert (row["ffma"], row["bar"]) == ("1", "1")


def test_what_was_compiled_is_compiled_again_only_after_a_change(static, sources, monkeypatch):
    nvcc, source = static.find_nvcc(), sources / "cuda/reversed.cu"
    before = static.compiled(source, 90, nvcc, None)
    monkeypatch.setattr(static, "run", lambda command: pytest.fail(f"compiled again: {command}"))
    assert static.compiled(source, 90, nvcc, None) == before
    source.write_text(SOURCE + "// changed\n")
    with pytest.raises(pytest.fail.Exception, match="compiled again"):
        static.compiled(source, 90, nvcc, None)


def test_too_much_shared_memory_and_a_broken_source_fail_with_their_reasons(
    static, sources, monkeypatch, tmp_path, capsys
):
    monkeypatch.setitem(static.KERNELS, "reversed", static.Launch("100 * 1024"))
    (sources / "cuda/broken.cu").write_text("__global__ void broken() { nonsense; }")
    out = tmp_path / "rows.csv"
    assert static.main(["--targets", "90", "120", "--out", str(out)]) == 1
    err = capsys.readouterr().err
    assert "reversed on sm_120: 102400 bytes of shared memory, sm_120 has 101376" in err
    assert "reversed on sm_90" not in err
    assert "nonsense" in err
    assert len(out.read_text().splitlines()) == 1 + 2
