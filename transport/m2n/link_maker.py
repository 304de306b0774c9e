"""An attention rank's end of the channel: its links, and one wait for all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from anabranch.errors import PeerLost, TransportUnavailable
from transport.m2n.base import ChannelShape, Dialled, Link
from transport.m2n.ends import Dialler, Reached, Terms
from transport.m2n.hello import draw_incarnation
from transport.m2n.link import PipeLink
from transport.m2n.waiter import Waiter


class PipeDialled:
    """See `Dialled`.

    Args:
        attach: makes a link of what was reached, or raises; then this closes it.
        done: called once, when it is attached or given up.
    """

    def __init__(
        self, reached: Reached, attach: Callable[[Reached], Link], done: Callable[[PipeDialled], None]
    ) -> None:
        self._reached: Reached | None = reached
        self._attach = attach
        self._done = done
        self._taking = threading.Lock()

    def attach(self) -> Link:
        reached = self._take()
        if reached is None:
            raise PeerLost("the connection was given up before it became a link")
        try:
            return self._attach(reached)
        except Exception:
            reached.close()
            raise

    def close(self) -> None:
        reached = self._take()
        if reached is not None:
            reached.close()

    def _take(self) -> Reached | None:
        with self._taking:
            reached, self._reached = self._reached, None
        if reached is not None:
            self._done(self)
        return reached


class PipeLinkMaker:
    """See `LinkMaker`.

    Args:
        diallers: of the backends that may be used here, best first.
        connect_timeout_s: of `dial`, with each backend.
    """

    def __init__(self, shape: ChannelShape, diallers: Sequence[Dialler], connect_timeout_s: float) -> None:
        self._shape = shape
        self._diallers = diallers
        self._connect_timeout_s = connect_timeout_s
        self._waiter = Waiter()
        self._incarnation = draw_incarnation()
        self._links: set[PipeLink] = set()
        # Threads that dial add to it, and must not once it is closed.
        self._dialled: set[PipeDialled] = set()
        self._dialling = threading.Lock()
        self._closed = False

    def dial(self, addresses: dict[str, str], peer: str) -> Dialled:
        lost: list[str] = []
        for dialler in self._diallers:
            address = addresses.get(dialler.name)
            if address is None:
                continue
            try:
                reached = dialler.dial(address, self._shape, self._incarnation, peer, self._connect_timeout_s)
            except PeerLost as error:  # another host, perhaps: the next backend may reach it
                lost.append(str(error))
            else:
                return self._keep(reached, peer)
        if lost:
            raise PeerLost(f"FFN node {peer}: {'; '.join(lost)}")
        raise TransportUnavailable(
            f"FFN node {peer} offers {', '.join(sorted(addresses)) or 'nothing'}, this rank has "
            f"{', '.join(dialler.name for dialler in self._diallers)}: set ffn_transport alike"
        )

    def _keep(self, reached: Reached, peer: str) -> Dialled:
        dialled = PipeDialled(reached, lambda reached: self._link(reached, peer), self._dialled.discard)
        with self._dialling:
            closed = self._closed
            if not closed:
                self._dialled.add(dialled)
        if closed:
            dialled.close()
            raise PeerLost(f"FFN node {peer}: this end of the channel is closed")
        return dialled

    def _link(self, reached: Reached, peer: str) -> Link:
        terms = Terms(shape=self._shape, answers=False, peer=peer, peer_incarnation=reached.incarnation)
        pipe = reached.make_pipe(terms, self._waiter)
        link = PipeLink(pipe, self._shape, peer, self._incarnation, self._links.discard)
        self._links.add(link)
        return link

    def wait(self, timeout_s: float) -> None:
        self._waiter.wait(timeout_s)

    def close(self) -> None:
        with self._dialling:
            closed, self._closed = self._closed, True
        if closed:
            return
        for dialled in list(self._dialled):
            dialled.close()
        for link in list(self._links):
            link.close()
        self._waiter.close()
