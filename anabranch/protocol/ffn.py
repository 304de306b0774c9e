"""Which FFN node holds which experts, as the orchestrator tells FFN and attention nodes.

FFN node -> Register -> Place (load these) -> Placed -> FfnNodes to every attention node
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from anabranch.bounds import Count, Extent, Int63, Name, Place, Seconds

MAX_NODES = 1024
MAX_LAYERS = 4096
MAX_EXPERTS = 4096
MAX_BACKENDS = 8

Experts: TypeAlias = Annotated[tuple[Extent, ...], Meta(max_length=MAX_EXPERTS)]
Holding: TypeAlias = Annotated[tuple[Experts, ...], Meta(max_length=MAX_LAYERS)]
"""For each layer, the experts that a node holds, ascending; a dense layer has one expert, 0."""
ExpertCounts: TypeAlias = Annotated[
    tuple[Annotated[tuple[Count, ...], Meta(max_length=MAX_EXPERTS)], ...], Meta(max_length=MAX_LAYERS)
]
"""For each layer, a number for each expert; none for a dense layer."""
Addresses: TypeAlias = Annotated[dict[Name, Place], Meta(max_length=MAX_BACKENDS)]


class FfnLoad(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an FFN node has done since it started.

    Attributes:
        num_rows: of all products.
        busy_s: computing, of the `up_s` that it has served.
        num_bytes: of the weights that its first rank holds now.
    """

    num_products: Count = 0
    num_rows: Count = 0
    busy_s: Seconds = 0.0
    up_s: Seconds = 0.0
    num_bytes: Count = 0


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
