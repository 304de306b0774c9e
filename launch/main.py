"""Entry of the `anabranch` script: the command line, or one line where only the client is installed."""

from __future__ import annotations

import sys

_OURS = ("anabranch", "anabranch_client", "launch", "orchestrator", "prefill", "decode", "runtime", "transport")


def main() -> None:
    """Run the command line."""
    try:
        from launch.cli import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in _OURS:
            raise
        print(f"error: {package} is not installed; pip install 'anabranch[server]'", file=sys.stderr)
        raise SystemExit(1) from None
    app()


if __name__ == "__main__":
    main()
