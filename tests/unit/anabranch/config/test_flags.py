"""Flags are made from the struct, and read back into an equal one."""

import pytest

from anabranch.config.flags import parse_flags, to_flags
from anabranch.config.worker import WorkerConfig

pytestmark = pytest.mark.unit


def read(*argv: str) -> WorkerConfig:
    return parse_flags(WorkerConfig, argv, prog="decode", about="A worker.", defaults={"role": "decode"})


def test_round_trip_of_every_kind_of_field() -> None:
    config = WorkerConfig(
        role="decode",
        name="decode-0",
        orchestrator="ipc:///x",
        model="m",
        dtype="float32",
        cores=(0, 1),
        prefix_cache=False,
        lease_s=2.5,
        kv_cache_bytes=12345,
    )
    assert read(*to_flags(config)) == config


def test_a_missing_flag_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        read("--name", "a", "--model", "m")
    assert stop.value.code == 2
    assert "--orchestrator" in capsys.readouterr().err


def test_a_bad_value_is_named_with_its_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read("--name", "a", "--model", "m", "--orchestrator", "o", "--block-size", "0")
    assert "block_size: 0: must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--block-size", "65537", "block_size: 65537: must be at most 65536"),
        ("--threads", "-1", "threads: -1: must be at least 0"),
        ("--threads", "5000", "threads: 5000: must be at most 4096"),
        ("--kv-cache-bytes", "9" * 30, "must be at most 1125899906842624"),
        ("--tp", "9" * 30, "must be at most 2147483647"),
        ("--cores", "0,-1", "cores: -1: must be at least 0"),
        ("--cores", "9" * 30, "must be at most 65536"),
        ("--lease-s", "0", "lease_s: 0.0: must be above 0"),
        ("--lease-s", "nan", "lease_s: nan: must be above 0"),
        ("--heartbeat-s", "inf", "heartbeat_s: inf: must be above 0"),
        ("--collective-timeout-s", "-1", "collective_timeout_s: -1.0: must be above 0"),
    ],
)
def test_numbers_are_bounded(capsys: pytest.CaptureFixture[str], flag: str, value: str, said: str) -> None:
    with pytest.raises(SystemExit) as stop:
        read("--name", "a", "--model", "m", "--orchestrator", "o", flag, value)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_help_teaches_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        read("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--kv-cache-bytes" in text
    assert "size of the KV pool" in text


def test_tcp_wants_a_secret(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--name", "a", "--model", "m", "--orchestrator", "tcp://127.0.0.1:5")
    with pytest.raises(SystemExit):
        read(*flags)
    assert "orchestrator: 'tcp://127.0.0.1:5': needs secret_file" in capsys.readouterr().err
    assert read(*flags, "--secret-file", "/x").secret_file == "/x"
