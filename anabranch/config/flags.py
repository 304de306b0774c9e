"""A configuration struct as command-line flags, and back: one source for names, defaults and help.

The help of a flag is the line of its attribute in the struct's docstring.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Sequence
from typing import Literal, TypeVar, get_args, get_origin

import click
import msgspec

from anabranch.errors import ConfigError

T = TypeVar("T", bound=msgspec.Struct)


def attribute_help(struct: type[msgspec.Struct]) -> dict[str, str]:
    """The `Attributes:` section of a docstring: field -> text; `a, b: text` documents both."""
    section = (struct.__doc__ or "").partition("Attributes:")[2]
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        match = re.match(r"^\s{4,8}([a-z_][\w, ]*): (.*)$", line)
        if match:
            names = [name.strip() for name in match[1].split(",")]
            found.update(dict.fromkeys(names, match[2]))
        elif line.strip():
            found.update({name: f"{found[name]} {line.strip()}" for name in names})
    return found


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class _Items(click.ParamType[tuple[object, ...]]):
    """A comma-separated tuple."""

    name = "a,b,..."

    def __init__(self, item: type) -> None:
        self.item = item

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[object, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self.item(part) for part in str(value).split(",") if part)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _click_type(hint: object) -> tuple[click.ParamType[typing.Any], bool]:
    """The click type of a field, and whether it is a switch."""
    if get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
    if get_origin(hint) is Literal:
        return click.Choice([str(arg) for arg in get_args(hint)]), False
    if get_origin(hint) is tuple:
        return _Items(get_args(hint)[0]), False
    if hint is bool:
        return click.BOOL, True
    if hint is int:
        return click.INT, False
    return (click.FLOAT if hint is float else click.STRING), False


def _options(struct: type[msgspec.Struct], defaults: dict[str, object]) -> list[click.Parameter]:
    helps = attribute_help(struct)
    hints = typing.get_type_hints(struct)
    options: list[click.Parameter] = []
    for field in msgspec.structs.fields(struct):
        kind, switch = _click_type(hints[field.name])
        flag = _flag(field.name)
        default = defaults.get(field.name, field.default)
        required = default is msgspec.NODEFAULT and field.default_factory is msgspec.NODEFAULT
        if default is msgspec.NODEFAULT and not required:
            default = typing.cast(typing.Any, field.default_factory)()
        names = [f"{flag}/--no-{flag[2:]}" if switch else flag, field.name]
        text = helps.get(field.name, "")
        if required:
            options.append(click.Option(names, type=kind, required=True, help=text))
        else:
            shown = not isinstance(default, tuple) or bool(default)
            options.append(click.Option(names, type=kind, default=default, show_default=shown, help=text))
    return options


def parse_flags(
    struct: type[T], argv: Sequence[str], *, prog: str, about: str, defaults: dict[str, object] | None = None
) -> T:
    """Read `argv` into `struct`; prints help or a usage error and exits as command-line programs do.

    Args:
        about: first paragraph of `--help`.
        defaults: values that replace the struct's own defaults.
    """
    command = click.Command(
        prog, params=_options(struct, defaults or {}), help=about, context_settings={"max_content_width": 120}
    )
    try:
        with command.make_context(prog, list(argv)) as context:
            return msgspec.convert(context.params, struct)
    except click.exceptions.Exit as done:
        raise SystemExit(done.exit_code) from None
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except (ConfigError, msgspec.ValidationError) as error:
        click.echo(f"Error: {error}", err=True)
        raise SystemExit(2) from None


def to_flags(config: msgspec.Struct) -> list[str]:
    """The flags that `parse_flags` reads back into an equal struct."""
    argv: list[str] = []
    for field in msgspec.structs.fields(type(config)):
        value = getattr(config, field.name)
        if value is None or value == field.default:
            continue
        flag = _flag(field.name)
        if isinstance(value, bool):
            argv.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, tuple):
            argv += [flag, ",".join(str(item) for item in value)]
        else:
            argv += [flag, str(value)]
    return argv
