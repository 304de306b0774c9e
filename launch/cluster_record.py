"""Where a running cluster is written down, so that `anabranch generate` finds it without being told.

One small JSON file for each `anabranch up`, in a folder that only the user can read. A record whose process
has ended is not believed, and removed.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec
import psutil

from anabranch.system.files import read_regular, write_atomically
from anabranch.system.user_cache import cache_folder

MAX_RECORD_BYTES = 65536


class ClusterRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A running cluster.

    Attributes:
        grpc: `host:port` of its gateway.
        admin_token_file: holds the token that its Admin service wants to see.
        pid: process id of the launcher.
        started_s: when that process was created, seconds since the epoch; tells a reused pid apart.
    """

    grpc: str
    pid: int
    started_s: float
    model: str
    admin_token_file: str = ""


def record_folder() -> Path:
    """`$XDG_RUNTIME_DIR/anabranch` where that can be written, else a folder in the user's cache."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isdir(runtime) and os.access(runtime, os.W_OK | os.X_OK):
        return Path(runtime) / "anabranch"
    return cache_folder() / "clusters"


def record_path(pid: int | None = None) -> Path:
    """The file of the cluster that process `pid` (this one) launched."""
    return record_folder() / f"cluster-{pid or os.getpid()}.json"


def write_record(grpc: str, model: str, admin_token_file: str) -> Path:
    """Write down this process's cluster; returns the file. Raises OSError."""
    path = record_path()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    record = ClusterRecord(
        grpc=grpc,
        pid=os.getpid(),
        started_s=psutil.Process().create_time(),
        model=model,
        admin_token_file=admin_token_file,
    )
    write_atomically(path, msgspec.json.encode(record))
    return path


def running_clusters() -> list[ClusterRecord]:
    """Clusters of this user that still run, the latest first; records of others are removed."""
    found: list[tuple[float, ClusterRecord]] = []
    folder = record_folder()
    for path in folder.glob("cluster-*.json") if folder.is_dir() else ():
        try:
            record = msgspec.json.decode(read_regular(path, MAX_RECORD_BYTES), type=ClusterRecord)
            written = path.stat().st_mtime
        except (OSError, msgspec.DecodeError):
            continue
        if _runs(record):
            found.append((written, record))
        else:
            with contextlib.suppress(OSError):
                path.unlink()
    return [record for _, record in sorted(found, key=lambda item: item[0], reverse=True)]


def _runs(record: ClusterRecord) -> bool:
    try:
        return abs(psutil.Process(record.pid).create_time() - record.started_s) < 1.0
    except psutil.Error:
        return False
