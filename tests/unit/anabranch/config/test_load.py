from __future__ import annotations

import dataclasses
import os
from itertools import pairwise
from pathlib import Path

import pytest

from anabranch.config.load import check_topology, load_topology, parse_size, topology_from, usable_cores
from anabranch.config.topology import AttnPoolConfig, FfnPoolConfig, PoolConfig, Pools, Topology
from anabranch.errors import ConfigError

pytestmark = pytest.mark.unit


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "topology.yaml"
    path.write_text(text)
    return path


def test_a_full_file_is_read(tmp_path: Path) -> None:
    topology = load_topology(
        written(
            tmp_path,
            """
            model: smollm2-135m
            dtype: float32
            kv_transport: tcp
            grpc: 127.0.0.1:50051
            pools:
              prefill: {workers: 2, tp: 1, cp: 1, kv_cache: 64MiB}
              decode: {workers: 1, threads: 1, kv_cache: 1048576, max_running: 8}
            """,
        )
    )
    assert topology.dtype == "float32"
    assert topology.pools.prefill is not None
    assert topology.pools.decode is not None
    assert topology.pools.prefill.workers == 2
    assert topology.pools.prefill.kv_cache_bytes == 64 * 1024 * 1024
    assert topology.pools.decode.kv_cache_bytes == 1048576
    assert topology.pools.decode.max_running == 8
    assert topology.pools.colocated is None


def test_attention_and_ffn_apart(tmp_path: Path) -> None:
    topology = load_topology(
        written(
            tmp_path,
            """
            row_exact: on
            combine: sums
            pools:
              prefill: {}
              attn: {workers: 2, tp: 2, lanes: 3, kv_cache: 64MiB}
              ffn: {workers: 3, replicas: 2, capacity: 1GiB, merge_wait_us: 20}
            """,
        )
    )
    pools = topology.pools
    assert list(pools.by_role) == ["prefill", "attn", "ffn"]
    assert (topology.row_exact, topology.combine) == ("on", "sums")
    assert pools.attn == AttnPoolConfig(workers=2, tp=2, lanes=3, kv_cache_bytes=64 << 20)
    assert pools.ffn == FfnPoolConfig(workers=3, replicas=2, capacity_bytes=1 << 30, merge_wait_us=20)
    # YAML reads these words as truth values.
    assert load_topology(written(tmp_path, "row_exact: off")).row_exact == "off"


def test_an_empty_file_is_the_default_cluster(tmp_path: Path) -> None:
    topology = load_topology(written(tmp_path, ""))
    assert topology.model == "smollm2-135m"
    assert topology.pools.prefill == topology.pools.decode
    assert topology.pools.prefill is not None
    assert topology.pools.prefill.kv_cache_bytes == 512 * 1024 * 1024


def test_colocated_may_stand_at_the_top() -> None:
    topology = topology_from({"model": "m", "colocated": {"workers": 2}})
    assert topology.pools.colocated is not None
    assert topology.pools.colocated.workers == 2
    assert topology.pools.prefill is None


