"""What merging costs beside copying a file, and beside mergekit.

    python benchmarks/bench_merge.py [--layers 10] [--rounds 5] [--folder /dev/shm]
        [--mergekit VENV/bin/mergekit-yaml]

Writes a base and two models tuned from it, of the shapes of TinyLlama with fewer layers (10: 1.1
GB each, bfloat16), and merges them by every method, each in a process of its own. A round runs
everything once, ``cp`` first, so that a busy moment hits all alike. Of a merge the call is timed;
CPU time and peak memory are those of the whole process, as mergekit's are. ``least`` is the ratio
to ``cp`` of the bytes that have to be read and written, counting a read as much as a write: a
merge at the speed of ``cp`` takes that. Bars: see BARS. Results go to benchmarks/results/merge.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest
import torch
from safetensors.torch import save_file

from tbfast.bench import cpu_name

RESULTS = Path(__file__).parent / "results/merge.csv"
BARS = {  # wall time to cp's, CPU time of mergekit to ours
    "select": 1.5,
    "linear": 1.5,
    "select, resampled": 2.0,
    "ties": 4.0,
    "mergekit linear": 30.0,
    "mergekit ties": 250.0,
}
_CALL = """
import json, sys, time
import tbfast
options = json.loads(sys.argv[1])
began = time.perf_counter()
tbfast.merge_checkpoints(**options)
seconds = time.perf_counter() - began
assert not {"torch", "numpy"} & sys.modules.keys()
print(seconds)
"""

# A process begins with the peak memory of the one that starts it: this one has little.
_START = """
import os, sys, time
began = time.perf_counter()
pid = os.spawnvp(os.P_NOWAIT, sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(pid, 0)
seconds = time.perf_counter() - began
print(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@dataclass
class Contender:
    """A way to make a checkpoint.

    Attributes:
        command: With ``{out}`` for what it writes.
        reads: Checkpoints that it has to read.
        prints_seconds: Whether its output says how long it took; else its process is timed.
        once: Whether one round has to do.
    """

    name: str
    command: list[str]
    reads: int
    prints_seconds: bool = False
    once: bool = False


def shapes(layers: int, hidden: int):
    """Names and shapes of TinyLlama's tensors, with ``layers`` blocks and another width."""
    wide, vocabulary, grouped = hidden * 11 // 4, hidden * 125 // 8, hidden // 8
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, rows, cols in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", grouped, hidden),
            ("self_attn.v_proj", grouped, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", wide, hidden),
            ("mlp.up_proj", wide, hidden),
            ("mlp.down_proj", hidden, wide),
        ):
            yield f"{prefix}{name}.weight", (rows, cols)
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def write_models(folder: Path, layers: int, hidden: int) -> int:
    """Folders base, a and b; returns the bytes of one."""
    generator = torch.Generator().manual_seed(0)
    randn = lambda shape: torch.randn(shape, generator=generator)  # noqa: E731
    base = {name: (0.02 * randn(shape)).bfloat16() for name, shape in shapes(layers, hidden)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": hidden * 125 // 8,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    for name in ("base", "a", "b"):
        (folder / name).mkdir()
        tensors = base
        if name != "base":
            tensors = {n: (w + 1e-3 * randn(w.shape)).bfloat16() for n, w in base.items()}
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(config))
    return sum(2 * w.numel() for w in base.values())


def contenders(folder: Path, mergekit: str | None) -> list[Contender]:
    """cp, every method, and mergekit's of the same names."""
    models, base = [str(folder / "a"), str(folder / "b")], str(folder / "base")

    def ours(name: str, reads: int, **options) -> Contender:
        call = json.dumps(dict(models=models, out="{out}", threads=2) | options)
        return Contender(name, [sys.executable, "-c", _CALL, call], reads, prints_seconds=True)

    found = [
        Contender("cp", ["cp", "-r", models[0], "{out}"], 1),
        ours("select", 2),
        ours("select, resampled", 3, base=base),
        ours("linear", 2, method="linear"),
        ours("slerp", 2, method="slerp"),
        ours("task", 3, method="task", base=base),
        ours("ties", 3, method="ties", base=base),
        ours("dare_linear", 3, method="dare_linear", base=base),
        ours("dare_ties", 3, method="dare_ties", base=base),
    ]
    for method, reads in (("linear", 2), ("ties", 3)) if mergekit else ():
        parameters = {"weight": 0.5} | ({"density": 0.5} if method == "ties" else {})
        recipe = {
            "merge_method": method,
            "models": [{"model": model, "parameters": parameters} for model in models],
            "dtype": "bfloat16",
        } | ({"base_model": base} if method == "ties" else {})
        path = folder / f"{method}.yml"
        path.write_text(json.dumps(recipe))  # JSON is YAML
        command = [mergekit, str(path), "{out}", "--lazy-unpickle", "--quiet"]
        found.append(Contender(f"mergekit {method}", command, reads, once=True))
    return found


def run(contender: Contender, out: Path) -> tuple[float, float, float]:
    """Seconds, seconds of CPU, and peak memory in MB; what was written is removed."""
    shutil.rmtree(out, ignore_errors=True)
    command = [part.replace("{out}", str(out)) for part in contender.command]
    done = subprocess.run(
        [sys.executable, "-c", _START, *command], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{contender.name} failed:\n{done.stderr}")
    shutil.rmtree(out)
    *printed, usage = done.stdout.splitlines()
    seconds, cpu, memory = map(float, usage.split())
    return float(printed[-1]) if contender.prints_seconds else seconds, cpu, memory


def measure(folder: Path, layers: int, rounds: int, mergekit: str | None, hidden: int = 2048):
    """Rows of the table."""
    size = write_models(folder, layers, hidden)
    every = contenders(folder, mergekit)
    taken: dict[str, list[tuple[float, float, float]]] = {c.name: [] for c in every}
    for number in range(rounds):
        for contender in every:
            if number == 0 or not contender.once:
                taken[contender.name].append(run(contender, folder / "out"))
                print(f"round {number + 1}: {contender.name}", file=sys.stderr)
    medians = {
        name: [median(column) for column in zip(*runs, strict=True)] for name, runs in taken.items()
    }
    stamp = {"cpu": cpu_name(), "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d")}
    rows = []
    for contender in every:
        seconds, cpu, memory = medians[contender.name]
        row = {"gigabytes": round(size / 1e9, 2), "contender": contender.name}
        row |= {"rounds": len(taken[contender.name]), "seconds": round(seconds, 3)}
        row |= {"to_cp": round(seconds / medians["cp"][0], 2), "least": (contender.reads + 1) / 2}
        row |= {"cpu_seconds": round(cpu, 3), "peak_mb": round(memory), "cpu_to_ours": ""}
        if contender.once:
            ours = medians[contender.name.removeprefix("mergekit ")]
            row["cpu_to_ours"] = round(cpu / ours[1], 1)
        rows.append(row | {"bar": BARS.get(contender.name, "")} | stamp)
    return rows


def write(rows: list[dict], path: Path = RESULTS) -> None:
    """Put the rows in the place of older ones of that size."""
    kept = []
    if path.exists():
        with path.open(newline="") as file:
            kept = list(csv.DictReader(file))
    size = {str(row["gigabytes"]) for row in rows}
    kept = [row for row in kept if row["gigabytes"] not in size]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept + rows)


def test_merge(benchmark, tmp_path):
    """The whole comparison, timed as one; method by method it is in the CSV."""
    if benchmark.disabled:
        pytest.skip("a benchmark of minutes: pytest --benchmark-enable --benchmark-only")
    write(benchmark.pedantic(measure, (tmp_path, 10, 3, None), rounds=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=2048, help="width; 2048 is TinyLlama's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write models; default: the system's temporary")
    parser.add_argument("--mergekit", help="its mergekit-yaml, in an environment of its own")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        rows = measure(Path(folder), given.layers, given.rounds, given.mergekit, given.hidden)
    write(rows, given.csv)
    for row in rows:
        print(" ".join(f"{k}={v}" for k, v in row.items() if k not in ("cpu", "cores", "date")))


if __name__ == "__main__":
    main()
