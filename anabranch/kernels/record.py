"""Recorded steps: what kernels offer that can note a step's work once and repeat it without Python.

A recording fixes everything about a step but the contents of tensors: shapes, addresses, the calls and their
order. Its caller keeps the step's inputs where they are and writes new contents there before it runs a program.
On the CPU a program is a list of native calls (`program.py`). A CUDA graph is one as well: its stream capture is
a recording, its replay is `run`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch


class Program(Protocol):
    """A recorded step.

    Attributes:
        output: what the step returned; `run` writes it anew. Another program of the same memory may use its place:
            it is to be read before that runs.
    """

    @property
    def output(self) -> torch.Tensor: ...

    def run(self) -> None:
        """Repeat the step with what its inputs hold now. Raises what the step itself would raise."""
        ...


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A step that was computed and noted down.

    Attributes:
        output: the step's result, valid whether or not it could be recorded.
        program: repeats it; None: it did something that is not known to be repeatable.
        obstacle: what that was.
    """

    output: torch.Tensor
    program: Program | None
    obstacle: str | None = None


class ProgramMemory(Protocol):
    """Where programs that never run at the same time keep what they compute on their way.

    Attributes:
        num_bytes: taken from the system.
    """

    @property
    def num_bytes(self) -> int: ...


@runtime_checkable
class StepRecorder(Protocol):
    """Kernels that record."""

    def program_memory(self) -> ProgramMemory:
        """Memory of its own for programs to come."""
        ...

    def record(self, step: Callable[[], torch.Tensor], memory: ProgramMemory) -> Recording:
        """Compute a step, and note it down as far as all of its work goes through these kernels.

        Args:
            step: makes no decision that depends on what its input tensors hold. What it computes beside its result and
                somebody keeps stays where it is until that is let go: a program may go on where another one ended.
            memory: made by `program_memory`.
        """
        ...
