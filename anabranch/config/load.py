"""A topology file -> `Topology`: strict reading, then what depends on this machine.

Each error is a `ConfigError` that names the dotted key, the value and the remedy.
"""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from dataclasses import is_dataclass
from pathlib import Path

import msgspec
import yaml

from anabranch.config.topology import AnyPoolConfig, Topology, file_key
from anabranch.errors import ConfigError
from anabranch.system.files import read_regular

# PyYAML reads some 20 KB in a second where everything is a number of a list.
MAX_FILE_BYTES = 64 << 10
MAX_DEPTH = 32
MAX_NODES = 16_384
MAX_ERROR_CHARS = 500

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}iB": 1 << (10 * (i + 1)) for i, letter in enumerate("KMGT")}
_UNITS |= {f"{letter}B": 1000 ** (i + 1) for i, letter in enumerate("KMGT")}
_UNIT_BY_LOWER = {unit.lower(): factor for unit, factor in _UNITS.items()}


def load_topology(path: Path) -> Topology:
    """Read and check a topology file.

    Raises:
        ConfigError: the file cannot be read, is no YAML mapping, or says something that cannot be.
    """
    try:
        raw = read_regular(path, MAX_FILE_BYTES)
    except OSError as error:
        raise ConfigError("topology file", str(path), f"cannot be read ({error.strerror}); check the path") from None
    try:
        data = yaml.load(raw, Loader=_StrictLoader)  # _StrictLoader is a SafeLoader
    except ConfigError:
        raise
    # What an explicit tag cannot be made of (`!!int x`) raises whatever its constructor stumbles over.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
        text = " ".join(str(error).split())[:MAX_ERROR_CHARS]
        raise ConfigError("topology file", str(path), f"is not valid YAML: {text}") from None
    return topology_from(data)


def topology_from(data: object) -> Topology:
    """Turn a parsed mapping into a checked `Topology`.

    Raises:
        ConfigError: an unknown key, a wrong type or a bad value.
    """
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError("topology", type(data).__name__, "must be a mapping, such as `model: smollm2-135m`")
    if "colocated" in data and "pools" not in data:
        # The short form of a single pool: `{model: ..., colocated: {...}}`.
        data = {**data, "pools": {"colocated": data["colocated"]}}
        del data["colocated"]
    options = _by_field(data, Topology, "")
    try:
        topology = msgspec.convert(options, Topology)
    except msgspec.ValidationError as error:
        raise _key_error(error, options) from None
    return check_topology(topology)


def check_topology(topology: Topology) -> Topology:
    """Check a topology, also one that was built in Python, against this machine; gives it back.

    Raises:
        ConfigError: cores that this process may not use, or that do not deal out evenly.
    """
    for role, pool in topology.pools.by_role.items():
        _check_cores(f"pools.{role}.cores", pool)
    return topology


def parse_size(key: str, value: object) -> object:
    """Bytes of a size such as "512MiB" or "1.5 GB"; what is no text is left as it is.

    Raises:
        ConfigError: the text is not a size.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)\s*", value)
    factor = _UNIT_BY_LOWER.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ConfigError(key, value, 'give bytes or a size such as "512MiB" or "1GiB"')
    return int(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor


def usable_cores() -> tuple[int, ...]:
    """CPU ids that this process may run on, in order."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def _check_cores(key: str, pool: AnyPoolConfig) -> None:
    cores = pool.cores
    if not cores:
        return
    known = usable_cores()
    if len(set(cores)) != len(cores):
        raise ConfigError(key, list(cores), "names a core twice; name each once")
    unknown = [core for core in cores if core not in known]
    if unknown:
        have = ", ".join(map(str, known))
        raise ConfigError(key, list(cores), f"core {unknown[0]} cannot be used here; this process may use {have}")
    if len(cores) % pool.workers:
        raise ConfigError(
            key,
            list(cores),
            f"{len(cores)} cores do not deal out evenly to {pool.workers} workers; name a multiple",
        )


