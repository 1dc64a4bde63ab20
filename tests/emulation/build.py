"""Builds the CUDA sources for the emulator, and the programs that test the emulator itself.

``python tests/emulation/build.py [--target module|self_test|asan|tsan] [--out DIR]`` prints the
paths of what it made; an object is compiled again only when what it was made from is newer.
"""

import argparse
import fcntl
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

EMULATION = Path(__file__).resolve().parent
ROOT = EMULATION.parents[1]
CSRC = ROOT / "csrc"
OUT = ROOT / "build" / "emulation"
JOBS = 2

# TB_SEGMENT: small matrices then have as many segments as large ones on a GPU.
FLAGS = ["-std=c++20", "-g1", "-fPIC", "-DTB_EMULATED", "-DTB_SEGMENT=256"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{CSRC}", f"-I{EMULATION}"]

KINDS = {
    "plain": ["-O1"],
    "asan": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["-O1", "-fsanitize=thread"],
}
TARGETS = ("module", "self_test", "asan", "tsan")


def compiler() -> str:
    """The C++ compiler: CXX, else what is on PATH. Raises RuntimeError where there is none."""
    if platform.machine() not in ("x86_64", "AMD64") or not sys.platform.startswith("linux"):
        raise RuntimeError(f"the emulator runs on x86-64 Linux, this is {platform.platform()}")
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "c++", "clang++"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise RuntimeError(f"no C++ compiler: {', '.join(names)}")
    return found


def _run(command: list[str | Path]) -> None:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}\n{done.stderr[-8000:]}")


def _is_stale(product: Path, inputs: list[Path]) -> bool:
    if not product.exists():
        return True
    made = product.stat().st_mtime
    return any(not path.exists() or path.stat().st_mtime > made for path in inputs)


def _inputs(compiled: Path) -> list[Path]:
    """What an object was made from, as the compiler wrote it: 'object: file file ...'."""
    recipe = compiled.with_suffix(".d")
    if not recipe.exists():
        return [recipe]
    return [Path(word) for word in recipe.read_text().replace("\\\n", " ").split()[1:]]


def _link(product: Path, sources: list[Path], flags: list[str], linking: list[str]) -> Path:
    """Compiles what is out of date, and links all."""
    folder = product.parent / f"{product.name.split('.')[0]}.objects"
    folder.mkdir(parents=True, exist_ok=True)
    objects = [folder / f"{source.name}.o" for source in sources]

    def compile_one(source: Path, compiled: Path) -> None:
        if _is_stale(compiled, [*_inputs(compiled), Path(__file__)]):
            command = [compiler(), *FLAGS, *flags, "-MMD", "-x", "c++", "-c", source]
            _run([*command, "-o", compiled])

    with (folder / "lock").open("w") as lock:  # other processes may want the same
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(JOBS) as pool:
            list(pool.map(compile_one, sources, objects))
        if _is_stale(product, objects):
            made = product.with_suffix(".new")  # another process may have the old one open
            _run([compiler(), *flags, *objects, *linking, "-o", made])
            made.replace(product)
    return product


def kernel_sources() -> list[Path]:
    """The kernels and their plans, with the emulator's runtime instead of CUDA's."""
    sources = [*CSRC.glob("cuda/*.cu"), *CSRC.glob("cuda/*.cpp")]
    sources = [source for source in sources if source.name != "runtime.cu"]
    return [*sorted(sources), EMULATION / "emulated_runtime.cpp"]


def build_module(out: Path = OUT) -> Path:
    """Builds the Python extension ``_cuda_emulated``: what ``tbfast._cuda`` is on a GPU."""
    import pybind11

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    product = out / f"_cuda_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = [*sorted(CSRC.glob("bind_cuda*.cpp")), *kernel_sources()]
    flags = [*KINDS["plain"], "-fvisibility=hidden", *includes]
    return _link(product, sources, flags, ["-shared"])


def build_program(name: str, kind: str, out: Path = OUT) -> Path:
    """Builds ``<name>.cpp``, ``self_test`` or ``kernels_test``, as one of ``KINDS``."""
    kernels = kernel_sources() if name == "kernels_test" else []
    return _link(out / f"{name}_{kind}", [EMULATION / f"{name}.cpp", *kernels], KINDS[kind], [])


def build(target: str, out: Path) -> list[Path]:
    """Builds one of ``TARGETS``; the paths of its products."""
    if target == "module":
        return [build_module(out)]
    if target == "self_test":
        return [build_program("self_test", "plain", out)]
    return [build_program(name, target, out) for name in ("self_test", "kernels_test")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, default="module")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    print(*build(arguments.target, arguments.out.resolve()), sep="\n")
