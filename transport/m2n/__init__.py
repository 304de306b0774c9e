"""The M2N channel: rows of hidden states from M attention ranks to N FFN nodes, and their answers back."""

from transport.m2n.base import Arrived, ChannelShape, Link, LinkMaker, Listener
from transport.m2n.channel import create_link_maker, create_listener, usable_backends
from transport.m2n.messages import Answer, Call, Combine, Status

__all__ = [
    "Answer",
    "Arrived",
    "Call",
    "ChannelShape",
    "Combine",
    "Link",
    "LinkMaker",
    "Listener",
    "Status",
    "create_link_maker",
    "create_listener",
    "usable_backends",
]
