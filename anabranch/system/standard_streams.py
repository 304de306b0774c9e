"""Standard input, output and error of a command, whatever state they are in when it starts.

A closed descriptor is occupied, so that no socket or file gets its number. What cannot be written to standard
error is dropped: a command goes on without an audience. What cannot be written to standard output is lost, and a
command whose output is lost must not end as if all were well.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

EXIT_OUTPUT_LOST = 1
EXIT_BROKEN_PIPE = 141  # what a shell shows for a process that SIGPIPE ended


class OutputLost(Exception):
    """Standard output cannot be written. No OSError: libraries on the way take some of those for their own."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(cause.strerror or str(cause))
        self.broken_pipe = cause.errno == errno.EPIPE


@contextmanager
def standard_streams() -> Iterator[None]:
    """Run a command with streams that can be used.

    Raises:
        SystemExit: standard output was lost, whatever the command's own end was: 141 without a word where its
            reader has gone, else 1 and a line on standard error.
    """
    _occupy_closed()
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8")
    stdout = _Output(1, "w", closefd=False)
    unbuffered = bool(getattr(sys.stdout, "write_through", False))  # python -u, PYTHONUNBUFFERED
    sys.stdout = _text(stdout, sys.stdout, line_buffering=stdout.isatty() or unbuffered)
    sys.stderr = _text(_Error(2, "w", closefd=False), sys.stderr, line_buffering=True)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OutputLost as lost:
        # What is still buffered goes nowhere, so that the interpreter's own flush at exit does not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        with suppress(OutputLost):
            sys.stdout.flush()
        if lost.broken_pipe:
            raise SystemExit(EXIT_BROKEN_PIPE) from None
        print(f"error: standard output cannot be written ({lost}); send it to where there is room", file=sys.stderr)
        raise SystemExit(EXIT_OUTPUT_LOST) from None


class _Output(io.FileIO):
    """Standard output; what cannot be written raises OutputLost."""

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        try:
            while (num_bytes := super().write(data)) is None:
                # Some parents leave their pipes non-blocking: there is room again when the reader has read.
                select.select([], [self.fileno()], [])
        except OSError as error:
            raise OutputLost(error) from None
        return num_bytes


class _Error(io.FileIO):
    """Standard error; what cannot be written is dropped."""

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        try:
            num_written: int | None = super().write(data)
        except OSError:
            num_written = None
        # None too where a pipe that does not block is full.
        return len(data) if num_written is None else num_written


def _occupy_closed() -> None:
    """Open what is closed for the opposite of its use, so that reading or writing it fails as it did."""
    for number, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDONLY)):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number, which is this one: those below it are open by now.
            os.open(os.devnull, flags)


def _text(raw: io.FileIO, was: TextIO | None, *, line_buffering: bool) -> io.TextIOWrapper:
    """A text stream in the encoding that the environment chose; characters that it lacks are escaped."""
    encoding = was.encoding if was is not None else "utf-8"
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=encoding, errors="backslashreplace", line_buffering=line_buffering
    )
