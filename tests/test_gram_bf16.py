"""The bfloat16 pass: emulated everywhere, with the real instructions where there are any."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import platform
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tbfast import _native

ENGINES = _native.gram_bf16_engines()
PROBES = 16

# Blocks have 32 rows and columns, panels up to 128 rows or 256 columns: below, at and above each,
# and several panels.
SIZES = [1, 2, 31, 32, 33, 47, 64, 65, 100, 300]
LONG = [(3000, 2), (700, 33), (2, 3000), (33, 700), (520, 40), (40, 520)]
SHAPES = [*itertools.product(SIZES, SIZES), *LONG]

UNIT = 2.0**-9  # largest relative error of rounding to bfloat16
EPS = 2.0**-23

pytestmark = pytest.mark.parametrize("engine", ENGINES)


def to_bf16(x):
    """Bits of the nearest bfloat16, ties to even, by exact integer arithmetic."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def to_float(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(x):
    return to_float(to_bf16(x)).astype(np.float64)


def integers(shape, wide, seed=0):
    """W, x, y of small integers: every sum is below 2^24, so float32 adds them without error."""
    rng = np.random.default_rng([seed, *shape])
    length = shape[0] if wide else shape[1]
    w = rng.integers(-4, 5, shape).astype(np.float32)
    x = rng.integers(-2, 3, (PROBES, length)).astype(np.float32)
    y = rng.integers(-50, 51, (PROBES, length)).astype(np.float32)
    return w, x, y


def gaussians(shape, wide, seed=0):
    rng = np.random.default_rng([seed, *shape])
    w = to_float(to_bf16(rng.standard_normal(shape)))
    x = rng.standard_normal((PROBES, shape[0] if wide else shape[1])).astype(np.float32)
    return w, x


def gram(w, x, wide, between=lambda t: t):
    """Rows of W^T (W x), or W (W^T x), in float64; `between` acts on the inner product."""
    w = w.astype(np.float64).T if wide else w.astype(np.float64)
    return between(x @ w.T) @ w


@pytest.mark.parametrize("wide", [False, True], ids=["tall", "wide"])
def test_integers_give_the_exact_sum_for_every_shape(engine, wide):
    # The inner products exceed 256, where bfloat16 starts to round: exactly as it must.
    for shape in SHAPES:
        w, x, y = integers(shape, wide)
        found = _native.gram_bf16(engine, to_bf16(w), x, y, wide=wide)
        np.testing.assert_array_equal(found, y + gram(w, x, wide, rounded), err_msg=str(shape))


@pytest.mark.parametrize("shape", [(33, 31), (300, 257), (257, 300), (520, 64), (64, 520)])
def test_the_error_is_that_of_rounding_x_and_the_inner_product(engine, shape):
    wide = shape[0] < shape[1]
    w, x = gaussians(shape, wide)
    found = _native.gram_bf16(engine, to_bf16(w), x, np.zeros_like(x), wide=wide)
    # |W^T| |W| |x| (2 u + u^2): both roundings at their worst, everywhere, and of one sign; the
    # float32 sums of both products add at most eps for each of their terms.
    worst = gram(np.abs(w), np.abs(x), wide) * (2 * UNIT + UNIT**2 + sum(shape) * EPS)
    assert np.all(np.abs(found - gram(w, x, wide)) <= worst)
    # With both roundings in the oracle float32 sums remain. One inner product in 2000 lies so near
    # to a tie that they round it the other way, by 2^-8: 2^-8 / sqrt(2000) = 9e-5 of the norm.
    expected = gram(w, rounded(x), wide, rounded)
    assert np.linalg.norm(found - expected) <= 3e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("wide", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 40), (40, 5), (45, 45), (130, 47), (47, 300)])
