"""Which backend a GPU tensor gets, what a missing one says, and how ``tbfast doctor`` tells it."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch

import tbfast
from tbfast import doctor
from tbfast.backends import choose, get_backend, has_cuda_kernels, native, reference

GPU = torch.device("cuda", 0)


def a_device(name, major, minor):
    found = dict(name=name, major=major, minor=minor, multiprocessors=132)
    return found | dict(shared_per_block=227 << 10, cooperative=True)


def fake_kernels(devices=(), reason=""):
    """A ``tbfast._cuda`` that was built for two targets, on a machine with these devices."""
    module = ModuleType("tbfast._cuda")
    module.__spec__ = importlib.util.spec_from_loader("tbfast._cuda", loader=None)
    module.targets = lambda: "sm_90 compute_90"
    module.cuda_version = lambda: "13.0.88"
    module.device_count = lambda: (len(devices), reason)
    module.device = lambda index: devices[index]
    return module


@pytest.fixture
def kernels(monkeypatch):
    """Puts fake CUDA kernels into the installation; None takes out those that are there."""

    def install(module):
        monkeypatch.setitem(sys.modules, "tbfast._cuda", module)
        monkeypatch.delattr(tbfast, "_cuda", raising=False)

    # What is imported with fake kernels must not outlive the test, nor they see what was before.
    kept = _take_away(sys.modules, "tbfast.backends.cuda")
    names = _take_away(vars(tbfast.backends), "cuda")
    monkeypatch.delenv("TBFAST_BACKEND", raising=False)
    yield install
    _take_away(sys.modules, "tbfast.backends.cuda")
    _take_away(vars(tbfast.backends), "cuda")
    sys.modules.update(kept)
    vars(tbfast.backends).update(names)


def _take_away(found, start):
    return {name: found.pop(name) for name in list(found) if name.startswith(start)}


def report(label):
    lines, _ = doctor.diagnose()
    return {line.partition("  ")[0]: line.partition("  ")[2].strip() for line in lines.split("\n")}[
        label
    ]


@pytest.mark.parametrize(
    ("device", "hip", "built", "expected"),
    [
        ("cpu", False, True, "native"),
        ("cpu", True, False, "native"),
        ("cuda", False, True, "cuda"),
        ("cuda", False, False, "triton"),
        ("cuda", True, False, "triton"),
        ("cuda", True, True, "triton"),  # the kernels are for NVIDIA
    ],
)
def test_the_rule_gives_gpu_weights_to_cuda_kernels_where_they_run_and_else_to_triton(
    device, hip, built, expected
):
    assert choose(device, hip, built) == expected


def test_auto_is_native_without_a_device_and_on_the_cpu(kernels):
    assert get_backend("auto") is native
    assert get_backend("auto", device=torch.device("cpu")) is native


@pytest.mark.parametrize("built", [True, False])
def test_auto_on_a_gpu_takes_the_chosen_backend_or_fails_with_its_name(kernels, monkeypatch, built):
    kernels(fake_kernels() if built else None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr("tbfast.backends.has_cuda_kernels", lambda: built)
    chosen = "cuda" if built else "triton"
    monkeypatch.setitem(sys.modules, f"tbfast.backends.{chosen}", None)
    with pytest.raises(RuntimeError, match=f"backend='{chosen}' is not available"):
        get_backend("auto", device=GPU)


def test_the_environment_wins_over_the_device(kernels, monkeypatch):
    monkeypatch.setenv("TBFAST_BACKEND", "reference")
    assert get_backend("auto", device=GPU) is reference
    monkeypatch.setenv("TBFAST_BACKEND", "auto")
    assert get_backend("auto", device=torch.device("cpu")) is native


def test_a_backend_asked_for_by_name_does_not_look_at_the_device(kernels):
    assert get_backend("reference", device=GPU) is reference


def test_cuda_without_kernels_says_how_to_build_them(kernels):
    kernels(None)
    with pytest.raises(RuntimeError, match=r"backend='cuda' is not available: .*TB_CUDA=ON"):
        get_backend("cuda")


def test_triton_without_its_package_says_how_to_install_it(monkeypatch):
    for name in [n for n in sys.modules if n.startswith("tbfast.backends.triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match=r"backend='triton' is not .*pip install triton"):
        get_backend("triton")


def test_a_backend_that_has_what_it_needs_and_still_fails_says_to_reinstall(kernels, monkeypatch):
    kernels(fake_kernels())
    monkeypatch.setitem(sys.modules, "tbfast.backends.cuda", None)
    with pytest.raises(RuntimeError, match=r"backend='cuda' is not available: .*; reinstall"):
        get_backend("cuda")


def test_looking_for_cuda_kernels_does_not_load_them(kernels):
    kernels(fake_kernels())
    assert has_cuda_kernels()
    assert "tbfast.backends.cuda" not in sys.modules


def test_doctor_says_what_the_cuda_kernels_were_compiled_for_and_why_there_is_no_device(kernels):
    kernels(fake_kernels(reason="CUDA driver version is insufficient for CUDA runtime version"))
    assert report("CUDA kernels") == "sm_90 compute_90 (CUDA 13.0.88)"
    assert report("CUDA devices").startswith("none: CUDA driver version is insufficient")


def test_doctor_names_each_device_and_what_one_lacks(kernels):
    kernels(fake_kernels([a_device("H100", 9, 0), a_device("V100", 7, 0)]))
    assert report("cuda:0") == "H100, compute capability 9.0"
    assert "refused: backend='cuda' needs compute capability 8.0" in report("cuda:1")


def test_doctor_says_which_backend_auto_takes_on_a_gpu_and_why(kernels, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    kernels(fake_kernels())
    assert report("auto on a GPU") == "cuda, because this installation has CUDA kernels"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert report("auto on a GPU") == "triton, because this torch is for AMD GPUs"
    monkeypatch.setenv("TBFAST_BACKEND", "native")
    assert report("auto on a GPU") == "native, because TBFAST_BACKEND says so"


def test_doctor_reports_cuda_kernels_that_do_not_load(kernels, monkeypatch):
    kernels(None)  # None in sys.modules makes the import fail
    monkeypatch.setattr(doctor, "has_cuda_kernels", lambda: True)
    assert report("CUDA kernels").startswith("broken (")
