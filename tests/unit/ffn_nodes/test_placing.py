"""What an FFN worker is told to hold, it holds, and says so; what it is not told to hold goes when it may."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from anabranch.errors import ConfigError
from anabranch.kernels.plain import PlainKernels
from anabranch.kernels.row_exact import RowExact
from anabranch.model.expert_table import ExpertTable
from anabranch.model.size import expert_bytes
from anabranch.protocol.ffn import Holding
from anabranch.protocol.workers import Place, Placed
from ffn_nodes import placing
from ffn_nodes.experts import NodeExperts
from ffn_nodes.placing import Placing
from ffn_nodes.serving import Serving
from tests.support.ffn_calls import MemoryListener
from tests.support.in_process import wait_until
from tests.support.waiting import WAIT_S

pytestmark = pytest.mark.unit

EXPERT_BYTES = 4 * 3 * 14 * 48


class Setup:
    def __init__(self, table: ExpertTable, capacity_bytes: int, keep_s: float) -> None:
        self.table = table
        self.placed: list[Placed] = []
        experts = NodeExperts(table)
        self.serving = Serving(MemoryListener(), experts, num_threads=1, merge_wait_s=0.0, on_failure=print)
        self.placing = Placing(
            NodeExperts(table),
            self.serving,
            capacity_bytes=capacity_bytes,
            num_threads=1,
            stall_s=WAIT_S,
            keep_s=keep_s,
            post=self.placed.append,
        )
        self.version = 0
        self.serving.start()
        self.placing.start()

    def place(self, *holding: tuple[int, ...]) -> Placed:
        """Have it told, and wait for the answer."""
        self.version += 1
        self.placing.place(Place(version=self.version, holding=holding))
        wait_until(lambda: bool(self.placed) and self.placed[-1].version == self.version, "an answer")
        return self.placed[-1]

    def await_holding(self, *holding: tuple[int, ...]) -> None:
        wait_until(lambda: self.table.holding() == holding, "a holding", describe=self.table.holding)


@pytest.fixture
def start(make_table) -> Iterator[Callable[..., Setup]]:
    made: list[Setup] = []

    def run(capacity_bytes: int = 0, keep_s: float = 3600.0) -> Setup:
        made.append(Setup(make_table({}, RowExact(PlainKernels())), capacity_bytes, keep_s))
        return made[-1]

    yield run
    for setup in made:
        assert setup.placing.stop(WAIT_S)
        assert setup.serving.stop(WAIT_S)


def test_what_the_placement_before_named_is_kept_until_told_again(start: Callable[..., Setup]) -> None:
    setup = start()
    assert setup.place((0, 1), (0,), (5,)).error is None
    assert setup.table.holding() == ((0, 1), (0,), (5,))
    assert setup.place((1, 2), (), (5,)).error is None
    assert setup.table.holding() == ((0, 1, 2), (0,), (5,))
    assert setup.place((1, 2), (), (5,)).error is None
    setup.await_holding((1, 2), (), (5,))
    assert setup.place((0,), (0,), ()).error is None
    assert setup.table.holding() == ((0, 1, 2), (0,), (5,))


def test_what_is_kept_for_older_calls_goes_without_another_word(start: Callable[..., Setup]) -> None:
    setup = start(keep_s=0.01)
    assert setup.place((0, 1), (0,), (5,)).error is None
    assert setup.place((1, 2), (), (5,)).error is None
    setup.await_holding((1, 2), (), (5,))
    # Nor does what is wanted ever go.
    assert setup.place((0, 1, 2), (0,), ()).error is None
    setup.await_holding((0, 1, 2), (0,), ())


def test_what_was_to_go_and_is_wanted_again_stays(start: Callable[..., Setup]) -> None:
    setup = start()
    for holding in ([(0, 1), (), ()], [(1,), (), ()], [(0,), (), ()], [(0, 1), (), ()]):
        assert setup.place(*holding).error is None
        assert setup.table.holds(0, holding[0])
    assert setup.table.holding()[0] == (0, 1)


def test_where_room_is_short_the_old_goes_before_the_new_comes(start: Callable[..., Setup]) -> None:
    setup = start(capacity_bytes=3 * EXPERT_BYTES)
    assert expert_bytes(setup.table.config, "float32", 0) == EXPERT_BYTES
    assert setup.place((0, 1), (), ()).error is None
    assert setup.place((0, 2), (), ()).error is None
    assert setup.table.holding()[0] == (0, 1, 2)
    assert setup.place((2, 3), (), (1,)).error is None
    assert setup.table.holding() == ((2, 3), (), (1,))
    refused = setup.place((0, 1, 2), (), (0,))
    assert refused.error is not None
    error = refused.error.to_error()
    assert isinstance(error, ConfigError)
    assert f"capacity: {3 * EXPERT_BYTES}: is less than the {4 * EXPERT_BYTES} bytes of the 4 experts" in str(error)
    # What it holds is what it held.
    assert setup.table.holding() == ((2, 3), (), (1,))


def test_more_than_there_is_memory_for_is_refused(start: Callable[..., Setup], monkeypatch) -> None:
    setup = start()
    monkeypatch.setattr(placing, "available_bytes", lambda device: EXPERT_BYTES)
    assert setup.place((0,), (), ()).error is None
    refused = setup.place((0, 1, 2), (), ())
    assert refused.error is not None
    assert f"memory: {2 * EXPERT_BYTES}: bytes of experts are to be loaded" in refused.error.message
    assert setup.place((0, 3), (), ()).error is None


@pytest.mark.parametrize(
    ("holding", "message"),
    [
        (((0,), (0,)), "a placement of 2 layers for a model of 3"),
        (((0, 6), (0,), ()), "a placement of expert 6 of layer 0, which has 6"),
        (((), (1,), ()), "a placement of expert 1 of layer 1, which has 1"),
    ],
)
def test_a_placement_of_another_model_is_refused(holding: Holding, message: str, start: Callable[..., Setup]) -> None:
    setup = start()
    refused = setup.place(*holding)
    assert refused.error is not None
    assert refused.error.code == "malformed_message"
    assert refused.error.message == message
    assert setup.table.holding() == ((), (), ())


def test_only_the_newest_of_several_placements_is_answered(start: Callable[..., Setup], monkeypatch) -> None:
    setup = start()
    reached, go_on = threading.Event(), threading.Event()
    load = ExpertTable.load

    def held_up(self: ExpertTable, *arguments: object) -> None:
        reached.set()
        assert go_on.wait(WAIT_S)
        load(self, *arguments)

    monkeypatch.setattr(ExpertTable, "load", held_up)
    setup.placing.place(Place(version=1, holding=((0, 1, 2), (), ())))
    assert reached.wait(WAIT_S)
    setup.placing.place(Place(version=2, holding=((3,), (), ())))
    setup.placing.place(Place(version=3, holding=((4,), (), ())))
    go_on.set()
    wait_until(lambda: bool(setup.placed), "an answer")
    assert [(placed.version, placed.error) for placed in setup.placed] == [(3, None)]
    # One expert of the first was in hand.
    assert setup.table.holding()[0] == (0, 4)


def test_a_checkpoint_that_breaks_is_said_and_what_is_held_goes_on(start: Callable[..., Setup], monkeypatch) -> None:
    setup = start()
    assert setup.place((0,), (), ()).error is None
    with monkeypatch.context() as patch:
        patch.setattr("anabranch.model.expert_table.weights_digest", lambda weights: "another")
        refused = setup.place((0, 1), (), ())
    assert refused.error is not None
    assert refused.error.code == "checkpoint"
    assert "the weights have changed" in refused.error.message
    assert setup.table.holding()[0] == (0,)
