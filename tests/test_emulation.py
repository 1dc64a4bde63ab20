"""The emulator that runs CUDA kernels on the CPU: it does as CUDA does, and it finds faults."""

import re
import subprocess

import numpy as np
import pytest
import torch

# Under ThreadSanitizer a program ends with the number it would have without; the reports tell.
ENVIRONMENT = {"TSAN_OPTIONS": "exitcode=0", "ASAN_OPTIONS": "detect_leaks=0"}

# Faults that the scheduler names, in any order of the threads.
NAMED = {
    "divergent_barrier": "divergent barrier: .* is at .*:\\d+, .* at .*:\\d+",
    "returned_before_barrier": r"divergent barrier: block \d thread \(40,0,0\) has returned",
    "divergent_warp": "divergent warp: ",
    "deadlock": r"deadlock: .*\(3,0,0\) at a warp operation",
    "livelock": "livelock: ",
    "stack_overflow": "stack overflow, ",
    "misaligned_copy": "cp.async of an address that is not a multiple of 16",
}
# Faults that make results wrong: what is read has not been written yet, or is NaN.
WRONG = {
    "missing_barrier": "wrong",
    "missing_second_barrier": "wrong|divergent barrier",
    "missing_warp_barrier": "wrong",
    "missing_grid_barrier": "wrong",
    "missing_copy_wait": "wrong",
    "unwritten_shared": "wrong",
}
RACES = ("missing_barrier", "missing_second_barrier", "missing_warp_barrier")
RACES += ("missing_grid_barrier", "missing_fence")
OVERRUNS = ("static_shared_overrun", "dynamic_shared_overrun", "global_overrun")
# static arrays have bounds that UndefinedBehaviorSanitizer knows, and it comes first
OVERRUN = "AddressSanitizer: heap-buffer-overflow|runtime error: index 64 out of bounds"

# of kernels_test.cpp, which is small and has few blocks: ThreadSanitizer knows 8000 threads
KERNELS = "spectral_product", "spectral_alpha", "fit", "quadrature", "rsvd", "dot", "drift"


def output_of(program, *arguments, given=b""):
    command = [program, *map(str, arguments)]
    done = subprocess.run(
        command, input=given, capture_output=True, timeout=300, env=ENVIRONMENT, check=False
    )
    return done.stdout, done.stderr.decode()


def outcomes(program, kind, name, seeds):
    """One line for each seed; then what a sanitizer has to say."""
    out, reports = output_of(program, kind, name, seeds[0], seeds[-1])
    return out.decode().splitlines(), reports


@pytest.fixture(scope="module")
def self_test(emulation):
    return emulation.build_program("self_test", "plain")


@pytest.fixture(scope="module")
def asan(emulation):
    return emulation.build_program("self_test", "asan")


@pytest.fixture(scope="module")
def tsan(emulation):
    return emulation.build_program("self_test", "tsan")


@pytest.mark.parametrize("what", ["intrinsics", "fragments"])
def test_words_of_cuda_do_what_the_manual_says(self_test, what):
    assert output_of(self_test, what) == (b"right\n", "")


def test_numbers_of_two_bytes_are_those_of_numpy_and_torch(self_test):
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = np.frombuffer(output_of(self_test, "widen")[0], np.float32).reshape(-1, 2)
    half, brain = bits.view(np.float16), torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    np.testing.assert_array_equal(wide[:, 0], half.astype(np.float32))
    np.testing.assert_array_equal(wide[:, 1], brain.float().numpy())

    # random bits; between neighbours of either kind; the edge of the range of halves
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 1 << 32, 20000, dtype=np.uint32)
    finite = np.sort(half[np.isfinite(half)].astype(np.float32))
    edges = np.float32([65519.99, 65520, -0.0])
    floats = [patterns.view(np.float32), (patterns & 0xFFFF0000 | 0x8000).view(np.float32)]
    given = np.concatenate([*floats, (finite[1:] + finite[:-1]) / 2, edges])
    found = np.frombuffer(output_of(self_test, "round", given=given.tobytes())[0], np.uint16)
    found = found.reshape(-1, 2)
    number = ~np.isnan(given)
    with np.errstate(over="ignore"):
        expected = given.astype(np.float16)
    np.testing.assert_array_equal(found[number, 0], expected[number].view(np.uint16))
    assert np.isnan(found[~number, 0].view(np.float16)).all()
    expected = torch.from_numpy(given).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(found[number, 1], expected[number])
    assert (found[~number, 1] & 0x7FFF > 0x7F80).all()


@pytest.mark.parametrize("name", [*NAMED, *WRONG, *OVERRUNS, "missing_fence"])
def test_a_kernel_without_the_fault_is_right_in_any_order(self_test, name):
    assert outcomes(self_test, "sound", name, range(21)) == (["right"] * 21, "")


@pytest.mark.parametrize("name", NAMED)
def test_the_fault_is_named_in_any_order(self_test, name):
    found, _ = outcomes(self_test, "faulty", name, range(11))
    assert len(found) == 11
    assert all(re.match(NAMED[name], line) for line in found), found


@pytest.mark.parametrize("name", WRONG)
def test_the_fault_shows_in_10_of_10_random_orders(self_test, name):
    found, _ = outcomes(self_test, "faulty", name, range(1, 11))
    assert len(found) == 10
    assert all(re.match(WRONG[name], line) for line in found), found


@pytest.mark.parametrize("name", OVERRUNS)
def test_the_address_sanitizer_finds_the_overrun(asan, name):
    found, reports = outcomes(asan, "faulty", name, [0])
    assert found == []
    assert re.search(OVERRUN, reports), reports
    assert outcomes(asan, "sound", name, range(3)) == (["right"] * 3, "")


@pytest.mark.parametrize("name", RACES)
def test_the_thread_sanitizer_finds_the_race_in_any_order(tsan, name):
    for seed in (0, 1):
        found, reports = outcomes(tsan, "faulty", name, [seed])
        assert len(found) == 1
        assert "ThreadSanitizer: data race" in reports
    assert outcomes(tsan, "sound", name, range(3)) == (["right"] * 3, "")


@pytest.mark.parametrize("kind", ["asan", "tsan"])
def test_the_sanitizers_find_nothing_in_any_kernel(emulation, kind):
    program = emulation.build_program("kernels_test", kind)
    assert output_of(program, "names")[0].decode().split() == sorted(KERNELS)
    for name in KERNELS:
        for seed in (0, 1) if kind == "asan" else (1,):  # races show in any order
            assert output_of(program, name, seed) == (b"right\n", ""), name
