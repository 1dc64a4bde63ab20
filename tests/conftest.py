"""What several test files need."""

import importlib
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Triton's kernels run in its interpreter where there is no GPU. It looks when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

DISTRIBUTED = Path(__file__).parent / "distributed"
EMULATION = Path(__file__).parent / "emulation"


def load(name: str, path: Path):
    """A module that is not on sys.path."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def in_processes(tmp_path_factory):
    """Runs a worker of tests/distributed in several processes; what each saved, by rank."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the processes are forked: Linux only")

    def run(worker: str, world: int, timeout: float = 90, folder: Path | None = None, **env: str):
        folder = folder or tmp_path_factory.mktemp(f"{worker}{world}")
        (folder / "rendezvous").unlink(missing_ok=True)
        arguments = [DISTRIBUTED / "launch.py", DISTRIBUTED / f"{worker}.py", world, folder]
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TBFAST_NUM_THREADS": "1", **env},
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"{worker} hangs:\n{process.communicate()[0][-3000:]}")
        assert process.returncode == 0, output[-5000:]
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]

    run.folder = DISTRIBUTED
    return run


@pytest.fixture(scope="session")
def emulation():
    """tests/emulation/build.py, where there is a compiler for it."""
    builder = load("emulation_build", EMULATION / "build.py")
    try:
        builder.compiler()
    except RuntimeError as reason:
        pytest.skip(str(reason))
    return builder


@pytest.fixture(scope="session")
def emulated_module(emulation):
    return load("_cuda_emulated", emulation.build_module())


@pytest.fixture
def emulated(emulated_module):
    """tbfast._cuda on the emulator, which is again as it was after the test."""
    emulated_module.emulate()
    yield emulated_module
    emulated_module.emulate()


@pytest.fixture
def cuda(emulated, monkeypatch):
    """The CUDA backend on the emulator."""
    import tbfast.backends

    for name in ("cuda", "cuda_plans", "cuda_refresh"):
        monkeypatch.delitem(sys.modules, f"tbfast.backends.{name}", raising=False)
        monkeypatch.delattr(tbfast.backends, name, raising=False)
    monkeypatch.setitem(sys.modules, "tbfast._cuda", emulated)
    monkeypatch.setattr(tbfast, "_cuda", emulated, raising=False)
    yield importlib.import_module("tbfast.backends.cuda")
    for name in ("cuda", "cuda_plans", "cuda_refresh"):
        sys.modules.pop(f"tbfast.backends.{name}", None)
        if hasattr(tbfast.backends, name):
            delattr(tbfast.backends, name)
