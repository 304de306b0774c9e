"""What is asked of a fork server, and what is reported of each process that it forked.

An order goes to the server's control connection with three descriptors: standard output, standard error, and the
server's end of a connection of its own, on which `Running` and then `Ended` come back, or `Failed` alone.
"""

from __future__ import annotations

import msgspec

# The kernel lets arguments and environment together have 2 MiB by default; an order that is longer is not sent.
MAX_ORDER_BYTES = 4 << 20
MAX_REPORT_BYTES = 4096
NUM_DESCRIPTORS = 3


class Order(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A module to run in a process of its own.

    Attributes:
        name: what `ps` and `top` show.
        environment: the whole of it.
        folder: the process's current folder.
        cores: CPU ids that it may use.
        new_session: whether it leads a session, and so a process group, of its own.
    """

    name: str
    module: str
    arguments: tuple[bytes, ...]
    environment: dict[bytes, bytes]
    folder: bytes
    cores: tuple[int, ...]
    new_session: bool


class _Report(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", forbid_unknown_fields=True):
    pass


class Running(_Report, frozen=True, kw_only=True, tag="running"):
    """From the process itself: it is in its session and takes signals as any other would."""

    pid: int


class Ended(_Report, frozen=True, kw_only=True, tag="ended"):
    """From the server: exit code, or minus the signal's number. The id stays taken until this connection is closed."""

    code: int


class Failed(_Report, frozen=True, kw_only=True, tag="failed"):
    """From the server: the system refused to fork."""

    errno: int
    message: str


Report = Running | Ended | Failed
