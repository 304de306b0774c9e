"""Which FFN node holds which experts, as the orchestrator tells FFN and attention nodes.

FFN node -> Register -> Place (load these) -> Placed -> FfnNodes to every attention node
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from anabranch.bounds import Count, Extent, Int63, Name, Place

MAX_NODES = 1024
MAX_LAYERS = 4096
MAX_EXPERTS = 4096
MAX_BACKENDS = 8

Experts: TypeAlias = Annotated[tuple[Extent, ...], Meta(max_length=MAX_EXPERTS)]
Holding: TypeAlias = Annotated[tuple[Experts, ...], Meta(max_length=MAX_LAYERS)]
"""For each layer, the experts that a node holds, ascending; a dense layer has one expert, 0."""
Addresses: TypeAlias = Annotated[dict[Name, Place], Meta(max_length=MAX_BACKENDS)]


class FfnNode(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A node that serves.

    Attributes:
        incarnation: drawn at random by each process; a node that comes again under the same name has another.
        addresses: M2N backend name -> address.
    """

    name: Name
    incarnation: Int63
    addresses: Addresses
    holding: Holding


class FfnPlacement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All nodes that serve, from one version of the placement on.

    Attributes:
        version: grows by one with each change.
    """

    version: Count
    nodes: Annotated[tuple[FfnNode, ...], Meta(max_length=MAX_NODES)]
