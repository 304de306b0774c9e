"""Log lines that say which process speaks."""

from __future__ import annotations

import logging
import os


def configure_logging(name: str) -> None:
    """Send logs to stderr with the process's name; level from ANABRANCH_LOG (default INFO)."""
    level = os.environ.get("ANABRANCH_LOG", "INFO").upper()
    logging.basicConfig(
        level=logging.getLevelNamesMapping().get(level, logging.INFO),
        format=f"%(asctime)s.%(msecs)03d %(levelname).1s {name} %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
