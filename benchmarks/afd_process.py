"""The processes of `benchmarks.afd_side`, as `benchmarks.afd` asks them."""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

from anabranch.system.child_process import python_environment, python_module

MODEL = "smollm2-135m"
BLOCK = 16
CLOSE_TIMEOUT_S = 20.0

Found = dict[str, Any]
"""What a side answers."""


class Side:
    """A process of `benchmarks.afd_side`."""

    def __init__(
        self,
        role: str,
        *,
        cores: Sequence[int],
        dtype: str,
        model: str = MODEL,
        kv_bytes: int = 0,
        merge_wait_us: int = 0,
    ) -> None:
        options = {
            "role": role,
            "model": model,
            "dtype": dtype,
            "cores": list(cores),
            "threads": len(cores) if role == "whole" else 1,
            "kv_bytes": kv_bytes,
            "merge_wait_us": merge_wait_us,
        }
        self._process = subprocess.Popen(
            python_module("benchmarks.afd_side", json.dumps(options)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=python_environment({"OMP_NUM_THREADS": str(options["threads"])}),
            text=True,
        )

    @functools.cached_property
    def ready(self) -> dict[str, Any]:
        """What it says once it has loaded; sides load at the same time until somebody looks."""
        return self._line()

    def ask(self, **question: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self.ready
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._line()

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a side ended with status {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def link(self, node: Mapping[str, Any], *, lanes: int, transport: str = "shm") -> None:
        """Send rows to an FFN side from now on.

        Args:
            node: what it says once it is ready.
        """
        self.ask(nodes=[node], transport=transport, lanes=lanes)

    def decode(self, how: str, *, batch: int, context: int, lanes: int = 1, steps: int) -> Found:
        """Steps of a batch: `remote` with FFN sides, `instant` with answers given at once, or of `whole` layers."""
        return self.ask(how=how, batch=batch, context=context, lanes=lanes, steps=steps)


def at_once(sides: Sequence[Side], run: Callable[[Side], Found]) -> list[Found]:
    """What all sides answer to something that they do at the same time."""
    with ThreadPoolExecutor(len(sides)) as pool:
        return list(pool.map(run, sides))


def kv_bytes(batch: int, context: int, dtype: str, *, num_layers: int = 30) -> int:
    """Of a pool for so many contexts of SmolLM2-135M's heads."""
    return batch * (context + 2 * BLOCK) * 2 * num_layers * 3 * 64 * (4 if dtype == "float32" else 2)
