"""The segment as a file descriptor: making it, saying where it is, opening another rank's."""

from __future__ import annotations

import fcntl
import os
import struct

import msgspec

TOKEN_BYTES = 16


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """Where a segment is to be had.

    Attributes:
        pid, fd: its owner, and the owner's descriptor.
        token: random; also in the segment's header, so that another file under that number is refused.
    """

    pid: int
    fd: int
    token: bytes

    def as_numbers(self) -> list[int]:
        """The ticket as four int64, to be gathered."""
        low, high = struct.unpack("<qq", self.token)
        return [self.pid, self.fd, low, high]

    @classmethod
    def from_numbers(cls, numbers: list[int]) -> Ticket:
        """Undo `as_numbers`."""
        pid, fd, *token = numbers
        return cls(pid=pid, fd=fd, token=struct.pack("<qq", *token))


def make_segment(num_bytes: int) -> int:
    """A memfd that can be neither shrunk nor grown, so that reading it never faults; its pages come with use."""
    fd = os.memfd_create("anabranch-group", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_segment(ticket: Ticket) -> int | None:
    """A descriptor of our own for another process's segment; None where the process or its descriptor is gone."""
    try:
        return os.open(f"/proc/{ticket.pid}/fd/{ticket.fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
