"""The module with the CUDA kernels, where this installation has one: it needs no GPU to load."""

import subprocess
import sys
from pathlib import Path

import pytest

import tbfast
from tbfast.backends import has_cuda_kernels

if not has_cuda_kernels():
    pytest.skip("no CUDA kernels here: 'make wheel-cuda' tests them", allow_module_level=True)

from tbfast import _cuda


def test_the_kernels_come_from_the_package_that_is_tested():
    assert Path(_cuda.__file__).parent == Path(tbfast.__file__).parent


def test_there_is_code_for_every_generation_and_ptx_for_those_to_come():
    targets = _cuda.targets().split()
    assert {"sm_80", "sm_90", "sm_100", "sm_120", "compute_90"} <= set(targets)
    major = int(_cuda.cuda_version().partition(".")[0])
    assert major >= 12


def test_the_module_names_no_library_of_torch_or_cuda():
    binary = Path(_cuda.__file__).read_bytes()
    for library in (b"libtorch", b"libc10", b"libcudart.so", b"libcudart-"):
        assert library not in binary, library


def test_the_kernels_load_and_look_for_devices_where_torch_cannot_be_imported(tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None; from tbfast import _cuda; "
        "count, reason = _cuda.device_count(); print(count > 0 or bool(reason))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "True"


def test_a_device_that_is_not_there_is_an_error_in_the_drivers_words():
    with pytest.raises(RuntimeError, match="properties of a device: .+"):
        _cuda.device(1000)
