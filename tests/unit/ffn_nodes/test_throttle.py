"""Loading leaves at least half of the time to who computes, and takes all of it where nobody does."""

from __future__ import annotations

import pytest

from ffn_nodes.throttle import MAX_REST_S, Throttle

pytestmark = pytest.mark.unit


def test_it_rests_for_as_long_as_it_loaded_while_products_are_made() -> None:
    now_s, products, rests = [0.0], [0], list[float]()
    throttle = Throttle(lambda: products[0], clock=lambda: now_s[0], sleep=rests.append)
    throttle.begin()
    throttle.rest()
    assert rests == []
    for taken_s, made in ((0.03, 2), (0.02, 0), (7.0, 1), (0.05, 0)):
        now_s[0] += taken_s
        products[0] += made
        throttle.rest()
    assert rests == pytest.approx([0.03, MAX_REST_S])
