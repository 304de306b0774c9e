"""JSON files of a model: bounded in bytes, values and depth before anything is made of them."""

from __future__ import annotations

import json
from pathlib import Path

from anabranch.errors import CheckpointError
from anabranch.system.files import read_regular

MAX_CONFIG_BYTES = 4 << 20
MAX_CONFIG_VALUES = 200_000
MAX_DEPTH = 64


def read_bounded(path: Path, *, max_bytes: int, max_values: int | None = None) -> bytes:
    """The bytes of a model's file.

    Args:
        max_values: most JSON values; each costs memory beyond its bytes once parsed. None: it is no JSON.

    Raises:
        CheckpointError: the file is missing, no regular file, unreadable, or too large.
    """
    try:
        data = read_regular(path, max_bytes)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if max_values is not None and (found := sum(map(data.count, (b",", b"[", b"{")))) > max_values:
        raise CheckpointError(f"{path}: about {found:,} values; at most {max_values:,} are read")
    return data


def parse_json_object(path: Path, data: bytes) -> dict[str, object]:
    """The JSON object that `data`, the content of `path`, holds.

    Raises:
        CheckpointError: no JSON object, or nested deeper than `MAX_DEPTH`.
    """
    try:
        content = json.loads(data.decode())
    except RecursionError:
        raise CheckpointError(f"{path}: nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    _check_depth(path, content)
    return content


def read_json_object(
    path: Path, *, max_bytes: int = MAX_CONFIG_BYTES, max_values: int = MAX_CONFIG_VALUES
) -> dict[str, object]:
    """`read_bounded`, then `parse_json_object`."""
    return parse_json_object(path, read_bounded(path, max_bytes=max_bytes, max_values=max_values))


def _check_depth(path: Path, content: object) -> None:
    level = [content]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
        ]
        if not level:
            return
    raise CheckpointError(f"{path}: nested deeper than {MAX_DEPTH} levels")
