"""The other process of the transport's tests: a plane that is told what to do on standard input.

Every line of JSON is answered with one. `receive` starts with the process; payloads go to one buffer.
    {"do": "address"}                                    -> {"plane": address}
    {"do": "connect", "address": ...}                    -> {}
    {"do": "send", "num_bytes": n, "times": t}           -> {}          posts messages and returns
    {"do": "seen"}                                       -> {"headers": n, "payloads": n, "lost": [error names]}
"""

from __future__ import annotations

import json
import sys

from transport.planes import Link, Plane, PlaneHandler, create_plane
from transport.planes.ucx import UcxPlane

MAX_BYTES = 64 << 20


def make_plane(kind: str, handler: PlaneHandler) -> Plane:
    """A plane by name; `ucx-net` is UCX without shared memory, as between hosts."""
    return UcxPlane(handler, transports="tcp,self") if kind == "ucx-net" else create_plane(kind, handler)


class Receiving:
    """Takes everything into one buffer and counts."""

    def __init__(self) -> None:
        self.headers = 0
        self.payloads = 0
        self.lost: list[str] = []
        self._buffer = memoryview(bytearray(MAX_BYTES))

    def on_header(self, link: Link, header: bytes, payload_bytes: int) -> memoryview | None:
        self.headers += 1
        return self._buffer[:payload_bytes]

    def on_payload(self, link: Link, header: bytes, buffer: memoryview) -> None:
        self.payloads += 1

    def on_lost(self, link: Link, error: Exception) -> None:
        self.lost.append(type(error).__name__)


def main(kind: str) -> None:
    receiving = Receiving()
    plane = make_plane(kind, receiving)
    payload = memoryview(bytearray(MAX_BYTES))
    links: list[Link] = []
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, object] = {}
        match command["do"]:
            case "address":
                answer = {"plane": plane.address}
            case "connect":
                links.append(plane.connect(command["address"], 10.0))
            case "send":
                for i in range(command["times"]):
                    links[-1].send(b"%d" % i, payload[: command["num_bytes"]])
            case "seen":
                answer = {"headers": receiving.headers, "payloads": receiving.payloads, "lost": receiving.lost}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
