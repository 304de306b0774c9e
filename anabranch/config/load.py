"""A topology file -> `Topology`: strict reading, then every cross-check in one place.

Each error is a `ConfigError` that names the dotted key, the value and the remedy.
"""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from pathlib import Path

import msgspec
import yaml

from anabranch.config.bounds import MAX_SIZE_BYTES, check_count, check_text, is_port
from anabranch.config.topology import PoolConfig, Pools, Topology
from anabranch.errors import ConfigError
from anabranch.parallel.mesh import MAX_RANKS
from anabranch.system.files import read_regular
from anabranch.system.hosts import is_loopback

# PyYAML reads some 20 KB in a second where everything is a number of a list.
MAX_FILE_BYTES = 64 << 10
MAX_DEPTH = 32
MAX_NODES = 16_384
MAX_WORKERS = 256
MAX_PATH_CHARS = 4096
MAX_DEVICE_CHARS = 100
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
    """Turn a parsed mapping into a checked `Topology` whose sizes are bytes.

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
    _reject_unknown_keys(data, Topology, "")
    try:
        topology = msgspec.convert(data, Topology)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise _type_error(error, data) from None
    return check_topology(topology)


def check_topology(topology: Topology) -> Topology:
    """Cross-check a topology, also one that was built in Python; gives it back with sizes in bytes.

    Raises:
        ConfigError: what does not fit together, or does not fit this machine.
    """
    check_text("model", topology.model, MAX_PATH_CHARS)
    check_text("device", topology.device, MAX_DEVICE_CHARS)
    check_count("block_size", topology.block_size, 1)
    check_count("max_context", topology.max_context, 0)
    for key in ("collective_timeout_s", "step_stall_s"):
        if not 0.0 < getattr(topology, key) < 86400.0:
            raise ConfigError(key, getattr(topology, key), "must be above 0 and below 86400")
    if topology.step_stall_s <= topology.collective_timeout_s:
        least_s = topology.collective_timeout_s
        raise ConfigError("step_stall_s", topology.step_stall_s, f"must be above collective_timeout_s ({least_s} s)")
    if not topology.model:
        raise ConfigError("model", topology.model, "name a model (`anabranch models`), a folder or a GGUF file")
    _check_address("grpc", topology.grpc)
    checked = {
        name: _check_pool(f"pools.{name}", pool)
        for name in ("prefill", "decode", "colocated")
        if (pool := getattr(topology.pools, name)) is not None
    }
    return msgspec.structs.replace(topology, pools=Pools(**checked))


def parse_size(key: str, value: int | str, *, least_bytes: int = 1) -> int:
    """Bytes of a size such as 1048576, "512MiB" or "1.5 GB".

    Raises:
        ConfigError: not a size, or less than `least_bytes`.
    """
    remedy = 'give bytes or a size such as "512MiB" or "1GiB"'
    if isinstance(value, bool):
        raise ConfigError(key, value, remedy)
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)\s*", value)
        factor = _UNIT_BY_LOWER.get(match[2].lower()) if match else None
        if match is None or factor is None:
            raise ConfigError(key, value, remedy)
        num_bytes = int(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor
    else:
        num_bytes = value
    if not least_bytes <= num_bytes <= MAX_SIZE_BYTES:
        least = "1 byte" if least_bytes == 1 else f"{least_bytes} bytes"
        raise ConfigError(key, value, f"must be between {least} and {MAX_SIZE_BYTES >> 40} TiB; {remedy}")
    return num_bytes


def usable_cores() -> tuple[int, ...]:
    """CPU ids that this process may run on, in order."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def _check_pool(key: str, pool: PoolConfig) -> PoolConfig:
    for name in ("workers", "max_running", "max_step_tokens"):
        check_count(f"{key}.{name}", getattr(pool, name), 1)
    check_count(f"{key}.threads", pool.threads, 0)
    if pool.workers > MAX_WORKERS:
        raise ConfigError(f"{key}.workers", pool.workers, f"must be at most {MAX_WORKERS} on one machine")
    for degree in ("tp", "cp"):
        check_count(f"{key}.{degree}", getattr(pool, degree), 1)
    if pool.tp * pool.cp > MAX_RANKS:
        raise ConfigError(
            f"{key}.tp x cp",
            f"{pool.tp} x {pool.cp}",
            f"makes {pool.tp * pool.cp} ranks; at most {MAX_RANKS} are allowed",
        )
    _check_cores(f"{key}.cores", pool)
    offload = parse_size(f"{key}.offload", pool.offload, least_bytes=0)
    if pool.preemption == "offload" and offload == 0:
        raise ConfigError(f"{key}.preemption", pool.preemption, "needs host memory; give offload, or choose auto")
    return msgspec.structs.replace(pool, kv_cache=parse_size(f"{key}.kv_cache", pool.kv_cache), offload=offload)


def _check_cores(key: str, pool: PoolConfig) -> None:
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


def _check_address(key: str, address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not is_port(port):
        raise ConfigError(key, address, "give HOST:PORT, such as 127.0.0.1:50051 (port 0: chosen by the system)")
    if not is_loopback(host):
        raise ConfigError(key, address, "is reachable from other machines and there is no TLS; use 127.0.0.1")


def _reject_unknown_keys(data: object, struct: type[msgspec.Struct], prefix: str) -> None:
    if not isinstance(data, dict):
        return
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(struct)}
    for key, value in data.items():
        dotted = f"{prefix}{key}"
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            known = f"did you mean {prefix}{close[0]}?" if close else f"known keys: {', '.join(fields)}"
            raise ConfigError(dotted, value, f"unknown key; {known}")
        inner = _struct_of(fields[key])
        if inner is not None:
            _reject_unknown_keys(value, inner, f"{dotted}.")


def _struct_of(hint: object) -> type[msgspec.Struct] | None:
    """The struct inside a field's type, `X` or `X | None`."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, msgspec.Struct)), None)


def _type_error(error: msgspec.ValidationError, data: object) -> ConfigError:
    """msgspec's words with its `$.a.b[0]` path as a dotted key, and the value found there."""
    text, _, path = str(error).partition(" - at `$")
    path = path.rstrip("`")
    steps = re.findall(r"\.([^.\[\]]+)|\[(\d+)\]", path)
    value: object = data
    for name, index in steps:
        if isinstance(value, dict):
            value = value.get(name)
        elif isinstance(value, list):
            value = value[int(index)]
    key = path.lstrip(".") or "topology"
    if text.startswith("Invalid enum value"):
        leaf = _leaf_type(Topology, [name for name, _ in steps])
        choices = [str(choice) for choice in typing.get_args(leaf)]
        close = difflib.get_close_matches(str(value), choices, n=1)
        text = f"must be one of {', '.join(choices)}" + (f"; did you mean {close[0]}?" if close else "")
    return ConfigError(key, value, text[:1].lower() + text[1:])


def _leaf_type(struct: type[msgspec.Struct], names: list[str]) -> object:
    hint: object = struct
    for name in names:
        inner = _struct_of(hint)
        if inner is None:
            return None
        hint = next(field.type for field in msgspec.structs.fields(inner) if field.encode_name == name)
    return hint


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