@pytest.mark.parametrize(
    ("data", "key", "value", "remedy"),
    [
        ({"modle": "x"}, "modle", "x", "did you mean model?"),
        ({"pools": {"prefil": {}, "decode": {}}}, "pools.prefil", {}, "did you mean pools.prefill?"),
        ({"pools": {"colocated": {"wokers": 2}}}, "pools.colocated.wokers", 2, "did you mean pools.colocated.workers?"),
        ({"zzz": 1}, "zzz", 1, "known keys: model, dtype"),
        ({"pools": {"colocated": {"workers": "two"}}}, "pools.colocated.workers", "two", "expected `int`, got `str`"),
        ({"pools": {"colocated": {"workers": True}}}, "pools.colocated.workers", True, "expected `int`, got `bool`"),
        ({"pools": {"colocated": {"cores": [0, "a"]}}}, "pools.colocated.cores[1]", "a", "expected `int`, got `str`"),
        ({"pools": [1]}, "pools", [1], "expected `object`, got `array`"),
        ({"dtype": "bfloat"}, "dtype", "bfloat", "did you mean bfloat16?"),
        ({"kv_transport": "rdma"}, "kv_transport", "rdma", "must be one of auto, inproc, tcp, ucx"),
        ({"pools": {"colocated": {"workers": 0}}}, "pools.colocated.workers", 0, "must be at least 1"),
        ({"pools": {"colocated": {"workers": 9999}}}, "pools.colocated.workers", 9999, "at most 256"),
        ({"pools": {"colocated": {"tp": 0}}}, "pools.colocated.tp", 0, "must be at least 1"),
        ({"pools": {"colocated": {"cp": -1}}}, "pools.colocated.cp", -1, "must be at least 1"),
        (
            {"pools": {"colocated": {"tp": 9, "cp": 8}}},
            "pools.colocated.tp x cp",
            "9 x 8",
            "makes 72 ranks; at most 64",
        ),
        ({"collective_timeout_s": 0}, "collective_timeout_s", 0.0, "must be above 0"),
        ({"step_stall_s": -1}, "step_stall_s", -1.0, "must be above 0"),
        ({"step_stall_s": 30}, "step_stall_s", 30.0, "must be above collective_timeout_s (30.0 s)"),
        ({"collective_timeout_s": 500}, "step_stall_s", 120.0, "must be above collective_timeout_s (500.0 s)"),
        ({"pools": {"colocated": {"threads": -1}}}, "pools.colocated.threads", -1, "must be at least 0"),
        ({"pools": {"colocated": {"kv_cache": "5 cats"}}}, "pools.colocated.kv_cache", "5 cats", '"512MiB"'),
        ({"pools": {"colocated": {"kv_cache": 0}}}, "pools.colocated.kv_cache", 0, "at least 1 (bytes)"),
        ({"pools": {"colocated": {"offload": -1}}}, "pools.colocated.offload", -1, "at least 0 (bytes)"),
        (
            {"pools": {"colocated": {"offload": 0, "preemption": "offload"}}},
            "pools.colocated.preemption",
            "offload",
            "give offload",
        ),
        ({"pools": {"colocated": {"cores": [0, 0]}}}, "pools.colocated.cores", [0, 0], "names a core twice"),
        ({"pools": {"colocated": {"cores": [65000]}}}, "pools.colocated.cores", [65000], "core 65000 cannot be used"),
        ({"pools": {"colocated": {"cores": [0, 99999]}}}, "pools.colocated.cores", 99999, "must be at most 65536"),
        ({"pools": {"colocated": {"kv_cache": "2048 TiB"}}}, "pools.colocated.kv_cache", 2 << 50, "at most"),
        ({"pools": {"colocated": {"kv_cache": True}}}, "pools.colocated.kv_cache", True, "expected `int`, got `bool`"),
        ({"pools": {"colocated": {"kv_cache_bytes": 1}}}, "pools.colocated.kv_cache_bytes", 1, "unknown key; did you"),
        ({"model": ""}, "model", "", "name a model"),
        ({"pools": {"prefill": {}}}, "pools.decode", None, "come together"),
        ({"pools": {"decode": {}}}, "pools.prefill", None, "prefill and decode pools come together"),
        ({"pools": {"prefill": {}, "attn": {}}}, "pools.ffn", None, "attn and ffn pools come together"),
        ({"pools": {"prefill": {}, "decode": {}, "ffn": {}}}, "pools.attn", None, "attn and ffn pools come together"),
        ({"pools": {"attn": {}, "ffn": {}}}, "pools.prefill", None, "prefill and attn pools come together"),
        ({"pools": {"ffn": {"workers": 2, "replicas": 3}}}, "pools.ffn.replicas", 3, "at most the pool's 2 workers"),
        ({"pools": {"ffn": {"replicas": -1}}}, "pools.ffn.replicas", -1, "must be at least 0"),
        ({"pools": {"ffn": {"tp": 65}}}, "pools.ffn.tp x cp", "65 x 1", "makes 65 ranks; at most 64"),
        ({"pools": {"ffn": {"cp": 1}}}, "pools.ffn.cp", 1, "unknown key; "),
        ({"pools": {"ffn": {"kv_cache": 1}}}, "pools.ffn.kv_cache", 1, "unknown key; "),
        ({"pools": {"ffn": {"lanes": 2}}}, "pools.ffn.lanes", 2, "unknown key; "),
        ({"pools": {"ffn": {"capacity": -1}}}, "pools.ffn.capacity", -1, "at least 0 (bytes)"),
        ({"pools": {"ffn": {"merge_wait_us": 10**7}}}, "pools.ffn.merge_wait_us", 10**7, "at most 1000000 (micro"),
        ({"pools": {"decode": {"lanes": 2}}}, "pools.decode.lanes", 2, "unknown key; "),
        ({"pools": {"colocated": {"lanes": 2}}}, "pools.colocated.lanes", 2, "unknown key; "),
        ({"pools": {"attn": {"lanes": -1}}}, "pools.attn.lanes", -1, "must be at least 0"),
        ({"pools": {"attn": {"lanes": 5}}}, "pools.attn.lanes", 5, "must be at most 4"),
        ({"pools": {"attn": {"replicas": 2}}}, "pools.attn.replicas", 2, "unknown key; "),
        ({"row_exact": "maybe"}, "row_exact", "maybe", "must be one of auto, on, off"),
        ({"prefix_cache": "on"}, "prefix_cache", "on", "expected `bool`"),
        ({"combine": True}, "combine", True, "got `bool`"),
        ({"ffn_transport": "rdma"}, "ffn_transport", "rdma", "must be one of auto, shm, tcp, ucx"),
        ({"shared_expert": "both"}, "shared_expert", "both", "must be one of attn, ffn"),
        ({"ffn_timeout_s": 0}, "ffn_timeout_s", 0.0, "must be above 0"),
        ({"pools": {}}, "pools", {}, "give prefill and decode, prefill, attn and ffn, or colocated"),
        ({"block_size": 0}, "block_size", 0, "must be at least 1"),
        ({"block_size": 10**15}, "block_size", 10**15, "must be at most 65536 (tokens)"),
        ({"max_context": 1 << 40}, "max_context", 1 << 40, "must be at most 2147483647"),
        ({"pools": {"colocated": {"threads": 10**9}}}, "pools.colocated.threads", 10**9, "must be at most 4096"),
        ({"pools": {"colocated": {"max_running": 10**9}}}, "pools.colocated.max_running", 10**9, "at most 65536"),
        ({"pools": {"colocated": {"max_step_tokens": 10**10}}}, "pools.colocated.max_step_tokens", 10**10, "at most"),
        ({"tenant_weights": ["gold=3", "free"]}, "tenant_weights", "free", "give NAME=WEIGHT, such as gold=3"),
        ({"tenant_weights": ["gold=3", "gold=4"]}, "tenant_weights", "gold=4", "names a tenant twice"),
        ({"tenant_weights": {"gold": 3}}, "tenant_weights", {"gold": 3}, "expected `array`"),
        ({"grpc": "localhost:²"}, "grpc", "localhost:²", "give HOST:PORT"),
        ({"grpc": "localhost"}, "grpc", "localhost", "give HOST:PORT"),
        ({"grpc": "localhost:99999"}, "grpc", "localhost:99999", "give HOST:PORT"),
        ({"grpc": "0.0.0.0:50051"}, "grpc", "0.0.0.0:50051", "reachable from other machines"),
        ([1, 2], "topology", "list", "must be a mapping"),
    ],
)
def test_what_is_wrong_is_named(data: object, key: str, value: object, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        topology_from(data)
    assert caught.value.key == key
    assert caught.value.value == value
    assert remedy in caught.value.remedy


def test_cores_must_divide_by_workers() -> None:
    core = usable_cores()[0]
    with pytest.raises(ConfigError, match="1 cores do not deal out evenly to 2 workers"):
        topology_from({"pools": {"colocated": {"workers": 2, "cores": [core]}}})


def test_a_topology_built_in_python_is_checked_too() -> None:
    topology = Topology(pools=Pools(colocated=PoolConfig(kv_cache_bytes=1 << 10)))
    checked = check_topology(topology)
    assert checked.pools.colocated is not None
    assert checked.pools.colocated.kv_cache_bytes == 1024
    with pytest.raises(ConfigError, match=r"^workers: -1: must be at least 1"):
        PoolConfig(workers=-1)
    with pytest.raises(ConfigError, match=r"^block_size: 0: must be at least 1"):
        dataclasses.replace(topology, block_size=0)
    with pytest.raises(ConfigError, match=r"^pools\.colocated\.cores: "):
        check_topology(dataclasses.replace(topology, pools=Pools(colocated=PoolConfig(cores=(65000,)))))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_topology(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_topology(written(tmp_path, "model: [unclosed"))
    with pytest.raises(ConfigError, match="given twice"):
        load_topology(written(tmp_path, "model: a\nmodel: b\n"))
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_topology(written(tmp_path, "model: !!python/object/apply:os.getcwd []\n"))
    with pytest.raises(ConfigError, match="more than 65,536 bytes"):
        load_topology(written(tmp_path, "#" * (1 << 16) + "\n"))


@pytest.mark.parametrize("path", ["FIFO", "FOLDER", "/dev/zero", "/dev/null", "/dev/stdin", "a\0b"])
def test_only_regular_files_are_read(tmp_path: Path, path: str) -> None:
    (tmp_path / "FOLDER").mkdir()
    os.mkfifo(tmp_path / "FIFO")
    with pytest.raises(ConfigError, match=r"^topology file: .* cannot be read \("):
        load_topology(tmp_path / path)


NESTED_MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}], y{n}: 1}}\n" for n in range(1, 60)
)
MANY_ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 60_000, "nested deeper than 32 levels"),
        ("{a: " * 10_000, "nested deeper than 32 levels"),
        ("- " * 30_000 + "x", "nested deeper than 32 levels"),
        (NESTED_MERGES, "more than 16384 values"),
        (MANY_ALIASES, "more than 16384 values"),
        ("model: &a [*a]", "the alias 'a' stands for what it is part of"),
        ("pools: &a {prefill: *a, decode: *a}", "the alias 'a' stands for what it is part of"),
        ("block_size: " + "9" * 5000, "is not valid YAML"),
        ("block_size: 0x" + "f" * 5000, "block_size: a very large int: must be at most 65536"),
        ("model: !!timestamp x", "is not valid YAML"),
        ("model: 2020-13-45", "is not valid YAML"),
        ("prefix_cache: !!bool x", "is not valid YAML"),
        ('block_size: !!int ""', "is not valid YAML"),
        ("collective_timeout_s: .nan", "collective_timeout_s: nan: must be above 0"),
        ("collective_timeout_s: .inf", "collective_timeout_s: inf: must be above 0"),
        ("collective_timeout_s: 0", "collective_timeout_s: 0.0: must be above 0"),
        ("max_context: 3000000000", "max_context: 3000000000: must be at most 2147483647"),
        ("colocated: {threads: 5000}", "pools.colocated.threads: 5000: must be at most 4096"),
        ("colocated: {max_running: 65537}", "pools.colocated.max_running: 65537: must be at most 65536"),
        ("colocated: {max_step_tokens: 3000000000}", "max_step_tokens: 3000000000: must be at most"),
        ("colocated: {kv_cache: '" + "9" * 5000 + "'}", "pools.colocated.kv_cache: "),
        ("colocated: {kv_cache: '" + "9" * 400 + ".5'}", "pools.colocated.kv_cache: "),
        ("grpc: 127.0.0.1:" + "9" * 5000, "grpc: .*give HOST:PORT"),
        ("grpc: '127.0.0.1:²'", "grpc: .*give HOST:PORT"),
        ('model: "a\\0b"', "model: .*no control characters"),
        ('model: "\\e[31m"', "model: .*no control characters"),
        ("device: " + "x" * 101, "device: .*at most 100 characters"),
    ],
)
def test_whatever_a_file_says_is_answered_at_once_by_name(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load_topology(written(tmp_path, text))
    assert len(str(caught.value)) < 4000


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("FIFO", "it is a FIFO"),
        ("device", "it is a device"),
        ("folder", "it is a folder"),
        ("sparse", "more than 65,536"),
    ],
)
def test_what_is_no_small_regular_file(tmp_path: Path, kind: str, remedy: str) -> None:
    path = tmp_path / "topology.yaml"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, 1 << 40)
    with pytest.raises(ConfigError, match=remedy):
        load_topology(path)


