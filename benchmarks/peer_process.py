"""A peer engine in a child process of its own virtual environment, asked over a pipe."""

from __future__ import annotations

import json
import selectors
import subprocess
import time
from pathlib import Path

START_TIMEOUT_S = 180.0
RUN_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0


class PeerError(RuntimeError):
    """A peer that cannot start, fails, or gives no answer in time; the message names the option."""


class PeerProcess:
    """One peer, `run_NAME.py` of `benchmarks/peers`, under `folder`/bin/python."""

    def __init__(
        self, option: str, script: str, folder: Path, *, model: str, threads: int, max_batch: int, num_tokens: int
    ) -> None:
        self.option = option
        python = folder / "bin" / "python"
        if not python.exists():
            raise PeerError(f"{option}: {folder} is no virtual environment: it has no bin/python")
        self._unread = b""
        self._process = subprocess.Popen(
            [str(python), str(Path(__file__).parent / "peers" / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        settings = {"model": model, "threads": threads, "max_batch": max_batch, "num_tokens": num_tokens}
        try:
            self._ask(settings, START_TIMEOUT_S)
        except PeerError:
            self.close()
            raise

    def run(self, prompts: list[list[int]], max_tokens: int) -> list[float]:
        """Seconds of each decode step of all prompts together."""
        steps_s = self._ask({"prompts": prompts, "max_tokens": max_tokens}, RUN_TIMEOUT_S).get("steps_s")
        if not isinstance(steps_s, list) or not steps_s:
            raise PeerError(f"{self.option}: the peer measured no step")
        return [float(taken_s) for taken_s in steps_s]

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT_S)

    def _ask(self, message: dict[str, object], timeout_s: float) -> dict[str, object]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise PeerError(f"{self.option}: the peer ended") from error
        answer: dict[str, object] = json.loads(self._line(timeout_s))
        if "error" in answer:
            raise PeerError(f"{self.option}: {answer['error']}")
        return answer

    def _line(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        deadline_s = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, deadline_s - time.monotonic())):
                    raise PeerError(f"{self.option}: no answer within {timeout_s:g} s")
                data = self._process.stdout.read1(65536)  # type: ignore[attr-defined]
                if not data:
                    raise PeerError(f"{self.option}: the peer ended without an answer")
                self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line
