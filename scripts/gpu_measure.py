"""One measurement of scripts/gpu_check.py: prints a line of JSON for each row.

    python scripts/gpu_measure.py {machine,copy,spectra,rsvd,training,smoke} [--backend NAME]
                                  [--dry-run]

Each runs in a process of its own, so that a kernel that fails takes nothing else with it.
Contenders take turns, round by round, and every answer is checked before it is timed. A dry run
takes the same path on the CPU, with sizes that tell nothing and the backend native in place of the
GPU's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "build/data/gpt2/model.safetensors"  # used where it lies there
Row = dict[str, Any]
Call = Callable[[], object]

# The weights of a block of GPT-2 small, as in its checkpoint, and its number of blocks.
_BLOCK = {"attn.c_attn": (768, 2304), "attn.c_proj": (768, 768)}
_BLOCK |= {"mlp.c_fc": (768, 3072), "mlp.c_proj": (3072, 768)}
# Of alpha, against the CPU on the same probes. Half precision enters the products exactly but for
# the vectors, which are split in two halves of it.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-3}


class Setting:
    """Where and how large: a GPU and GPT-2, or, in a dry run, the CPU and next to nothing."""

    def __init__(self, dry_run: bool, backend: str | None) -> None:
        if not dry_run and not torch.cuda.is_available():
            raise RuntimeError(
                "torch sees no GPU; use a Python whose torch is built for one, or --dry-run"
            )
        self.dry_run = dry_run
        self.device = torch.device("cpu" if dry_run else "cuda")
        self.rounds = 2 if dry_run else 20
        self.label = "tiny shapes" if dry_run else "GPT-2 small"
        self.probes, self.steps = (2, 5) if dry_run else (8, 20)
        asked = (backend,) if backend else ("cuda", "triton")
        self.backends = ("native",) if dry_run else asked

    def weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """GPT-2 small's matrices from its checkpoint, or random ones of its shapes."""
        generator = torch.Generator().manual_seed(0)
        depth, shapes = 12, _BLOCK
        if self.dry_run:
            depth, shapes = 1, {name: (m // 32, n // 32) for name, (m, n) in _BLOCK.items()}
        found = {
            f"h.{block}.{name}.weight": 0.02 * torch.randn(shape, generator=generator)
            for block in range(depth)
            for name, shape in shapes.items()
        }
        if not self.dry_run and WEIGHTS.exists():
            from safetensors.torch import load_file

            known = load_file(WEIGHTS)
            found = {name: known[name] for name in found}
        return {name: weight.to(self.device, dtype) for name, weight in found.items()}

    def race(self, contenders: dict[str, Call]) -> dict[str, list[float]]:
        """Sorted milliseconds of each contender, all in turn, after one round of warming up."""
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(self.rounds + 1):
            for name, call in contenders.items():
                self.wait()
                began = time.perf_counter()
                call()
                self.wait()
                times[name].append(1e3 * (time.perf_counter() - began))
        return {name: sorted(t[1:]) for name, t in times.items()}

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def rows(
        self, bench: str, case: str, contenders: dict[str, Call], moved: float
    ) -> Iterator[Row]:
        """A row for each contender; ``moved`` is the bytes that it cannot do without."""
        for name, times in self.race(contenders).items():
            p20, p50, p80 = (times[int(q * (len(times) - 1))] for q in (0.2, 0.5, 0.8))
            yield {
                "bench": bench,
                "case": case,
                "contender": name,
                "p20_ms": round(p20, 4),
                "p50_ms": round(p50, 4),
                "p80_ms": round(p80, 4),
                "gb_per_s": float(f"{moved / p50 / 1e6:.4g}") if moved else "",
                "rounds": len(times),
            }


def machine(setting: Setting) -> Iterator[Row]:
    """What this is run on."""
    yield {"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    if not setting.dry_run:
        p = torch.cuda.get_device_properties(0)
        yield {"gpu": p.name, "capability": f"{p.major}.{p.minor}", "bytes": p.total_memory}


def copy(setting: Setting) -> Iterator[Row]:
    """The limit: a copy of memory to memory, bytes read and written."""
    count = 1 << (12 if setting.dry_run else 28)
    here = torch.ones(count, device=setting.device)
    there = torch.empty_like(here)
    contenders: dict[str, Call] = {"torch": lambda: there.copy_(here)}
    yield from setting.rows("copy", "device memory", contenders, 8 * count)


def spectra(setting: Setting) -> Iterator[Row]:
    """Alpha of every layer: each backend, all singular values by torch, and a loop of products."""
    from tbfast.backends import get_backend, native
    from tbfast.batch import Batch
    from tbfast.fitting import FitOptions
    from tbfast.sketching import SketchOptions

    for dtype in (torch.float32, torch.bfloat16):
        weights = setting.weights(dtype)
        batch = Batch(weights)
        on_cpu = {name: weight.cpu() for name, weight in weights.items()}

        def alpha(engine: Any, batch: Batch) -> Any:
            runs = engine.lanczos(batch, setting.probes, setting.steps, seed=0)
            return engine.quadrature_fit(runs, FitOptions()).fits.alpha

        expected = alpha(native, Batch(on_cpu))
        contenders: dict[str, Call] = {}
        for name in setting.backends:
            engine = get_backend(name)
            error = float(abs(alpha(engine, batch) / expected - 1).max())
            if not error <= _TOLERANCE[dtype]:
                raise AssertionError(
                    f"alpha of backend {name!r} is {error:.2g} from native's in {dtype}; "
                    f"{_TOLERANCE[dtype]:.2g} is allowed"
                )
            contenders[name] = partial(alpha, engine, batch)
            if hasattr(engine, "Refresh"):  # one launch, whose results stay in pinned memory
                sketch = SketchOptions(setting.probes, setting.steps)
                refresh = engine.Refresh(batch, FitOptions(), sketch)
                contenders[f"{name}, one launch"] = partial(refresh.start, 0)
        contenders["loop of products"] = partial(products, weights, setting)
        contenders["svdvals"] = partial(singular_values, weights)
        read = setting.steps * sum(w.numel() * w.element_size() for w in weights.values())
        case = f"{setting.label}, {str(dtype).removeprefix('torch.')}"
        for row in setting.rows("spectra", case, contenders, read):
            yield row | ({"gb_per_s": ""} if row["contender"] == "svdvals" else {})


def singular_values(weights: dict[str, Tensor]) -> list[Tensor]:
    """All of every matrix, by torch, one after the other; it takes no halves."""
    return [torch.linalg.svdvals(w.float()) for w in weights.values()]


def products(weights: dict[str, Tensor], setting: Setting) -> None:
    """As many products WᵀWx as the backends make, by two matrix products each, and no more."""
    for weight in weights.values():
        x = torch.ones(weight.shape[1], setting.probes, device=weight.device, dtype=weight.dtype)
        for _ in range(setting.steps):
            x = weight.T @ (weight @ x)
            x = x / x.norm()


def rsvd(setting: Setting) -> Iterator[Row]:
    """The largest singular values of every layer, beside ``torch.svd_lowrank``."""
    from tbfast.backends import get_backend
    from tbfast.batch import Batch

    weights = setting.weights(torch.float32)
    batch = Batch(weights)
    rank = 4 if setting.dry_run else 64
    options: dict[str, int] = dict(oversample=8, power_iters=1, seed=0)
    top = torch.stack([torch.linalg.svdvals(w)[0] for w in weights.values()]).cpu()
    contenders: dict[str, Call] = {}
    for name in setting.backends:
        engine = get_backend(name)
        found = torch.stack([s[0].cpu() for _, s, _, _ in engine.rsvd(batch, rank, **options)])
        # A sketch never gives too large a singular value, but for rounding, nor on flat random
        # spectra, its hardest case, one less than three quarters of it.
        if not bool(((found <= 1.0001 * top) & (found >= 0.75 * top)).all()):
            raise AssertionError(f"largest singular values of backend {name!r}: {found} of {top}")
        contenders[name] = partial(engine.rsvd, batch, rank, **options)
    contenders["svd_lowrank"] = lambda: [
        torch.svd_lowrank(w, rank + 8, niter=1) for w in weights.values()
    ]
    yield from setting.rows("rsvd", f"{setting.label}, rank {rank}", contenders, 0)


def training(setting: Setting) -> Iterator[Row]:
    """Steps of a small GPT on Python's own source text, plain and under ``tbfast.attach``."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from workloads import GPT, python_text

    import tbfast

    width, depth, steps = (32, 1, 6) if setting.dry_run else (768, 12, 200)
    size, length = (2, 16) if setting.dry_run else (8, 512)
    text = torch.tensor(list(python_text(200_000)), device=setting.device)
    times: dict[str, list[float]] = {}
    for name in ("plain", "attach"):
        torch.manual_seed(0)
        model = GPT(vocabulary=256, context=length, width=width, depth=depth, heads=4)
        model.to(setting.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
        if name == "attach":
            tbfast.attach(optimizer, model, min_eigs=8 if setting.dry_run else None)
        generator = torch.Generator().manual_seed(0)
        seconds = []
        for _ in range(steps):
            setting.wait()
            began = time.perf_counter()
            places = torch.randint(len(text) - length - 1, (size,), generator=generator)
            tokens = torch.stack([text[p : p + length + 1] for p in places.tolist()])
            optimizer.zero_grad()
            logits = model(tokens[:, :-1]).flatten(0, 1)
            torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
            optimizer.step()
            setting.wait()
            seconds.append(1e3 * (time.perf_counter() - began))
        # The first tenth of the steps compiles, tunes and measures for the first time.
        times[name] = sorted(seconds[steps // 10 :])
    for name, found in times.items():
        p20, p50, p80 = (found[int(q * (len(found) - 1))] for q in (0.2, 0.5, 0.8))
        mean = sum(found) / len(found)
        yield {
            "bench": "training",
            "case": f"GPT {width} x {depth}, step",
            "contender": name,
            "p20_ms": round(p20, 4),
            "p50_ms": round(p50, 4),
            "p80_ms": round(p80, 4),
            "mean_ms": round(mean, 4),
            "overhead": round(mean / (sum(times["plain"]) / len(times["plain"])) - 1, 4),
            "rounds": len(found),
        }


def smoke(setting: Setting) -> Iterator[Row]:
    """Every kernel on small ragged matrices of each layout: what compute-sanitizer watches."""
    from tbfast.backends import get_backend
    from tbfast.batch import Batch
    from tbfast.fitting import FitOptions
    from tbfast.sketching import SketchOptions

    engine = get_backend(setting.backends[0])
    shapes = [(1, 5), (33, 17), (64, 64), (40, 130), (1100, 1030)]  # the last: a team of blocks
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64):
        made = [torch.randn(s, device=setting.device, dtype=dtype) for s in shapes]
        weights = [*made, made[3].T, made[2][1:, 3:]]
        batch = Batch(weights)
        runs = engine.lanczos(batch, 2, 4, seed=0)
        fitted = engine.quadrature_fit(runs, FitOptions())
        for kind in ("median", "ks", "peak", "tail"):
            engine.fit([spectrum(w) for w in weights], FitOptions(kind, k=3))
        parts = 2 if dtype.is_complex else 1
        vectors = [torch.ones(1, 3, parts * min(w.shape), device=setting.device) for w in weights]
        engine.gram_apply(batch, vectors)
        engine.rsvd(batch, 1, oversample=8, power_iters=1, seed=0)
        rows = sum(w.shape[0] for w in weights)
        numbers = parts * sum(w.numel() for w in weights)
        values = torch.ones(numbers, dtype=torch.int8, device=setting.device)
        engine.dot(batch, values, torch.ones(rows, device=setting.device))
        engine.drift(batch, torch.arange(rows), torch.ones(numbers, device=setting.device))
        if hasattr(engine, "Refresh"):
            refresh = engine.Refresh(batch, FitOptions(), SketchOptions(2, 4))
            refresh.start(0)
        setting.wait()
        yield {"smoke": str(dtype), "fitted": int((fitted.fits.reason == 0).sum())}


def spectrum(weight: Tensor) -> Any:
    """Ascending eigenvalues of WᵀW as float64 on the CPU."""
    wide = weight.cpu().to(torch.complex128 if weight.is_complex() else torch.float64)
    return torch.linalg.svdvals(wide).square().flip(0).numpy()


MEASUREMENTS = {f.__name__: f for f in (machine, copy, spectra, rsvd, training, smoke)}


def main() -> None:
    parser = argparse.ArgumentParser(description="One measurement of scripts/gpu_check.py.")
    parser.add_argument("measurement", choices=MEASUREMENTS)
    parser.add_argument("--backend", choices=("cuda", "triton"))
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    for row in MEASUREMENTS[options.measurement](Setting(options.dry_run, options.backend)):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
