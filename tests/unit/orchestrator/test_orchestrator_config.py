"""Settings of the orchestrator that cannot be."""

from __future__ import annotations

import pytest

from anabranch.config.flags import to_flags
from anabranch.config.orchestrator import OrchestratorConfig
from anabranch.errors import ConfigError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_queued", 0),
        ("max_queued_bytes", 0),
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