def test_nothing_around_the_matrix_and_the_vectors_is_used(engine, shape, wide):
    w, x, y = integers(shape, wide)
    around = np.full((shape[0] + 70, shape[1] + 70), 0x7FC0, np.uint16)  # NaN
    inside = around[35:-35, 33:-37]
    inside[:] = to_bf16(w)
    longer_x, longer_y = (np.full((PROBES, v.shape[1] + 21), np.nan, np.float32) for v in (x, y))
    longer_x[:, : x.shape[1]] = x
    longer_y[:, : y.shape[1]] = y
    found = _native.gram_bf16(engine, inside, longer_x, longer_y, wide=wide)
    expected = y + gram(w, x, wide, rounded)
    np.testing.assert_array_equal(found[:, : x.shape[1]], expected)
    assert np.all(np.isnan(found[:, x.shape[1] :]))
    assert np.array_equal(inside, to_bf16(w))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guards pages with mprotect")
@pytest.mark.parametrize("wide", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize("shape", [(1, 1), (33, 20), (20, 33), (65, 47), (47, 65)])
def test_memory_that_follows_the_matrix_need_not_exist(engine, shape, wide):
    w, x, y = integers(shape, wide)
    page, size = mmap.PAGESIZE, 2 * w.size
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + pages * page), page, 0) == 0
    last = np.frombuffer(memory, np.uint16, w.size, pages * page - size).reshape(shape)
    last[:] = to_bf16(w)
    found = _native.gram_bf16(engine, last, x, y, wide=wide)
    np.testing.assert_array_equal(found, y + gram(w, x, wide, rounded))


@pytest.mark.parametrize("shape", [(300, 100), (100, 300)])
def test_slices_of_the_longer_side_add_up_to_the_whole(engine, shape):
    wide = shape[0] < shape[1]
    w, x, y = integers(shape, wide)
    bits, found = to_bf16(w), y
    for part in np.split(np.arange(300), [7, 40, 41, 200]):
        piece = bits[:, part[0] : part[-1] + 1] if wide else bits[part[0] : part[-1] + 1]
        found = _native.gram_bf16(engine, piece, x, found, wide=wide)
    # The inner product of a column or row is the same in whichever slice it is.
    np.testing.assert_array_equal(found, y + gram(w, x, wide, rounded))


@pytest.mark.parametrize("shape", [(200, 70), (70, 200)])
def test_alignment_does_not_change_a_bit(engine, shape):
    wide = shape[0] < shape[1]
    w, x = gaussians(shape, wide)
    expected = _native.gram_bf16(engine, to_bf16(w), x, np.zeros_like(x), wide=wide)
    for offset in (1, 7, 32):
        room = np.zeros((shape[0], shape[1] + offset), np.uint16)
        room[:, offset:] = to_bf16(w)
        found = _native.gram_bf16(engine, room[:, offset:], x, np.zeros_like(x), wide=wide)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("value", [0x7FC0, 0x7F81, 0xFFFF, 0x7F80])
def test_one_bad_weight_spoils_what_depends_on_it(engine, value):
    w, x, _ = integers((70, 50), False)
    x += 3  # no zeros: infinity times zero is NaN, too, but let it be infinity's
    bits = to_bf16(w)
    bits[66, 20] = value
    found = _native.gram_bf16(engine, bits, x, np.zeros_like(x), wide=False)
    assert not np.any(np.isfinite(found[:, 20]))


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7F800000])
def test_a_probe_that_is_not_finite_stays_so(engine, bits):
    w, x, _ = integers((70, 50), False)
    x.view(np.uint32)[3, 45] = bits
    found = _native.gram_bf16(engine, to_bf16(np.abs(w) + 1), x, np.zeros_like(x), wide=False)
    assert not np.any(np.isfinite(found[3]))
    assert np.all(np.isfinite(np.delete(found, 3, axis=0)))


# What the manual says of one step, TDPBF16PS for AMX and VDPBF16PS otherwise.


def multiply(engine, rows, pairs, sums):
    """One step with either operand shared, which must not matter."""
    found = [
        _native.bf16_multiply(engine, to_bf16(rows), to_bf16(pairs), sums, share_rows=share)
        for share in (False, True)
    ]
    np.testing.assert_array_equal(*found)
    return found[0]


