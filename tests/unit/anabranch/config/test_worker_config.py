"""A worker's timeouts are ordered: what takes longer is given longer, or the wrong one would be blamed."""

from __future__ import annotations

import pytest

from anabranch.config.worker import WorkerConfig
from anabranch.errors import ConfigError

pytestmark = pytest.mark.unit


def config(*, role: str = "decode", **options: object) -> WorkerConfig:
    return WorkerConfig(role=role, name="worker", orchestrator="ipc://x", model="m", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "key", "remedy"),
    [
        ({"step_stall_s": 0.0}, "step_stall_s", "above 0 and below 86400"),
        ({"step_stall_s": 86400.0}, "step_stall_s", "above 0 and below 86400"),
        ({"lease_s": -1.0}, "lease_s", "above 0 and below 86400"),
        ({"orchestrator_timeout_s": 0.9}, "orchestrator_timeout_s", r"at least two beats \(1\.0 s\)"),
        ({"heartbeat_s": 6.0}, "orchestrator_timeout_s", r"at least two beats \(12\.0 s\)"),
        ({"step_stall_s": 0.5}, "step_stall_s", r"above heartbeat_s \(0\.5 s\)"),
        ({"step_stall_s": 30.0, "tp": 2}, "step_stall_s", r"above collective_timeout_s \(30\.0 s\)"),
        ({"collective_timeout_s": 200.0, "cp": 2}, "step_stall_s", r"above collective_timeout_s \(200\.0 s\)"),
        ({"lease_s": 29.0, "tp": 2}, "lease_s", r"not be below collective_timeout_s \(30\.0 s\).*raise the one"),
        ({"role": "attn", "cp": 2, "ffn_unavailable_s": 25.0}, "ffn_unavailable_s", r"below collective_timeout_s"),
        ({"role": "attn", "tp": 2, "ffn_timeout_s": 10.0}, "ffn_unavailable_s", r"ffn_timeout_s \(10\.0 s\)"),
    ],
)
def test_timeouts_out_of_order_are_refused(options: dict[str, object], key: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: .*{remedy}"):
        config(**options)


def test_one_rank_waits_for_no_other() -> None:
    assert config(step_stall_s=1.0).step_stall_s == 1.0
    assert config(lease_s=1.0).lease_s == 1.0
    assert config(role="attn", ffn_unavailable_s=60.0).ffn_unavailable_s == 60.0
