"""Predicts what measuring the layers of real models would cost on GPUs: modelled, not measured.

    python benchmarks/gpu_model.py

A scheme's time is that of what it keeps busy for longest: memory, L2, the issue slots of the
schedulers, arithmetic, shared memory, or waiting. The spectral kernel as compiled is followed panel
by panel through its own tile plan (gpu_plan.py); the other schemes, "ideal" ones among them, are
counted in bytes and flops alone. ASSUMPTIONS says what goes in beside the figures of
gpu_architectures.py. The rows go to benchmarks/results/gpu_model.csv; plot_gpu_model.py draws them.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from gpu_architectures import GPUS, MODELS, Gpu, Model
from gpu_occupancy import resident_blocks
from gpu_plan import FLOAT, PANEL_ROWS, PROBES, SEGMENT, Plan, busiest

RESULTS = Path(__file__).parent / "results/gpu_model.csv"
RANKS = (1, 8, 64, 512)

ASSUMPTIONS = """
modelled, not measured: vendor peaks, published latencies, +-20 %
  85 % of the peak of the memory and of L2 is reached, 60 % of that of arithmetic
  a grid barrier takes 2 us, a launch 5 us
  a training step takes 6 flop for each parameter and token, 32768 tokens on each GPU, 40 % of peak
  weights bfloat16, 20 Lanczos steps, 8 start vectors; rsvd: rank 64 + 8, one power iteration
  ranks hold whole layers, divided by cost, the longest first; the figures are the busiest rank's,
  without the gathering of sharded weights or of results; nothing asks whether a model fits a GPU
  inner loop: instructions of the machine code for sm_90 on every GPU, by the path that is taken
  exact eigenvalues: two launches for each column of a matrix, as a library without batches needs
