"""What several test files need."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

DISTRIBUTED = Path(__file__).parent / "distributed"


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
