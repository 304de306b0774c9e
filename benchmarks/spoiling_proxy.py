"""A TCP proxy before an FFN node that spoils bytes of what comes back."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

STOP_TIMEOUT_S = 10.0


class SpoilingProxy:
    """Stands before an address of the M2N channel's `tcp`, from construction until `close`.

    Args:
        address: of the node.
        good_bytes: pass between two that are changed.
        most: so many are changed, of all connections together.
        spoilt: told of each.

    Attributes:
        address: what attention nodes are told in place of the node's.
        num_spoilt: bytes that were changed.
    """

    def __init__(
        self, address: str, good_bytes: int, *, most: int = 1, spoilt: Callable[[], None] = lambda: None
    ) -> None:
        scheme, host, port, token = address.split(":")
        self.num_spoilt = 0
        self._target = (host, int(port))
        self._good_bytes = self._left = good_bytes
        self._most = most
        self._spoilt = spoilt
        self._counting = threading.Lock()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"{scheme}:127.0.0.1:{self._server.getsockname()[1]}:{token}"
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        """End all connections."""
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for each in self._sockets:
            each.close()
        for thread in self._threads:
            thread.join(STOP_TIMEOUT_S)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            self._sockets += [near, far]
            for source, sink, spoils in ((near, far, False), (far, near, True)):
                thread = threading.Thread(target=self._pump, args=(source, sink, spoils), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, spoils: bool) -> None:
        try:
            while data := bytearray(source.recv(1 << 16)):
                if spoils:
                    self._spoil(data)
                sink.sendall(data)
        except OSError:
            pass
        for each in (source, sink):
            each.close()

    def _spoil(self, data: bytearray) -> None:
        with self._counting:
            if self.num_spoilt < self._most and self._left < len(data):
                data[self._left] ^= 0x10
                self.num_spoilt += 1
                self._left += self._good_bytes
                self._spoilt()
            self._left = max(0, self._left - len(data))