"""
REACHED_MEMORY, REACHED_ARITHMETIC = 0.85, 0.6
BARRIER, LAUNCH = 2e-6, 5e-6  # seconds
TOKENS, MFU = 32768, 0.4

_THREADS, _LANES, _WARPS = 256, 32, 8
_SCHEDULERS = 4  # of a multiprocessor
_SHARED_PER_CLOCK = 128  # bytes that shared memory moves
_PANEL_BYTES = 2 * 16 * SEGMENT


@dataclass(frozen=True)
class Loop:
    """The inner loop of the spectral kernel: one panel of 32 KiB of one block.

    Instructions were counted in the machine code for sm_90, by the path that is taken; `exchange`
    is warp 0's alone. Dependent chains are those of the code in clocks: 16 mma of 24 clocks, five
    barriers of 30, two sums through shared memory.

    Attributes:
        fetch: Instructions of a warp that start the copies of the next panel, of a matrix with
            contiguous rows: four turns of a loop.
        products: Of a warp, for W x and W^T t.
        exchange: Of warp 0, for t of the block, and of each other block of the team.
        mma, fma: Of a warp.
        shared: Bytes through shared memory.
        chain: Clocks from the arrival of a panel to its end, without issuing.
        registers, block_shared: Of the kernel, for its occupancy.
    """

    fetch: int
    products: int
    exchange: tuple[int, int]
    mma: int
    fma: int
    shared: int
    chain: int
    registers: int = 128
    block_shared: int = 100_928


LOOPS = {
    # Panel written once and read twice, x (high and low) once.
    2: Loop(4 * 41, 155, (85, 70), 32, 0, 3 * _PANEL_BYTES + 2 * 2 * PROBES * SEGMENT, 780),
    # The same with x in float for each half of the panel; sums over a warp by shuffles.
    4: Loop(4 * 35, 1016, (60, 50), 0, 512, 3 * _PANEL_BYTES + 4 * FLOAT * PROBES * SEGMENT, 600),
}

# How many loads of 4 bytes a thread has on their way when it advances a run: its loops are unrolled
# four times.
_LOADS = 4
_EXCHANGE_TRIPS = 5  # to L2: write, fence, arrive, poll, read


@dataclass
class Cost:
    """What one refresh takes on one GPU.

    Attributes:
        limits: Seconds that it would take if only this were slow.
        bytes: From and to memory.
        flops: On whatever units the scheme has for them.
    """

    bytes: float
    flops: float
    barriers: int
    limits: dict[str, float] = field(default_factory=dict)
    launches: int = 1

    @property
    def bound(self) -> str:
        return max(self.limits, key=self.limits.__getitem__)

    @property
    def seconds(self) -> float:
        fixed = self.barriers * BARRIER + self.launches * LAUNCH
        return max(self.limits.values()) + fixed


def panel_limits(gpu: Gpu, weight_bytes: int, team: int) -> dict[str, float]:
    """Seconds in which a multiprocessor works off a panel in a long loop, by what is slow.

    Args:
        gpu: All of its multiprocessors are at it.
        weight_bytes: 2 or 4.
        team: Blocks that share the columns of the matrix.
    """
    loop = LOOPS[weight_bytes]
    blocks = _blocks(gpu, loop)
    each = loop.exchange[0] + (loop.exchange[1] * team if team > 1 else 0)
    # The scheduler that has warp 0 is the busiest, and has the warp 4 beside it.
    per_scheduler = _WARPS // _SCHEDULERS
    issue = per_scheduler * (loop.fetch + loop.products) + each
    alone = issue + loop.chain
    waiting = _EXCHANGE_TRIPS * gpu.l2_latency if team > 1 else 0.0
    arrival = gpu.hbm_latency + _PANEL_BYTES / 64 / gpu.clock  # 64 bytes a clock into one of them
    fma = loop.fma * _WARPS * _LANES / gpu.fp32
    return {
        "memory": _PANEL_BYTES * gpu.multiprocessors / (gpu.hbm * REACHED_MEMORY),
        "L2": _PANEL_BYTES * gpu.multiprocessors / (gpu.l2 * REACHED_MEMORY),
        "issue": issue / gpu.clock,
        "arithmetic": (loop.mma * per_scheduler * gpu.mma + fma) / gpu.clock,
        "shared memory": loop.shared / _SHARED_PER_CLOCK / gpu.clock,
        "waiting": max(alone / gpu.clock + waiting, arrival) / blocks,
    }


def memory_share(limits: dict[str, float]) -> float:
    """How near the loop comes to the bandwidth of the memory: 1 where that is what limits it."""
    return limits["memory"] / max(limits.values())


def one_read(gpu: Gpu, plan: Plan) -> Cost:
    """The spectral kernel: products and the advancing of runs in turn, step by step."""
    blocks = min(_blocks(gpu, LOOPS[plan.weight_bytes]) * gpu.multiprocessors, plan.most_blocks)
    limits = [panel_limits(gpu, plan.weight_bytes, int(team)) for team in plan.segments]
    panels = plan.segments * -(-plan.sides[:, 0] // PANEL_ROWS[plan.weight_bytes])
    spread = {
        name: float(sum(n * panel[name] for n, panel in zip(panels, limits, strict=True)))
        / gpu.multiprocessors
        for name in ("issue", "arithmetic", "shared memory")
    }
    moved = float(plan.sides.prod(1).sum()) * plan.weight_bytes + plan.product_bytes()
    spread["memory"] = moved / (gpu.hbm * REACHED_MEMORY)
    spread["L2"] = moved / (gpu.l2 * REACHED_MEMORY)
    # A block alone is slower than its share of a full multiprocessor: the last ones to finish.
    resident = _blocks(gpu, LOOPS[plan.weight_bytes])
    alone = {int(t): p["waiting"] * resident for t, p in zip(plan.segments, limits, strict=True)}
    durations = plan.item_panels * np.vectorize(alone.__getitem__)(plan.item_teams)
    spread["waiting"] = float(_turns(durations, blocks).max())

    advance = dict.fromkeys(("memory", "L2", "waiting"), 0.0)
    written = 0.0
    in_l2 = plan.vector_bytes < gpu.l2_bytes / 2
    flight = _THREADS * FLOAT / (gpu.l2_latency if in_l2 else gpu.hbm_latency)
    for step in range(plan.steps):
        update, products = plan.run_bytes(step)
        total = float((update + products).sum()) * PROBES
        duration = (update + products) / (flight * _LOADS)
        where = "L2" if in_l2 else "memory"
        speed = gpu.l2 if in_l2 else gpu.hbm
        busiest_block = float(_turns(np.repeat(duration, PROBES), blocks).max())
        slow = max(total / (speed * REACHED_MEMORY), busiest_block)
        advance["waiting" if slow == busiest_block else where] += slow
        written += 0.0 if in_l2 else total
    vectors = sum(advance.values())
    named = {name: plan.steps * seconds + vectors for name, seconds in spread.items()}
    moved = plan.weights_read + plan.steps * plan.product_bytes() + written
    return Cost(moved, plan.flops, plan.barriers, named)


def one_read_ideal(gpu: Gpu, plan: Plan) -> Cost:
    """The same if only the weights and the vectors of the products took time."""
    moved = plan.weights_read + plan.steps * plan.product_bytes()
    limits = {"memory": moved / (gpu.hbm * REACHED_MEMORY)}
    return Cost(moved, plan.flops, plan.barriers, limits)


def two_reads(gpu: Gpu, plan: Plan) -> Cost:
    """W x and W^T t one after the other, each from memory."""
    moved = 2 * plan.weights_read + 2 * plan.steps * plan.product_bytes()
    limits = {"memory": moved / (gpu.hbm * REACHED_MEMORY)}
    return Cost(moved, plan.flops, plan.barriers + plan.steps, limits)


def in_l2(gpu: Gpu, plan: Plan) -> Cost:
    """Matrix by matrix, those that fit into 70 % of L2 read from memory once."""
    sizes = plan.sides.prod(1) * float(plan.weight_bytes)
    reads = np.where(sizes < 0.7 * gpu.l2_bytes, 1, plan.steps)
    moved = float((sizes * reads).sum())
    limits = {
        "memory": moved / (gpu.hbm * REACHED_MEMORY),
        "L2": float(sizes.sum()) * plan.steps / (gpu.l2 * REACHED_MEMORY),
    }
    return Cost(moved, plan.flops, (2 * plan.steps + 1) * len(sizes), limits)


def rsvd(gpu: Gpu, plan: Plan) -> Cost:
    """The rsvd kernel: rank 64, 8 more columns, one power iteration; multiply-adds in float32."""
    columns, passes, barriers = 80, 4, 40  # columns come in multiples of 16
    size = float(plan.sides.prod(1).sum())
    flops = 2 * size * columns * passes
    moved = size * plan.weight_bytes * passes
    peak = 2 * gpu.fp32 * gpu.multiprocessors * gpu.clock
    limits = {
        "memory": moved / (gpu.hbm * REACHED_MEMORY),
        "arithmetic": flops / (peak * REACHED_ARITHMETIC),
    }
    return Cost(moved, flops, barriers, limits)


def dot(gpu: Gpu, plan: Plan) -> Cost:
    """The dot kernel: W and G in int8, once. Each element is two conversions to double at a rate of
    16 a clock, and two multiply-adds."""
    size = float(plan.sides.prod(1).sum())
    moved = size * (plan.weight_bytes + 1)
    slots = gpu.multiprocessors * gpu.clock
    limits = {
        "memory": moved / (gpu.hbm * REACHED_MEMORY),
        "arithmetic": size * (2 / 16 + 2 / gpu.fp64) / slots,
    }
    return Cost(moved, 4 * size, 1, limits)


def drift(gpu: Gpu, plan: Plan) -> Cost:
    """The drift kernel: 8 rows of each layer, and what they were in float32."""
    kept = 8 * float(sum(columns for _, columns in plan.matrices))
    moved = kept * (plan.weight_bytes + FLOAT)
    return Cost(moved, 6 * kept, 1, {"memory": moved / (gpu.hbm * REACHED_MEMORY)})


def exact(gpu: Gpu, plan: Plan) -> Cost:
    """Eigenvalues of W^T W in float32 by a library: an estimate from below.

    n^2 m flops for the product, 4/3 n^3 for the tridiagonal form. Half of the latter are n products
    of a matrix and a vector, one after the other, which read n^3 / 6 numbers (one triangle); two
    launches each are assumed.
    """
    m, n = plan.sides.astype(float).T
    flops = float((n * n * m + 4 / 3 * n**3).sum())
    moved = float((n**3 / 6 * FLOAT).sum() + (m * n * plan.weight_bytes).sum())
    peak = 2 * gpu.fp32 * gpu.multiprocessors * gpu.clock
    compute = float((n * n * m + 2 / 3 * n**3).sum()) / (peak * REACHED_ARITHMETIC)
    total = compute + moved / (gpu.hbm * REACHED_MEMORY)
    return Cost(moved, flops, 0, {"arithmetic": total}, launches=int(2 * n.sum()))


SCHEMES: dict[str, Callable[[Gpu, Plan], Cost]] = {
    "exact eigenvalues": exact,
    "two reads per step, ideal": two_reads,
    "one read per step, ideal": one_read_ideal,
    "one read per step, tbfast": one_read,
    "one matrix in L2, ideal": in_l2,
    "rsvd": rsvd,
    "dot": dot,
    "drift": drift,
}


def step_seconds(gpu: Gpu, model: Model) -> float:
    """Of a training step."""
    return 6 * model.parameters * TOKENS / (MFU * gpu.tensor)


def refresh_rows() -> list[dict[str, object]]:
    """A row for every model, GPU, number of ranks and scheme."""
    rows: list[dict[str, object]] = []
    for model in MODELS:
        for ranks in RANKS:
            plan = Plan(busiest(model.matrices, ranks))
            for gpu in GPUS:
                step = step_seconds(gpu, model)
                for name, scheme in SCHEMES.items():
                    cost = scheme(gpu, plan)
                    rows.append(
                        {
                            "status": "modelled",
                            "model": model.name,
                            "gpu": gpu.name,
                            "ranks": ranks,
                            "scheme": name,
                            "gigabytes": f"{cost.bytes / 1e9:.4g}",
                            "teraflops": f"{cost.flops / 1e12:.4g}",
                            "barriers": cost.barriers,
                            "milliseconds": f"{cost.seconds * 1e3:.4g}",
                            "bound_by": cost.bound,
                            "step_milliseconds": f"{step * 1e3:.4g}",
                            "percent_of_step": f"{100 * cost.seconds / step:.4g}",
                        }
                    )
    return rows


def loop_table() -> str:
    """How near the inner loop comes to the bandwidth of the memory."""
    lines = ["inner loop, modelled: microseconds of a multiprocessor per panel of 32 KiB"]
    for gpu in GPUS:
        for weight_bytes, team in ((2, 1), (2, 4), (2, 8), (4, 1), (4, 4)):
            limits = panel_limits(gpu, weight_bytes, team)
            times = "  ".join(f"{name} {1e6 * t:.2f}" for name, t in limits.items())
            label = f"{gpu.name} {8 * weight_bytes}-bit, team of {team}"
            lines.append(f"  {label:26} {100 * memory_share(limits):4.0f} % of memory: {times}")
    return "\n".join(lines)


def refresh_table(rows: Sequence[dict[str, object]], ranks: int) -> str:
    """Milliseconds of a refresh and, in brackets, percent of a step, by GPU."""
    lines = [f"refresh of all layers over {ranks} rank(s), modelled: ms (% of a training step)"]
    for model in MODELS:
        for scheme in SCHEMES:
            chosen = [
                r
                for r in rows
                if (r["model"], r["scheme"], r["ranks"]) == (model.name, scheme, ranks)
            ]
            cells = "".join(
                f"{r['gpu']:>6} {r['milliseconds']:>7} ({r['percent_of_step']:>8})" for r in chosen
            )
            lines.append(f"  {model.name:13} {scheme:26}{cells}")
    return "\n".join(lines)


def main() -> None:
    rows = refresh_rows()
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(ASSUMPTIONS.strip(), loop_table(), sep="\n\n")
    for ranks in RANKS:
        print("", refresh_table(rows, ranks), sep="\n")
    print(f"\n{len(rows)} rows in {RESULTS}")


def _blocks(gpu: Gpu, loop: Loop) -> int:
    """Of the spectral kernel on one multiprocessor."""
    return resident_blocks(gpu.target, _THREADS, loop.registers, loop.block_shared)


def _turns(durations: np.ndarray, blocks: int) -> np.ndarray:
    """How long each of the blocks is busy when they take jobs in turn."""
    return np.bincount(np.arange(len(durations)) % blocks, weights=durations)


if __name__ == "__main__":
    main()
