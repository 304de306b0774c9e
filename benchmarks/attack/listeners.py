"""Which sockets of a cluster listen, as the kernel says it, beside those that docs/security.md lists."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import psutil

from launch.cluster import LocalCluster

PAGE = Path(__file__).resolve().parents[2] / "docs" / "security.md"
# Of a socket that listens, in /proc/net/unix.
_ACCEPTS = 0x10000


def listening_sockets(cluster: LocalCluster) -> list[tuple[str, str]]:
    """Kind of process and address of each; ports, and the cluster's folder, by a word in their place."""
    found: set[tuple[str, str]] = set()
    for process in cluster.processes:
        if not process.alive:
            continue
        kind = process.role if process.role == "orchestrator" else f"{process.role.split()[0]} worker"
        if process.role.startswith("rank "):
            kind = "rank of a worker"
        found.update((kind, address) for address in _addresses(process.pid, cluster.folder))
        if process.role == "orchestrator":
            for child in psutil.Process(process.pid).children(recursive=True):
                found.update(("encoder", address) for address in _addresses(child.pid, cluster.folder))
    return sorted(found)


def unlisted(cluster: LocalCluster) -> tuple[str, ...]:
    """Sockets that listen and do not stand in docs/security.md."""
    page = PAGE.read_text()
    return tuple(
        f"{kind}: {address}" for kind, address in listening_sockets(cluster) if row_start(kind, address) not in page
    )


def row_start(kind: str, address: str) -> str:
    """How a socket's row in docs/security.md begins."""
    return f"| {kind} | `{address}` |"


def _addresses(pid: int, folder: Path) -> Iterator[str]:
    for connection in psutil.Process(pid).net_connections("inet"):
        is_tcp = connection.type.name == "SOCK_STREAM"
        if not is_tcp or connection.status == psutil.CONN_LISTEN:
            # gRPC binds IPv4 addresses with IPv6 sockets where there are any.
            yield f"{'tcp' if is_tcp else 'udp'} {connection.laddr.ip.removeprefix('::ffff:')}:PORT"
    inodes = _socket_inodes(pid)
    for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]:
        _, _, _, flags, _, _, inode, *path = line.split(maxsplit=7)
        if int(flags, 16) & _ACCEPTS and inode in inodes:
            yield _unix_address(path[0] if path else "", folder)


def _unix_address(path: str, folder: Path) -> str:
    if not path:
        return "unix (without a name)"
    mode = f"mode {os.stat(path).st_mode & 0o777:04o}" if os.path.exists(path) else "path removed"
    # What is different in each run.
    named = re.sub(r"FOLDER/anabranch-[^/]+", "FOLDER/anabranch-*", path.replace(str(folder), "FOLDER"))
    return f"unix {named}, {mode}"


def _socket_inodes(pid: int) -> set[str]:
    inodes: set[str] = set()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        try:
            match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(entry.path))
        except FileNotFoundError:
            continue
        if match:
            inodes.add(match[1])
    return inodes
