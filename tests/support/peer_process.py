"""The other process of a test: a module that answers each line of JSON on its standard input with one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

WAIT_S = 30.0
_ROOT = Path(__file__).parents[2]


class PeerProcess:
    """`python -m MODULE ARGUMENTS`.

    Attributes:
        addresses: its answer to `{"do": "address"}`.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.addresses = self.ask(do="address")

    def ask(self, **command: object) -> dict[str, object]:
        """Send a command and wait for the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()
        answer: dict[str, object] = json.loads(self.process.stdout.readline())
        return answer

    def kill(self) -> None:
        """End it at once, also where it is stopped."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


@contextmanager
def peer_processes(module: str, *arguments: str) -> Iterator[Callable[[], PeerProcess]]:
    """What starts processes that end with the block."""
    peers: list[PeerProcess] = []

    def start() -> PeerProcess:
        peers.append(PeerProcess(module, *arguments))
        return peers[-1]

    try:
        yield start
    finally:
        for peer in peers:
            if peer.process.returncode is None:
                peer.process.send_signal(signal.SIGCONT)
                peer.kill()
