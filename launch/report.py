"""Errors as a command shows them: one line that says what to do, and an exit code; never a traceback."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from typing import NoReturn, ParamSpec

import typer

from anabranch.errors import AnabranchError, ConfigError, InvalidRequest, UnknownModel, UnsupportedArchitecture
from anabranch_client import ClientError
from anabranch_client import InvalidRequest as ClientInvalidRequest
from launch.show import err
from launch.terminal_text import said

P = ParamSpec("P")

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
_USAGE_ERRORS = (ConfigError, InvalidRequest, UnknownModel, UnsupportedArchitecture, ClientInvalidRequest)


def fail(message: str, code: int = EXIT_FAILED) -> NoReturn:
    """Print `error: message` to stderr and end with `code`."""
    err.print(f"[bold red]error:[/bold red] {said(message)}", soft_wrap=True)
    raise typer.Exit(code)


def warn(message: str) -> None:
    """Print `warning: message` to stderr."""
    err.print(f"[bold yellow]warning:[/bold yellow] {said(message)}", soft_wrap=True)


def interrupt_on_signals() -> None:
    """Let SIGTERM and SIGHUP clean up as Ctrl-C does, and SIGINT too where a shell had it ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)


def reported(command: Callable[P, None]) -> Callable[P, None]:
    """Make a command end with a line and an exit code where it would raise one of our errors."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except _USAGE_ERRORS as error:
            fail(str(error), EXIT_USAGE)
        except (AnabranchError, ClientError) as error:
            fail(str(error))
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except OSError as error:
            # No room, no permission, no such place: what the command needed and the system refused.
            where = f"{error.filename}: " if error.filename else ""
            fail(f"{where}{error.strerror or error}")

    return wrapped
