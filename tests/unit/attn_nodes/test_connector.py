"""Nodes that cannot be reached at once: whatever the reason, they are tried again until they are, or are forgotten."""

from __future__ import annotations

import pytest

from anabranch.errors import PeerLost
from attn_nodes.connector import Connector
from tests.support.waiting import eventually
from tests.unit.attn_nodes.scripted_nodes import ScriptedDialled, ScriptedLinks, ScriptedNode

pytestmark = pytest.mark.unit


class Reluctant(ScriptedLinks):
    """Fails some times before it reaches a node."""

    def __init__(self, node: ScriptedNode, errors: list[Exception]) -> None:
        super().__init__([node])
        self.errors = errors
        self.num_tries = 0

    def dial(self, addresses: dict[str, str], peer: str) -> ScriptedDialled:
        self.num_tries += 1
        if self.errors:
            raise self.errors.pop(0)
        return super().dial(addresses, peer)


@pytest.mark.parametrize("error", [PeerLost("nobody there"), OSError(24, "too many open files"), ValueError("odd")])
def test_a_node_is_tried_again_whatever_went_wrong(error: Exception) -> None:
    node = ScriptedNode("ffn-0", [(0,)])
    links = Reluctant(node, [error, error])
    connector = Connector(links)
    try:
        connector.connect(node.info)
        made = []
        eventually(lambda: made.append(found) or True if (found := connector.take()) else False, "a node")
        assert made[0].node == node.info
        assert links.num_tries == 3
    finally:
        connector.close()


def test_a_node_that_is_forgotten_is_tried_no_more() -> None:
    node = ScriptedNode("ffn-0", [(0,)])
    node.reachable = False
    links = Reluctant(node, [])
    connector = Connector(links)
    try:
        connector.connect(node.info)
        eventually(lambda: links.num_tries > 0, "a try")
        connector.forget(node.name)
        assert connector.take() is None
        assert not connector._wanted
    finally:
        connector.close()
