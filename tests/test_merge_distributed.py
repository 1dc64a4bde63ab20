"""Several processes merge together: the bytes of one process, and no half of them."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

import tbfast

if not torch.distributed.is_available() or not sys.platform.startswith("linux"):
    pytest.skip("needs torch.distributed and forks", allow_module_level=True)

from tbfast.distributed import shared_out

WORLD, LAST = 3, 2
OPTIONS = {"shard_size": 40_000}
CASES = {
    "select": {"base": True, "seed": 5, "weights": [1, 3]},
    "linear": {"method": "linear", "dtype": "bf16"},
    "ties": {"method": "ties", "base": True, "density": 0.3},
    "one.safetensors": {"method": "dare_linear", "base": True},
}
OWN = {"seconds": 0, "peak_memory": 0}  # what a report says of the run
TWICE = """
import runpy, sys
for arguments in ({first!r}, {second!r}):
    sys.argv = ["tbfast", "merge", *arguments]
    try:
        runpy.run_module("tbfast", run_name="__main__")
    except SystemExit as ended:
        assert ended.code == 0
"""


def make(folder):
    """Base and two models of tensors of several sizes; model a has files for its tokenizer."""
    rng = np.random.default_rng(0)
    sizes = {f"w{i}": (50, 60 + 10 * (i % 5)) for i in range(14)} | {"scale": (), "none": (0, 2)}
    base = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in sizes.items()}
    for name in ("base", "a", "b"):
        (folder / name).mkdir()
        moved = {
            key: np.where(rng.random(v.shape) < 0.3, v, v + 0.1).astype(np.float32)
            for key, v in base.items()
        }
        save_file(base if name == "base" else moved, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text('{"model_type": "toy"}')
    (folder / "a/tokenizer.json").write_text("{}")
    (folder / "cases.json").write_text(json.dumps([CASES, OPTIONS]))
    return folder


def alone(folder, name, out):
    """The merge in this process."""
    case = dict(CASES[name])
    if "base" in case:
        case["base"] = folder / "base"
    return tbfast.merge_checkpoints([folder / "a", folder / "b"], out, **OPTIONS, **case)


def content(path):
    """Bytes by name; of the report what belongs to the merge."""
    if path.is_file():
        return {"": path.read_bytes()}
    found = {file.name: file.read_bytes() for file in path.iterdir()}
    report = json.loads(found.pop("merge_report.json"))
    return found | {"report": report | OWN}


@pytest.fixture(scope="module")
def merged(tmp_path_factory, in_processes):
    folder = make(tmp_path_factory.mktemp("together"))
    report = alone(folder, "select", folder / "alone select")
    owners = dict(zip(report.shards, shared_out(list(report.shards.values()), WORLD), strict=True))
    assert len(owners) > 2 * WORLD
    shard = next(name for name, owner in owners.items() if owner == LAST)
    with safe_open(folder / "alone select" / shard, "np") as opened:
        spoilt = min(opened.keys())
    shutil.copytree(folder / "b", folder / "nan")
    with safe_open(folder / "b/model.safetensors", "np") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    tensors[spoilt][3, 4] = np.nan
    save_file(tensors, folder / "nan/model.safetensors")
    answers = in_processes("merge_worker", WORLD, folder=folder)
    return folder, answers, spoilt


@pytest.mark.parametrize("name", CASES)
def test_processes_write_the_bytes_of_one(merged, name):
    folder, answers, _ = merged
    expected = folder / f"alone {name}"
    report = json.loads((folder / "alone select/merge_report.json").read_text())
    if name != "select":
        report = alone(folder, name, expected).to_dict()
    assert content(folder / f"together {name}") == content(expected)
    files = report["shards"].items()
    report["shards"] = {file.replace("alone", "together"): size for file, size in files}
    for rank in range(WORLD):
        assert answers[rank][name] == answers[0][name]
        assert answers[rank][name] | OWN == report | OWN


@pytest.mark.parametrize("name", CASES)
def test_each_file_is_written_by_the_process_with_the_fewest_bytes_of_larger_ones(merged, name):
    _, answers, _ = merged
    sizes = answers[0][name]["shards"]
    wrote = [answer[f"wrote {name}"] for answer in answers]
    assert sorted(sum(wrote, [])) == sorted(sizes)  # noqa: RUF017
    if name == "one.safetensors":
        assert [len(files) for files in wrote] == [1, 0, 0]
        return
    bytes_of = [sum(sizes[file] for file in files) for files in wrote]
    assert max(bytes_of) - min(bytes_of) <= max(sizes.values())


def test_a_process_that_torchrun_starts_alone_imports_no_torch(merged):
    folder, _, _ = merged
    code = (
        "import sys, tbfast; tbfast.merge_checkpoints(sys.argv[1:3], sys.argv[3]); "
        "print('torch' in sys.modules)"
    )
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    command = [sys.executable, "-c", code, folder / "a", folder / "b", folder / "single"]
    environment = {**os.environ, **alone}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "False"


def test_one_of_several_processes_merges_alone_if_told_to(merged):
    folder, _, _ = merged
    tbfast.merge_checkpoints([folder / "a", folder / "b"], folder / "here.safetensors")
    assert content(folder / "alone.safetensors") == content(folder / "here.safetensors")


def test_only_the_first_process_tells_of_progress(merged):
    _, answers, _ = merged
    assert [len(answer["progress"]) > 0 for answer in answers] == [True, False, False]
    done, total, _ = answers[0]["progress"][-1]
    assert done == total == 16


def test_processes_of_a_machine_share_its_cores_unless_told_how_many(merged):
    _, answers, _ = merged
    assert [answer["threads"] for answer in answers] == [{"": 4, "7": 12}] * WORLD


FAILURES = {
    "nan": (LAST, "CheckpointError", "holds NaN or infinity in '{}', first at element"),
    "no model": (1, "CheckpointError", "nowhere' does not exist; check the path"),
    "progress": (0, "KeyError", "enough"),
    "held": (0, "RuntimeError", "another process is writing"),
    "full": (1, "OSError", "failed full': no space left; make room and repeat with resume"),
    "not shared": (LAST, "FileNotFoundError", "is not the folder that rank 0 has made; choose"),
}
SEEN_AS = {"KeyError": "RuntimeError", "FileNotFoundError": "OSError"}


@pytest.mark.parametrize("what", FAILURES)
def test_where_one_process_fails_all_do_and_name_it(merged, what):
    _, answers, spoilt = merged
    failing, kind, message = FAILURES[what]
    for rank, answer in enumerate(answers):
        found, text, seconds = answer["failures"][what]
        assert message.format(spoilt) in text
        assert seconds < 10
        if rank == failing:
            assert found == kind
            assert "rank" not in text.replace("rank 0 has made", "")
        else:
            assert found == SEEN_AS.get(kind, kind)
            assert f"rank {failing} failed: " in text


def test_processes_that_are_called_otherwise_are_told_so(merged):
    _, answers, _ = merged
    for answer in answers:
        kind, text, _ = answer["failures"]["other seed"]
        assert kind == "RuntimeError"
        assert text.startswith("rank 1 plans another merge than rank 0; give every rank the same")


def test_a_process_that_ends_is_not_waited_for(merged):
    _, answers, _ = merged
    for answer in answers[:LAST]:
        kind, text, seconds = answer["failures"]["ended"]
        assert kind == "RuntimeError"
        assert "another process of this merge has ended" in text
        assert "start all again, with resume" in text
        assert seconds < 10


def test_a_failed_merge_leaves_what_one_of_a_single_process_does(merged):
    folder, _, _ = merged
    assert not list(folder.glob("failed*"))
    # Kept for resume: what no room was left for, and what was stopped; but for damaged input.
    resumable = ("progress", "held", "full", "not shared", "ended")
    assert {p.name for p in folder.glob(".*")} == {f".failed {w}.merging" for w in resumable}


@pytest.fixture(scope="module")
def killed(tmp_path_factory, in_processes):
    """A folder in which all processes were killed in the middle of a merge."""
    folder = make(tmp_path_factory.mktemp("killed"))
    launch = in_processes.folder / "launch.py"
    done = subprocess.run(
        [sys.executable, launch, in_processes.folder / "merge_worker.py", str(WORLD), folder],
        env={**os.environ, "KILLED_AT": "14", "TBFAST_NUM_THREADS": "1"},
        start_new_session=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert not (folder / "out").exists()
    return folder


def noted(folder):
    """Names of the files that a journal holds for finished."""
    lines = (folder / ".out.merging/journal.jsonl").read_text().splitlines()
    return [json.loads(line)["file"] for line in lines[1:]]


def expected(folder):
    options = dict(base=folder / "base", **OPTIONS)
    if not (folder / "whole").exists():
        tbfast.merge_checkpoints([folder / "a", folder / "b"], folder / "whole", **options)
    return content(folder / "whole")


def test_one_process_resumes_what_several_began(killed, tmp_path):
    shutil.copytree(killed / ".out.merging", tmp_path / ".out.merging")
    models = [killed / "a", killed / "b"]
    tbfast.merge_checkpoints(models, tmp_path / "out", base=killed / "base", resume=True, **OPTIONS)
    assert content(tmp_path / "out") == expected(killed)


def test_torchrun_resumes_a_merge_and_makes_another(killed):
    shards = sum(name.endswith(".safetensors") for name in expected(killed))
    before = {name: (killed / ".out.merging" / name).stat().st_ino for name in noted(killed)}
    assert 0 < len(before) < shards
    first = [str(killed / "a"), str(killed / "b"), "-o", str(killed / "out"), "--resume"]
    first += ["--base", str(killed / "base"), "--shard-size", "40000"]
    second = [*first[:3], str(killed / "linear.safetensors"), "--method", "linear"]
    script = killed / "twice.py"
    script.write_text(TWICE.format(first=first, second=second))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(WORLD)]
    environment = {k: v for k, v in os.environ.items() if k != "TBFAST_NUM_THREADS"}
    done = subprocess.run(
        [*torchrun, script],
        capture_output=True,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if "16 tensors" in line]
    assert [line.partition(":")[0] for line in lines] == [
        f"'{killed / 'out'}'",
        f"'{killed / 'linear.safetensors'}'",
    ]
    assert content(killed / "out") == expected(killed)
    assert {name: (killed / "out" / name).stat().st_ino for name in before} == before
    tbfast.merge_checkpoints(
        [killed / "a", killed / "b"], killed / "one.safetensors", method="linear"
    )
    assert content(killed / "linear.safetensors") == content(killed / "one.safetensors")
    assert not list(killed.glob(".*"))
