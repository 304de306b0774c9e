"""Whose failure an error is, and who is blamed for it."""

from __future__ import annotations

import pytest

from anabranch import errors
from anabranch.errors import DeadlineExceeded, error_from_code
from orchestrator.attempt import Attempt
from orchestrator.router import Route
from orchestrator.worker_failure import is_workers_failure, lateness, report
from tests.unit.orchestrator.test_router import member, request

pytestmark = pytest.mark.unit


def codes() -> list[str]:
    kinds = [errors.AnabranchError]
    for kind in kinds:
        kinds += [child for child in kind.__subclasses__() if child.__module__ == "anabranch.errors"]
    return sorted({kind.code for kind in kinds})


@pytest.mark.parametrize("code", [*codes(), "of a later release"])
def test_every_code_is_somebodys_failure(code):
    own = {"invalid_request", "context_exceeded", "out_of_blocks", "draining"}
    assert is_workers_failure(error_from_code(code, "")) is (code not in own)


@pytest.mark.parametrize(
    ("code", "who", "committed", "blamed", "suspect"),
    [
        ("internal", "prefill", False, ("p",), "p"),
        ("internal", "decode", False, ("d",), "d"),
        ("peer_lost", "prefill", False, ("p", "d"), "d"),
        ("peer_lost", "decode", False, ("d", "p"), "p"),
        ("checksum_mismatch", "decode", False, ("d", "p"), "p"),
        ("stale_lease", "prefill", False, ("p", "d"), "d"),
        ("peer_lost", "decode", True, ("d",), "d"),
        ("ffn_unavailable", "decode", True, ("d",), None),
        ("worker_died", "decode", True, ("d",), None),
        ("deadline_exceeded", "decode", False, ("d",), "d"),
    ],
)
def test_who_is_blamed_for_what_a_worker_reports(code, who, committed, blamed, suspect):
    pair = {"prefill": member("p", "prefill"), "decode": member("d", "decode")}
    attempt = Attempt(request(), Route(pair["decode"], pair["prefill"]))
    attempt.committed = committed
    failure = report(attempt, pair[who], error_from_code(code, "why"))
    assert tuple(worker.name for worker in failure.blamed) == blamed
    assert (failure.suspect.name if failure.suspect else None) == suspect


def test_one_that_did_it_all_can_blame_nobody_else():
    alone = member("c", "colocated")
    failure = report(Attempt(request(), Route(alone)), alone, error_from_code("peer_lost", ""))
    assert (failure.blamed, failure.suspect) == ((alone,), alone)


@pytest.mark.parametrize(
    ("state", "blamed", "suspect"),
    [
        ("reserving", ("d",), None),
        ("prefilling", ("p", "d"), "p"),
        ("decoding", ("d",), "d"),
        ("preempted", ("d",), None),
    ],
)
def test_who_is_blamed_for_a_stage_that_takes_too_long(state, blamed, suspect):
    attempt = Attempt(request(), Route(member("d", "decode"), member("p", "prefill")))
    failure = lateness(attempt, state, DeadlineExceeded("late"))
    assert tuple(worker.name for worker in failure.blamed) == blamed
    assert (failure.suspect.name if failure.suspect else None) == suspect
