"""Logs: how every process of ours writes them, and lines that somebody outside can cause as often as he likes."""

from __future__ import annotations

import logging
import os
import time

MAX_LINES = 10
INTERVAL_S = 10.0


def configure_logging(name: str) -> None:
    """Send logs to stderr with the process's name; level from ANABRANCH_LOG (default INFO)."""
    level = os.environ.get("ANABRANCH_LOG", "INFO").upper()
    logging.basicConfig(
        level=logging.getLevelNamesMapping().get(level, logging.INFO),
        format=f"%(asctime)s.%(msecs)03d %(levelname).1s {name} %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )


class LimitedLog:
    """Writes the first lines of each interval and counts the others. For one thread.

    Args:
        logger: where the lines go.
        max_lines: in each interval.

    Attributes:
        num_warnings: all lines since the start, those that were not written included.
    """

    def __init__(self, logger: logging.Logger, *, max_lines: int = MAX_LINES, interval_s: float = INTERVAL_S) -> None:
        self._logger = logger
        self._max_lines = max_lines
        self._interval_s = interval_s
        self._begins_s = float("-inf")
        self.num_warnings = 0
        self._num_lines = 0
        self._num_hidden = 0

    def warning(self, text: str) -> None:
        """Write a line, unless there were too many; the first after a pause tells how many were not written."""
        self.num_warnings += 1
        now = time.monotonic()
        if now - self._begins_s >= self._interval_s:
            self._begins_s = now
            self._num_lines = 0
        if self._num_lines >= self._max_lines:
            self._num_hidden += 1
            return
        self._num_lines += 1
        more = f" (and {self._num_hidden} such lines that were not written)" if self._num_hidden else ""
        self._num_hidden = 0
        if self._num_lines == self._max_lines:
            more += f" (no more such lines for up to {self._interval_s:g} s)"
        self._logger.warning("%s%s", text, more)
