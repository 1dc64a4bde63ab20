"""The GPUs and the language models that the model of the GPU kernels is evaluated for."""

from __future__ import annotations

from dataclasses import dataclass

Shape = tuple[int, int]


@dataclass(frozen=True)
class Gpu:
    """What one GPU can do, by the second or by the clock.

    Peaks are the vendor's, latencies and the bandwidth of the L2 those of published
    microbenchmarks, from memory: good to some 20 %, and not measured here.

    Attributes:
        target: Compute capability, 90 for 9.0.
        hbm: Peak bandwidth of the memory, bytes per second.
        l2: Bandwidth of the L2 cache, likewise.
        l2_bytes: Its size.
        multiprocessors: Number.
        clock: Hz, under load.
        tensor: Peak of bfloat16 on the tensor cores, flop per second.
        mma: Clocks of a quarter multiprocessor per mma.sync m16n8k16, at their peak rate.
        fp32: Multiply-adds of a multiprocessor per clock.
        fp64: Likewise.
        hbm_latency: Seconds.
        l2_latency: Seconds, of an access or an atomic addition.
    """

    name: str
    target: int
    hbm: float
    l2: float
    l2_bytes: float
    multiprocessors: int
    clock: float
    tensor: float
    mma: float
    fp32: int
    fp64: int
    hbm_latency: float = 650e-9
    l2_latency: float = 170e-9


GPUS = (
    Gpu("A100", 80, 2.04e12, 4.5e12, 40e6, 108, 1.41e9, 312e12, 8, 64, 32),
    Gpu("H100", 90, 3.35e12, 5.5e12, 50e6, 132, 1.755e9, 989e12, 3.2, 128, 64),
    # mma.sync is not what reaches the peak of a B200: as fast as on an H100 is assumed.
    Gpu("B200", 100, 8.0e12, 10e12, 126e6, 148, 1.9e9, 2250e12, 3.2, 128, 64),
)


@dataclass(frozen=True)
class Model:
    """A language model: the shapes of its weight matrices, embeddings included.

    Attributes:
        parameters: What a training step computes with, all but input embeddings.
    """

    name: str
    matrices: tuple[Shape, ...]
    parameters: int


def _llama(
    name: str, layers: int, hidden: int, keys: int, inner: int, vocabulary: int, tied: bool
) -> Model:
    attention = ((hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden))
    block = (*attention, (inner, hidden), (inner, hidden), (hidden, inner))
    ends = ((vocabulary, hidden),) * (1 if tied else 2)
    return Model(name, (*ends, *block * layers), layers * _size(block) + vocabulary * hidden)


def _gpt2(name: str, layers: int, hidden: int, vocabulary: int, positions: int) -> Model:
    # Weights lie (in, out), as transformers has them.
    block = (
        (hidden, 3 * hidden), (hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden),
    )  # fmt: skip
    ends = ((vocabulary, hidden), (positions, hidden))
    return Model(name, (*ends, *block * layers), layers * _size(block) + vocabulary * hidden)


def _size(shapes: tuple[Shape, ...]) -> int:
    return sum(rows * columns for rows, columns in shapes)


# Configurations published with the models.
MODELS = (
    _gpt2("GPT-2 small", 12, 768, 50257, 1024),
    _llama("Llama-3.2-1B", 16, 2048, 512, 8192, 128256, tied=True),
    _llama("Llama-2-7B", 32, 4096, 4096, 11008, 32000, tied=False),
    _llama("Llama-2-70B", 80, 8192, 1024, 28672, 32000, tied=False),
)
