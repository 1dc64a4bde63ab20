"""Reads what ptxas and cuobjdump print about a compiled kernel."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

# Instructions by what they keep busy. The first pattern that fits counts.
_CLASSES = {
    "ffma": r"FFMA2?",
    "dfma": r"DFMA",
    "mma": r"[A-Z]*MMA",  # after the two above: tensor cores
    "lds": r"LDSM?",
    "ldgsts": r"LDGSTS",
    "ldg": r"LDG",
    "sts": r"STS",
    "bar": r"BAR",
    "other": r".*",
}
MIX = (*_CLASSES, "ld128")
_ALL = re.compile("|".join(f"(?P<{name}>{pattern})\\Z" for name, pattern in _CLASSES.items()))
_DYNAMIC = "dynamic_shared_of_"  # see gpu_static.py

_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_PROPERTIES = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_FUNCTION = re.compile(r"^\s*Function : (\w+)")
_INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)([.\w]*)([^;]*)"
)
_MULTIPLIES = ("ffma", "dfma", "mma")
_WORK = 8  # multiply-adds from which on a loop counts as one that works


@dataclass
class Resources:
    """What one kernel takes, in the words of ptxas; bytes but for the registers of a thread."""

    kernel: str
    registers: int = 0
    spills: int = 0
    stack: int = 0
    shared_static: int = 0
    shared_dynamic: int | None = None  # None: gpu_static.py does not know this kernel


def resources(log: str) -> list[Resources]:
    """The kernels in the output of ``ptxas -v``.

    Spills and stack of functions that were not inlined belong to the kernel before them, as ptxas
    lists them so. A kernel named ``dynamic_shared_of_X<bytes>`` is none: it carries a number to X.
    """
    found: list[Resources] = []
    dynamic: dict[str, int] = {}
    for line in log.splitlines():
        if entry := _ENTRY.search(line):
            name = kernel_name(entry[1])
            found.append(Resources(name))
            if name.startswith(_DYNAMIC):
                bare = name.removeprefix(_DYNAMIC).partition("<")[0]
                dynamic[bare] = _template_number(entry[1])
        elif not found:
            continue
        elif properties := _PROPERTIES.search(line):
            found[-1].stack += int(properties[1])
            found[-1].spills += int(properties[2]) + int(properties[3])
        elif used := _USED.search(line):
            found[-1].registers = int(used[1])
            if shared := _SHARED.search(line):
                found[-1].shared_static = int(shared[1])
    kernels = [r for r in found if not r.kernel.startswith(_DYNAMIC)]
    for kernel in kernels:
        kernel.shared_dynamic = dynamic.get(kernel.kernel.partition("<")[0])
    return kernels


def instruction_mix(sass: str) -> dict[str, Counter[str]]:
    """For each kernel in the output of ``cuobjdump -sass``, how many instructions of each class.

    ``ld128`` counts loads of 16 bytes from global memory once more.
    """
    return {kernel: _mix(code) for kernel, code in _listings(sass).items()}


def spills_in_loops(sass: str) -> dict[str, int]:
    """For each kernel, how often its innermost loops that multiply go to the thread's own memory.

    There what has no register lies, and arrays whose place is only known at run time. A loop is a
    jump back and what it jumps over; one with fewer than 8 multiply-adds, or with a call, does not
    count.
    """
    found = {}
    for kernel, code in _listings(sass).items():
        loops = {
            (int(to[1], 16), i.address)
            for i in code
            if i.name == "BRA" and (to := re.search(r"0x([0-9a-f]+)", i.operands))
        }
        loops = {(first, last) for first, last in loops if first < last}
        found[kernel] = 0
        for first, last in loops:
            if any(first <= f and e <= last and (f, e) != (first, last) for f, e in loops):
                continue
            body = [i for i in code if first <= i.address <= last]
            mix = _mix(body)
            if any(i.name == "CALL" for i in body):
                continue
            if sum(mix[kind] for kind in _MULTIPLIES) >= _WORK:
                found[kernel] += sum(i.name in ("LDL", "STL") for i in body)
    return found


@dataclass(frozen=True)
class _Instruction:
    address: int
    name: str
    modifiers: str
    operands: str


def _listings(sass: str) -> dict[str, list[_Instruction]]:
    found: dict[str, list[_Instruction]] = {}
    code: list[_Instruction] = []
    for line in sass.splitlines():
        if function := _FUNCTION.match(line):
            code = found[kernel_name(function[1])] = []
        elif (match := _INSTRUCTION.match(line)) and match[2] != "NOP":
            code.append(_Instruction(int(match[1], 16), *match.groups()[1:]))
    return {name: code for name, code in found.items() if not name.startswith(_DYNAMIC)}


def _mix(code: Iterable[_Instruction]) -> Counter[str]:
    mix = Counter(dict.fromkeys(MIX, 0))
    for instruction in code:
        match = _ALL.match(instruction.name)
        assert match is not None
        assert match.lastgroup is not None
        mix[match.lastgroup] += 1
        if match.lastgroup in ("ldg", "ldgsts") and ".128" in instruction.modifiers:
            mix["ld128"] += 1
    return mix


def kernel_name(mangled: str) -> str:
    """The bare name of a mangled function, with template arguments as they were mangled.

    ``_ZN2tb3gpu4stepILi8EEEvPf`` is ``step<Li8E>``.
    """
    rest, name = re.sub(r"^_ZN?", "", mangled), mangled
    while length := re.match(r"\d+", rest):
        start, count = length.end(), int(length[0])
        name, rest = rest[start : start + count], rest[start + count :]
    template = re.match(r"I(.+?E)E", rest)
    return f"{name}<{template[1]}>" if template else name


def _template_number(mangled: str) -> int:
    match = re.search(r"IL[a-z](\d+)E", mangled)
    if match is None:
        raise ValueError(f"no number in {mangled}")
    return int(match[1])