def one_sum(engine, even, odd, start=0.0):
    """Sum (0, 0) of products of `even` and `odd` elements, [(a, b), ...]."""
    rows, pairs = np.zeros((16, 32)), np.zeros((16, 32))
    for place, products in ((0, even), (1, odd)):
        for k, (a, b) in enumerate(products):
            rows[0, 2 * k + place], pairs[k, place] = a, b
    sums = np.zeros((16, 16), np.float32)
    sums[0, 0] = start
    return multiply(engine, rows, pairs, sums)[0, 0]


def test_a_step_multiplies_rows_with_interleaved_pairs(engine):
    rng = np.random.default_rng(0)
    rows, pairs = rng.integers(-9, 10, (2, 16, 32)).astype(np.float32)
    sums = rng.integers(-9, 10, (16, 16)).astype(np.float32)
    matrix = pairs.reshape(16, 16, 2).transpose(0, 2, 1).reshape(32, 16)
    np.testing.assert_array_equal(multiply(engine, rows, pairs, sums), sums + rows @ matrix)


def test_a_step_adds_in_the_order_of_the_manual(engine):
    # 2^24 + 1 is a tie that goes to the even 2^24. AMX sums even and odd products apart: 2^24 and
    # 2. Else one sum takes odd and even in turn: 1, then 2^24 and nothing more.
    big, one = (2.0**12, 2.0**12), (1.0, 1.0)
    found = one_sum(engine, [big, one], [one, one])
    assert found == (2.0**24 + 2 if engine.startswith("amx") else 2.0**24)
    # The old sum comes last for AMX: 2^24 + (1 + 1). Else it comes first, and both ones are lost.
    found = one_sum(engine, [one], [one], start=2.0**24)
    assert found == (2.0**24 + 2 if engine.startswith("amx") else 2.0**24)


def test_a_step_rounds_a_product_and_its_sum_once(engine):
    # 2^-143 alone would be flushed to zero.
    found = one_sum(engine, [(2.0**-60, 2.0**-60), (2.0**-71, 2.0**-72)], [])
    assert found == np.float32(2.0**-120 * (1 + 2.0**-23))


def test_a_step_takes_and_gives_no_subnormal_numbers(engine):
    assert one_sum(engine, [(2.0**-130, 2.0**100)], []) == 0
    assert one_sum(engine, [(2.0**-70, 2.0**-70)], []) == 0
    assert one_sum(engine, [(2.0**-120, 2.0**-6)], [], start=2.0**-130) == np.float32(2.0**-126)


def test_a_step_keeps_infinity_and_nan(engine):
    assert one_sum(engine, [(np.inf, 2.0)], [(1.0, 1.0)]) == np.inf
    assert np.isnan(one_sum(engine, [(np.inf, 0.0)], []))
    assert np.isnan(one_sum(engine, [(1.0, 1.0)], [], start=np.nan))


def test_amx_is_used_where_it_is_and_refused_by_name_where_it_is_not(engine, monkeypatch):
    monkeypatch.setenv("TBFAST_ISA", "amx")
    if "amx" in ENGINES:
        assert _native.isa() == "amx"
    else:
        with pytest.raises(ValueError, match="TBFAST_ISA must be one of auto, .*, got 'amx'"):
            _native.isa()


def test_an_engine_that_the_machine_lacks_is_refused_by_name(engine):
    w, x, y = integers((2, 2), False)
    with pytest.raises(ValueError, match=f"engine must be one of .*{engine}.*, got 'mmx'"):
        _native.gram_bf16("mmx", to_bf16(w), x, y, wide=False)


def test_the_extension_holds_the_real_instructions(engine):
    if engine != "amx-emulated-avx512":
        pytest.skip("asked once, where the engine says that they were compiled in")
    if platform.machine() not in ("x86_64", "AMD64") or shutil.which("objdump") is None:
        pytest.skip("needs objdump for x86-64")
    command = ["objdump", "-d", "--no-show-raw-insn", _native.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # How often depends on how far the compiler unrolls.
    assert "tdpbf16ps" in listing
    assert "vdpbf16ps" in listing
