"""Which planes there are, and which one two ends take."""

from __future__ import annotations

import os

import pytest

from anabranch.errors import (
    ConfigError,
    TransportUnavailable,
)
from tests.support.planes import STATUS, Recorder, endpoint_of
from transport.planes import (
    PlaneStatus,
    available_planes,
    choose_plane,
    configured_planes,
    create_plane,
    reachable_planes,
    registry,
    usable_planes,
)

pytestmark = pytest.mark.unit


def test_auto_takes_the_best_that_both_ends_have() -> None:
    everything = ("inproc", "ucx", "tcp")
    assert choose_plane("auto", everything, everything) == "inproc"
    assert choose_plane("auto", everything, ("tcp", "ucx")) == "ucx"
    assert choose_plane("auto", ("tcp",), everything) == "tcp"
    assert choose_plane("tcp", everything, everything) == "tcp"


def test_what_an_end_lacks_is_refused_with_the_remedy() -> None:
    with pytest.raises(TransportUnavailable, match=r"ucx.*pip install 'anabranch\[ucx-cu12\]'"):
        choose_plane("ucx", ("tcp",), ("ucx", "tcp")) if not STATUS["ucx"].usable else choose_plane(
            "ucx", ("ucx", "tcp"), ("tcp",)
        )
    with pytest.raises(TransportUnavailable, match="one process"):
        choose_plane("inproc", ("inproc", "tcp"), ("tcp",))
    with pytest.raises(TransportUnavailable, match="no plane in common"):
        choose_plane("auto", ("tcp",), ("inproc",))
    with pytest.raises(ConfigError, match="kv_transport"):
        choose_plane("carrier-pigeon", ("tcp",), ("tcp",))
    with pytest.raises(ConfigError, match="kv_transport"):
        create_plane("carrier-pigeon", Recorder())


def test_an_inproc_address_is_reachable_in_its_own_process_alone() -> None:
    plane = create_plane("inproc", Recorder())
    addresses = {"inproc": plane.address, "tcp": "tcp:127.0.0.1:1:" + "00" * 16}
    assert reachable_planes(addresses) == ("inproc", "tcp")
    elsewhere = {**addresses, "inproc": plane.address.replace(f":{os.getpid()}:", f":{os.getpid() + 1}:")}
    assert reachable_planes(elsewhere) == ("tcp",)
    plane.close()
    assert reachable_planes(addresses) == ("tcp",)


def test_usable_planes_are_those_whose_status_says_so() -> None:
    assert usable_planes() == tuple(status.name for status in available_planes() if status.usable)
    assert {"inproc", "tcp"} <= set(usable_planes())
    for status in available_planes():
        assert status.usable or (status.reason and status.remedy)


def test_a_plane_listens_on_loopback_alone() -> None:
    for name in usable_planes():
        plane = create_plane(name, Recorder())
        if name != "inproc":
            assert endpoint_of(plane)[0] == "127.0.0.1"
        plane.close()


def test_a_plane_is_named_or_all_that_work_are_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert configured_planes("tcp", "127.0.0.1") == ("tcp",)
    assert configured_planes("auto", "127.0.0.1") == usable_planes()
    assert not caplog.records
    with pytest.raises(ConfigError, match="kv_transport"):
        configured_planes("carrier-pigeon", "127.0.0.1")
    broken = PlaneStatus(name="ucx", usable=False, reason="it moves nothing", remedy="mend it", broken=True)
    monkeypatch.setattr(registry, "_ucx_status", lambda listen_host: broken)
    assert configured_planes("auto", "127.0.0.1") == ("inproc", "tcp")
    assert "kv_transport auto passes over ucx: it moves nothing; mend it" in caplog.text
    with pytest.raises(TransportUnavailable, match="kv_transport: ucx cannot be used: it moves nothing; mend it"):
        configured_planes("ucx", "127.0.0.1")


def test_an_interface_that_is_not_there_is_refused() -> None:
    with pytest.raises(TransportUnavailable, match="listen_host"):
        create_plane("tcp", Recorder(), listen_host="192.0.2.1")
