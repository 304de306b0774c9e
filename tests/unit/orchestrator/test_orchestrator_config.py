"""Settings of the orchestrator that cannot be."""

from __future__ import annotations

import pytest

from anabranch.config.flags import parse_flags, to_flags
from anabranch.config.orchestrator import OrchestratorConfig
from anabranch.config.tenants import parse_tenant_weights
from anabranch.errors import ConfigError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_queued", 0),
        ("max_queued_bytes", 0),
        ("max_queued_tokens", 0),
        ("priority_step_s", 0.0),
        ("no_worker_grace_s", 0.0),
        ("max_request_bytes", -1),
        ("max_retries", -1),
        ("queue_timeout_s", 0.0),
        ("token_timeout_s", float("nan")),
        ("client_stall_s", 1e9),
        ("worker_timeout_s", 0.9),
        ("grpc_bind", "0.0.0.0:80"),
        ("grpc_bind", "[::]:80"),
        ("grpc_bind", "example.org:80"),
        ("grpc_bind", "127.0.0.1"),
        ("grpc_bind", "127.0.0.1:http"),
        ("grpc_bind", "127.0.0.1:70000"),
        ("control_bind", "127.0.0.1:5"),
        ("control_bind", "tcp://10.0.0.1:5"),
        ("control_bind", "inproc://x"),
        ("control_bind", "tcp://127.0.0.1:5"),  # without a secret_file
        ("control_bind", "tcp://[::1]:0"),
    ],
)
def test_a_bad_value_is_named(key, value):
    with pytest.raises(ConfigError) as caught:
        OrchestratorConfig(**{key: value})
    assert caught.value.key == key
    assert caught.value.value == pytest.approx(value, nan_ok=True)


@pytest.mark.parametrize(
    "entry", ["", "gold", "gold=", "=3", "a b=3", "a,b=3", "gold=0", "gold=0.0001", "gold=1001", "gold=-1", "gold=nan"]
)
def test_a_weight_that_is_none_is_named(entry):
    with pytest.raises(ConfigError, match=r"tenant_weights: .*give NAME=WEIGHT, such as gold=3"):
        OrchestratorConfig(tenant_weights=("free=0.5", entry))


def test_weights_are_given_once_and_not_too_many():
    with pytest.raises(ConfigError, match="names a tenant twice"):
        OrchestratorConfig(tenant_weights=("a=1", "a=2"))
    with pytest.raises(ConfigError, match="names more than 1024 tenants"):
        OrchestratorConfig(tenant_weights=tuple(f"t{number}=1" for number in range(1025)))
    weights = ("gold=3", "a=b=0.5")
    config = OrchestratorConfig(tenant_weights=weights)
    assert parse_flags(OrchestratorConfig, to_flags(config), prog="x", about="x").tenant_weights == weights
    assert parse_tenant_weights(weights) == {"gold": 3.0, "a=b": 0.5}


@pytest.mark.parametrize(
    "settings",
    [
        {"grpc_bind": "[::1]:0"},
        {"grpc_bind": "localhost:5", "control_bind": "ipc:///tmp/x"},
        {"grpc_bind": "unix:/tmp/x"},
        {"grpc_bind": "[::1]:0", "control_bind": "tcp://[::1]:0", "secret_file": "/x"},
        {"grpc_bind": "0.0.0.0:0", "control_bind": "tcp://0.0.0.0:0", "secret_file": "/x", "allow_remote": True},
    ],
)
def test_these_are_fine(settings):
    config = OrchestratorConfig(**settings)
    assert config.grpc_bind == settings["grpc_bind"]
    assert to_flags(config)
