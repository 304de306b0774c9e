"""What a CPU can do, as levels that the compiled kernels are built for; a lower one can be forced.

The kernels are compiled for the machine at hand (`-march=native`). `ANABRANCH_CPU_LEVEL` leaves out what lies above a
level, to see on a large machine what a small one does.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

from anabranch.errors import ConfigError

VARIABLE = "ANABRANCH_CPU_LEVEL"


@dataclass(frozen=True, kw_only=True)
class CpuLevel:
    """One level.

    Attributes:
        name: what `ANABRANCH_CPU_LEVEL` calls it.
        shown: for people.
        left_out: what an x86 compiler for the machine at hand is told, so that this level is the most that it uses.
    """

    name: str
    shown: str
    left_out: tuple[str, ...]


# In the order of what the library's `ab_level` returns.
LEVELS = (
    CpuLevel(name="portable", shown="any CPU (portable)", left_out=("-march=x86-64",)),
    CpuLevel(name="avx2", shown="AVX2", left_out=("-mno-avx512f", "-mno-amx-bf16")),
    CpuLevel(name="avx512", shown="AVX-512", left_out=("-mno-avx512bf16", "-mno-amx-bf16")),
    CpuLevel(name="avx512-bf16", shown="AVX-512 BF16", left_out=("-mno-amx-bf16",)),
    CpuLevel(name="amx", shown="AMX BF16", left_out=()),
)


def forced_level() -> CpuLevel | None:
    """The level that `ANABRANCH_CPU_LEVEL` names; None where it is not set. Raises ConfigError."""
    name = os.environ.get(VARIABLE, "")
    if not name:
        return None
    for level in LEVELS:
        if level.name == name:
            return level
    raise ConfigError(VARIABLE, name, f"must be one of {', '.join(level.name for level in LEVELS)}, or not set")


def flags_of(level: CpuLevel | None) -> tuple[str, ...]:
    """The compiler's flags for a level; None: whatever the machine has."""
    return level.left_out if level is not None and platform.machine() == "x86_64" else ()


def check_reached(wanted: CpuLevel, reached: CpuLevel) -> None:
    """Raise ConfigError where the CPU does not reach a level."""
    if LEVELS.index(reached) < LEVELS.index(wanted):
        raise ConfigError(VARIABLE, wanted.name, f"is more than this CPU has, which is {reached.name}")