DOUBLING = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise("abcdefghijklmnopqrstuvwxyz"))


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("[" * 30_000 + "]" * 30_000, "nested deeper than 32 levels"),
        ("{a: " * 5000 + "1" + "}" * 5000, "nested deeper than 32 levels"),
        (DOUBLING, "more than 16384 values"),
        ("x: [" + "1," * 20_000 + "]", "more than 16384 values"),
        ("pools: &p {colocated: *p}", "the alias 'p' stands for what it is part of"),
        ("block_size: " + "1" * 5000, "not valid YAML: Exceeds the limit"),
        ("model: 2001-99-99", "not valid YAML: month must be"),
        ("block_size: !!int x", "not valid YAML: invalid literal"),
        ("model: !!timestamp x", "not valid YAML"),
        ("prefix_cache: !!bool x", "not valid YAML"),
        ("block_size: " + ":".join(["1"] * 10_000), "block_size: a very large int: must be at most"),
        ("model: [" + "x," * 10_000 + "]", r"model: \['x', .{190,200}\.\.\.: expected `str`"),
    ],
)
def test_files_that_stand_for_more_than_they_hold(tmp_path: Path, text: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy) as caught:
        load_topology(written(tmp_path, text))
    assert len(str(caught.value)) < 1000


def test_an_alias_may_be_used(tmp_path: Path) -> None:
    topology = load_topology(written(tmp_path, "pools:\n  prefill: &pool {max_running: 3}\n  decode: *pool\n"))
    assert topology.pools.prefill is not None
    assert topology.pools.prefill == topology.pools.decode
    assert topology.pools.prefill.max_running == 3


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        (17, 17),
        ("17", 17),
        ("512MiB", 512 << 20),
        ("1GiB", 1 << 30),
        ("1.5 GiB", 3 << 29),
        ("2gb", 2_000_000_000),
        ("4KB", 4000),
    ],
)
def test_sizes(text: int | str, num_bytes: int) -> None:
    assert parse_size("kv", text) == num_bytes


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1 MiB 2", "1XB", "1" * 5000, "1" * 400 + ".0"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^kv: "):
        parse_size("kv", text)