def _by_field(data: object, options: type, prefix: str) -> object:
    """What a file says, by the names of fields instead of keys, with sizes in bytes. Unknown keys raise ConfigError."""
    if not isinstance(data, dict):
        return data
    hints = typing.get_type_hints(options)
    names = {file_key(name): name for name in hints}
    found: dict[str, object] = {}
    for key, value in data.items():
        dotted = f"{prefix}{key}"
        if key not in names:
            close = difflib.get_close_matches(str(key), names, n=1)
            known = f"did you mean {prefix}{close[0]}?" if close else f"known keys: {', '.join(names)}"
            raise ConfigError(dotted, value, f"unknown key; {known}")
        inner = _options_of(hints[names[key]])
        if inner is not None:
            value = _by_field(value, inner, f"{dotted}.")
        elif names[key] != key:
            value = parse_size(dotted, value)
        elif isinstance(value, bool):
            value = _word_of(value, hints[names[key]])
        found[names[key]] = value
    return found


def _word_of(value: bool, hint: object) -> object:
    """What YAML has read as a truth value although the option's words are `on` and `off`."""
    word = "on" if value else "off"
    return word if word in typing.get_args(hint) else value


def _options_of(hint: object) -> type | None:
    """The dataclass inside a field's type, `X` or `X | None`."""
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((choice for choice in choices if isinstance(choice, type) and is_dataclass(choice)), None)


def _key_error(error: msgspec.ValidationError, data: object) -> ConfigError:
    """msgspec's words, or our own, with its `$.a.b[0]` path as a dotted key, and the value found there."""
    cause = error.__cause__ if isinstance(error.__cause__, ConfigError) else None
    text, found, path = str(error).removeprefix(str(cause or "")).rpartition(" - at `$")
    if not found:
        text, path = path, ""
    steps = re.findall(r"\.([^.\[\]`]+)|\[(\d+)\]", path)
    key = "".join(f".{file_key(name)}" if name else f"[{index}]" for name, index in steps).lstrip(".")
    if cause is not None:
        return ConfigError(".".join(filter(None, (key, file_key(cause.key)))), cause.value, cause.remedy)
    value: object = data
    hint: typing.Any = Topology
    for name, index in steps:
        if isinstance(value, dict):
            value = value.get(name)
        elif isinstance(value, list):
            value = value[int(index)]
        if name:
            hint = typing.get_type_hints(_options_of(hint))[name]
    if text.startswith("Invalid enum value"):
        choices = [str(choice) for choice in typing.get_args(hint)]
        close = difflib.get_close_matches(str(value), choices, n=1)
        text = f"must be one of {', '.join(choices)}" + (f"; did you mean {close[0]}?" if close else "")
    return ConfigError(key or "topology", value, text[:1].lower() + text[1:])


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, where YAML would keep the last silently, and counts and measures.

    An alias counts as all that it stands for: a few lines of aliases of aliases can stand for more than any memory.
    """

    def __init__(self, stream: bytes) -> None:
        super().__init__(stream)
        self._depth = 0
        self._num_nodes = 0
        self._num_nodes_of: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        where = f"line {event.start_mark.line + 1}"
        before = self._num_nodes
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ConfigError("topology file", where, f"is nested deeper than {MAX_DEPTH} levels")
        node: yaml.Node | None = super().compose_node(parent, index)  # type: ignore[arg-type]
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._num_nodes_of:
                raise ConfigError("topology file", where, f"the alias {event.anchor!r} stands for what it is part of")
            self._num_nodes += self._num_nodes_of[id(node)]
        else:
            self._num_nodes += 1
            self._num_nodes_of[id(node)] = self._num_nodes - before
        if self._num_nodes > MAX_NODES:
            raise ConfigError("topology file", where, f"there are more than {MAX_NODES} values up to here")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[typing.Hashable, object]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    line = key_node.start_mark.line + 1
                    raise ConfigError(str(key_node.value), f"line {line}", "the key is given twice; keep one")
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)
