"""Entry of the `anabranch` script: the command line, or one line where only the client is installed."""

from __future__ import annotations

import os
import shutil
import sys

from anabranch.system.standard_streams import standard_streams

MIN_COLUMNS = 40
_OURS = ("anabranch", "anabranch_client", "launch", "orchestrator", "prefill", "decode", "runtime", "transport")


def main() -> None:
    """Run the command line."""
    _mend_width()
    with standard_streams():
        try:
            from launch.cli import app
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package in _OURS:
                raise
            print(f"error: {package} is not installed; pip install 'anabranch[server]'", file=sys.stderr)
            raise SystemExit(1) from None
        app()


def _mend_width() -> None:
    """Tables and help need some width, or nothing of them is printed: also where the terminal says that it has none."""
    for name in ("COLUMNS", "LINES", "TERMINAL_WIDTH"):
        number = os.environ.get(name, "")
        if not (number.isascii() and number.isdecimal() and len(number) < 6):
            os.environ.pop(name, None)
    columns = int(os.environ.get("COLUMNS") or shutil.get_terminal_size().columns)
    if columns < MIN_COLUMNS:
        os.environ["COLUMNS"] = str(MIN_COLUMNS)


if __name__ == "__main__":
    main()
