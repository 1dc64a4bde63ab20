"""Merges that are killed, run out of room, or meet each other: nothing half done, nothing lost."""

import errno
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

import tbfast
from tbfast.merging.workplace import Workplace

SHARD = 40_000  # bytes: several files
# Dies at the COUNTth of the calls that make something last.
KILLED = f"""
import os, signal, sys
import tbfast
from tbfast.merging import workplace
models, out, left = sys.argv[1:3], sys.argv[3], int(sys.argv[4])
def dying(function):
    def call(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
os.fsync = dying(os.fsync)
workplace.Workplace.publish = dying(workplace.Workplace.publish)
tbfast.merge_checkpoints(models, out, shard_size={SHARD}, resume=True)
"""

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and locks of POSIX")


@pytest.fixture
def models(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        content = {f"w{i}": rng.standard_normal((50, 60)).astype(np.float32) for i in range(12)}
        save_file(content, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "toy"}')
    return tmp_path


def inputs(models):
    return [models / "a", models / "b"]


def weights(folder):
    return {f.name: f.read_bytes() for f in sorted(folder.glob("model*"))}


def hidden(models):
    return [p.name for p in models.glob(".*")]


def started(models, count):
    command = [sys.executable, "-c", KILLED, *map(str, inputs(models)), str(models / "out")]
    return subprocess.run([*command, str(count)], capture_output=True, text=True, check=False)


def test_a_merge_killed_at_any_step_goes_on_to_the_same_bytes(models):
    tbfast.merge_checkpoints(inputs(models), models / "whole", shard_size=SHARD)
    expected = weights(models / "whole")
    assert len(expected) > 3
    steps = 0
    for count in range(1, 100):
        done = started(models, count)
        if done.returncode == 0:
            assert weights(models / "out") == expected
            break
        steps += 1
        assert done.returncode == -signal.SIGKILL, done.stderr
        if not (models / "out").exists():  # complete or absent
            report = tbfast.merge_checkpoints(
                inputs(models), models / "out", shard_size=SHARD, resume=True
            )
            assert report.tensors == 12
            assert sum(report.picked) == pytest.approx(1)
        assert weights(models / "out") == expected
        assert hidden(models) == []
        for file in (models / "out").iterdir():
            file.unlink()
        (models / "out").rmdir()
    assert steps > 10


def test_finished_files_are_not_written_again(models, monkeypatch):
    done = started(models, 9)  # after the second file
    assert done.returncode == -signal.SIGKILL
    folder = models / ".out.merging"
    journal = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    finished = [record["file"] for record in journal[1:]]
    assert finished
    before = {name: (folder / name).stat().st_ino for name in finished}
    tbfast.merge_checkpoints(inputs(models), models / "out", shard_size=SHARD, resume=True)
    assert {name: (models / "out" / name).stat().st_ino for name in finished} == before


def test_without_resume_a_merge_begins_anew(models):
    assert started(models, 9).returncode == -signal.SIGKILL
    tbfast.merge_checkpoints(inputs(models), models / "out", shard_size=SHARD, seed=1)
    tbfast.merge_checkpoints(inputs(models), models / "other", shard_size=SHARD, seed=1)
    assert weights(models / "out") == weights(models / "other")
    assert hidden(models) == []


def test_another_plan_is_not_resumed(models):
    assert started(models, 9).returncode == -signal.SIGKILL
    for change in ({"seed": 1}, {"method": "linear"}, {"weights": [1, 2]}):
        with pytest.raises(ValueError, match=r"cannot resume .* the models or the options are not"):
            tbfast.merge_checkpoints(
                inputs(models), models / "out", shard_size=SHARD, resume=True, **change
            )
    assert hidden(models) == [".out.merging"]  # what was finished is kept
    os.utime(models / "a/model.safetensors", ns=(1, 1))
    with pytest.raises(ValueError, match="cannot resume"):
        tbfast.merge_checkpoints(inputs(models), models / "out", shard_size=SHARD, resume=True)


def test_a_journal_that_ends_in_the_middle_of_a_line_counts_up_to_there(models):
    assert started(models, 12).returncode == -signal.SIGKILL
    journal = models / ".out.merging/journal.jsonl"
    journal.write_text(journal.read_text()[:-20])
    tbfast.merge_checkpoints(inputs(models), models / "out", shard_size=SHARD, resume=True)
    tbfast.merge_checkpoints(inputs(models), models / "whole", shard_size=SHARD)
    assert weights(models / "out") == weights(models / "whole")


def test_two_merges_into_one_output_are_refused(models):
    place = Workplace(models / "out", "digest")
    with (
        place.opened(resume=False),
        pytest.raises(RuntimeError, match=r"another process is writing '.*out'; wait for it"),
    ):
        tbfast.merge_checkpoints(inputs(models), models / "out")


def test_no_room_is_said_before_anything_is_written(models, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"no space left.*make room and repeat with resume"):
        tbfast.merge_checkpoints(inputs(models), models / "out")
    assert not (models / "out").exists()


def test_a_full_disk_leaves_finished_files_to_resume(models, tmp_path_factory):
    small = tmp_path_factory.mktemp("small")
    mount = ["mount", "-t", "tmpfs", "-o", "size=112k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        options = dict(shard_size=SHARD)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 40))
            with pytest.raises(OSError, match=r"no space left; make room") as caught:
                tbfast.merge_checkpoints(inputs(models), small / "out", **options)
        assert caught.value.errno == errno.ENOSPC
        assert not (small / "out").exists()
        finished = list((small / ".out.merging").glob("model-*.safetensors"))
        assert 0 < len(finished) < 4
        subprocess.run(["mount", "-o", "remount,size=10m", str(small)], check=True)
        tbfast.merge_checkpoints(inputs(models), small / "out", resume=True, **options)
        tbfast.merge_checkpoints(inputs(models), models / "whole", **options)
        assert weights(small / "out") == weights(models / "whole")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_folder_without_permission_is_refused_in_words(models, monkeypatch):
    def denied(self, *arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.mkdir", denied)
    with pytest.raises(PermissionError, match=r"cannot write '.*out': Permission denied; choose"):
        tbfast.merge_checkpoints(inputs(models), models / "out")


def test_a_folder_that_cannot_be_written_is_refused_by_name(models, tmp_path_factory):
    place = tmp_path_factory.mktemp("read only")
    if os.geteuid() == 0:  # may write where permissions forbid it, but not where the system does
        mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(place)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("no right to mount a read-only folder")
    else:
        place.chmod(0o555)
    try:
        with pytest.raises(
            PermissionError, match=r"cannot write '.*out': .*; choose another place"
        ):
            tbfast.merge_checkpoints(inputs(models), place / "out")
        assert not list(place.iterdir())
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(place)], check=True)


def test_a_folder_that_turns_read_only_meanwhile_leaves_finished_files(models, monkeypatch):
    opened, count = os.open, 0

    def denied(path, flags, *arguments, **options):
        nonlocal count
        count += str(path).endswith(".part")
        if count > 2:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return opened(path, flags, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", denied)
        with pytest.raises(PermissionError, match=r"cannot write '.*out': Read-only file system;"):
            tbfast.merge_checkpoints(inputs(models), models / "out", shard_size=SHARD)
    assert not (models / "out").exists()
    finished = list((models / ".out.merging").glob("model-*.safetensors"))
    assert len(finished) == 2
    tbfast.merge_checkpoints(inputs(models), models / "out", shard_size=SHARD, resume=True)
    tbfast.merge_checkpoints(inputs(models), models / "whole", shard_size=SHARD)
    assert weights(models / "out") == weights(models / "whole")


def test_room_that_runs_out_only_when_the_disk_is_written_is_noticed(models, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match="no space left"):
            tbfast.merge_checkpoints(inputs(models), models / "out", shard_size=SHARD)
    assert not (models / "out").exists()


def test_an_interrupted_merge_can_be_resumed(models):
    class StopError(Exception):
        pass

    def stop(done, total, name):
        if done >= total // 2:
            raise StopError

    with pytest.raises(StopError):
        tbfast.merge_checkpoints(inputs(models), models / "out", shard_size=SHARD, progress=stop)
    assert hidden(models) == [".out.merging"]
    tbfast.merge_checkpoints(inputs(models), models / "out", shard_size=SHARD, resume=True)
    assert hidden(models) == []
