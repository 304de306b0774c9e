"""Failures of what is done again and again: said once each, and given up on when nothing else comes."""

from __future__ import annotations

import logging
from collections import OrderedDict

from anabranch.errors import AnabranchError

logger = logging.getLogger(__name__)

MAX_IN_A_ROW = 16
MAX_KNOWN = 64


class Faults:
    """Counts failures. One thread calls.

    The first of each error is logged, with a traceback where it is none of `AnabranchError`; after that only how
    often it came, each time that the number has a digit more.

    Args:
        what: fails, in words.
        max_in_a_row: failures without a success in between after which it is given up.
    """

    def __init__(self, what: str, max_in_a_row: int = MAX_IN_A_ROW) -> None:
        self._what = what
        self._max_in_a_row = max_in_a_row
        self._num_in_a_row = 0
        self._known: OrderedDict[str, int] = OrderedDict()

    def passed(self) -> None:
        """It succeeded."""
        self._num_in_a_row = 0

    def failed(self, error: Exception) -> bool:
        """It failed; whether to give up now."""
        self.log(error)
        self._num_in_a_row += 1
        return self._num_in_a_row == self._max_in_a_row

    def log(self, error: Exception) -> None:
        """Say that it failed, unless that has been said."""
        name = f"{type(error).__name__}: {str(error)[:200]}"
        count = self._known.pop(name, 0) + 1
        self._known[name] = count
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        if count > 1:
            if count == 10 ** (len(str(count)) - 1):
                logger.error("%s: %s (%d times)", self._what, name, count)
        elif isinstance(error, AnabranchError):
            logger.warning("%s: %s", self._what, name)
        else:
            logger.error("%s: %s", self._what, name, exc_info=error)
