"""No numeric flag of the command line takes a number that makes no sense."""

from __future__ import annotations

import re
import typing

import pytest
from typer.testing import CliRunner

from launch.cli import app

pytestmark = pytest.mark.unit

ARGUMENTS = {"generate": ["hello"], "verify": ["absent.yaml"], "up": ["absent.yaml"]}
SECONDS = ["0", "-1", "nan", "inf", "86400.5", "x"]
BAD: dict[str, dict[str, list[str]]] = {
    "generate": {
        "--timeout": SECONDS,
        "--max-tokens": ["0", "-1", "9" * 30, "9" * 5000, "1.5"],
        "--temperature": ["-0.1", "nan", "inf", "101"],
        "--top-p": ["0", "-1", "nan", "1.01"],
        "--top-k": ["-1", "9" * 30],
        "--seed": ["-1", str(2**63)],
    },
    "verify": {"--max-tokens": ["0", "-1"], "--ready-timeout": SECONDS},
    "up": {"--ready-timeout": SECONDS},
    "models": {},
    "doctor": {},
}
CASES = [(command, flag, value) for command, flags in BAD.items() for flag, values in flags.items() for value in values]


@pytest.mark.parametrize(("command", "flag", "value"), CASES, ids=lambda text: text[:12])
def test_the_flag_is_named(command: str, flag: str, value: str) -> None:
    result = CliRunner().invoke(app, [command, *ARGUMENTS[command], flag, value])
    assert result.exit_code == 2
    assert re.search(rf"Invalid value for '{flag}'", result.stderr)
    assert isinstance(result.exception, SystemExit)


def test_every_numeric_flag_is_in_the_table() -> None:
    found = {
        info.callback.__name__: {
            f"--{name.replace('_', '-')}"
            for name, hint in typing.get_type_hints(info.callback).items()
            if {int, float} & {hint, *typing.get_args(hint)}
        }
        for info in app.registered_commands
        if info.callback is not None
    }
    assert found == {command: set(flags) for command, flags in BAD.items()}
