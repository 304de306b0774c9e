"""Streams that are not as usual; each command with broken ones is in `tests/unit/launch/test_streams.py`."""

from __future__ import annotations

import io
import os
import threading

import pytest

from anabranch.system.standard_streams import OutputLost, _Error, _Output
from tests.support.waiting import WAIT_S

pytestmark = pytest.mark.unit

DATA = b"x" * (1 << 20)


def test_a_pipe_that_does_not_block_gets_everything() -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    got = bytearray()

    def read() -> None:
        while data := os.read(read_end, 65536):
            got.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    with io.BufferedWriter(_Output(write_end, "w")) as file:
        file.write(DATA)
    reader.join(WAIT_S)
    os.close(read_end)
    assert bytes(got) == DATA


def test_errors_to_a_full_pipe_that_does_not_block_are_dropped() -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with io.TextIOWrapper(io.BufferedWriter(_Error(write_end, "w")), line_buffering=True) as file:
        for _ in range(100):
            print("x" * 8000, file=file)
    os.close(read_end)


def test_output_is_lost_aloud_and_errors_quietly() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with _Output(write_end, "w", closefd=False) as file, pytest.raises(OutputLost) as lost:
        file.write(DATA)
    assert lost.value.broken_pipe
    with _Error(write_end, "w") as file:
        assert file.write(DATA) == len(DATA)
