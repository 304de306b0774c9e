"""A plane, as its links see it."""

from __future__ import annotations

from typing import Protocol, TypeVar

from transport.planes.base import PlaneHandler
from transport.planes.loop import ProgressLoop

LinkT = TypeVar("LinkT", contravariant=True)


class LinkOwner(Protocol[LinkT]):
    """What a link asks of the plane that made it, on the progress thread."""

    @property
    def loop(self) -> ProgressLoop: ...

    @property
    def handler(self) -> PlaneHandler: ...

    def dropped(self, link: LinkT) -> None:
        """`link` has ended."""
        ...
