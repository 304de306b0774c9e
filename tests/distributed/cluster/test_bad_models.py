"""A model that cannot be served ends the start with an error that names what is wrong, and leaves nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from anabranch.config.topology import PoolConfig, Pools, Topology
from anabranch.errors import CheckpointError, UnsupportedArchitecture, WorkerDied
from launch.cluster import LocalCluster
from orchestrator.resolved_model import CheckpointModel
from tests.support.families import save
from tests.support.in_process import InProcessCluster

pytestmark = pytest.mark.distributed

WEIGHTS = "model.safetensors"


def truncate(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def relabel(folder: Path) -> None:
    """Swap two dimensions in what the file says of a tensor."""
    path = folder / WEIGHTS
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    entry = header["model.layers.0.mlp.up_proj.weight"]
    entry["shape"].reverse()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def edit(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def lose_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def spoil(name: str, row: int) -> Callable[[Path], None]:
    """Fill a tensor with NaN from a row on."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        tensors[name][row:] = float("nan")
        save_file(tensors, folder / WEIGHTS)

    return change


def go_back(folder: Path) -> None:
    path = folder / "tokenizer.json"
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    path.write_text(json.dumps({**json.loads(path.read_text()), "pre_tokenizer": split}))


UP_PROJ = "model.layers.1.mlp.up_proj.weight"


# What is done to the folder -> the error and what it says.
BROKEN: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "truncated": (truncate, CheckpointError, r"model\.safetensors: not a whole safetensors file"),
    "mislabelled": (relabel, CheckpointError, r"up_proj\.weight has shape \[48, 40\], the configuration expects \[40"),
    "more layers than weights": (edit(num_hidden_layers=4), CheckpointError, r"layers\.3\.\S+ \[48\] is missing"),
    "fewer layers than weights": (edit(num_hidden_layers=2), CheckpointError, "2 layers has no place for it"),
    "other vocabulary": (
        edit(vocab_size=99),
        CheckpointError,
        r"has shape \[101, 48\], the configuration expects \[99",
    ),
    "other architecture": (edit(architectures=["FalconForCausalLM"]), UnsupportedArchitecture, "FalconForCausalLM"),
    "more vocabulary than any": (
        edit(vocab_size=10**15),
        CheckpointError,
        "vocab_size is 1000000000000000; it must be",
    ),
    "more layers than any": (
        edit(num_hidden_layers=10**9),
        CheckpointError,
        "num_hidden_layers is 1000000000; it must",
    ),
    "a FIFO for weights": (pipe, CheckpointError, r"model\.safetensors: cannot be read: it is a FIFO"),
    "nothing but NaN": (spoil(UP_PROJ, 0), CheckpointError, rf"{UP_PROJ} holds values that are not finite"),
    "NaN in one row": (spoil(UP_PROJ, 7), CheckpointError, rf"{UP_PROJ} holds values that are not finite"),
    "a regular expression without end": (go_back, CheckpointError, "the tokenizer broke off at a text"),
    "no tokenizer": (lose_tokenizer, CheckpointError, "the tokenizer cannot be loaded"),
}


@pytest.fixture
def folder(known, tmp_path) -> Path:
    return Path(shutil.copytree(known.folder, tmp_path / "broken"))


# Also with prefill and decode apart; for the others one start is enough.
SPLIT = ("truncated", "mislabelled", "NaN in one row", "no tokenizer")


@pytest.mark.parametrize(
    ("case", "roles"),
    [(case, ("colocated",)) for case in BROKEN] + [(case, ("prefill", "decode")) for case in SPLIT],
)
def test_a_broken_model_ends_the_start(folder, tmp_path, case, roles) -> None:
    damage, kind, says = BROKEN[case]
    damage(folder)
    with pytest.raises(kind, match=says), InProcessCluster(tmp_path, folder, roles):
        pass


@pytest.mark.parametrize(
    ("case", "who"),
    # The orchestrator and the worker find what is in the headers at the same time, the worker alone what is not.
    [("truncated", "(orchestrator|colocated-0)"), ("NaN in one row", "colocated-0")],
)
def test_processes_pass_the_reason_on(folder, case, who) -> None:
    damage, _, says = BROKEN[case]
    damage(folder)
    pool = PoolConfig(kv_cache_bytes=8 << 20, threads=1)
    # Kernels may have to be compiled first, which is not what is waited for here.
    topology = Topology(model=str(folder), native_kernels=False, pools=Pools(colocated=pool))
    cluster = LocalCluster(topology, ready_timeout_s=60.0)
    with pytest.raises(WorkerDied, match=says) as caught:
        cluster.start()
    assert "\n" not in str(caught.value)
    assert re.match(f"{who}: ", str(caught.value))
    assert not cluster.folder.exists()


@pytest.mark.parametrize("case", ["a FIFO for weights", "nothing but NaN", "other vocabulary"])
def test_the_orchestrator_refuses_what_its_own_check_can_see(folder, case) -> None:
    damage, kind, says = BROKEN[case]
    damage(folder)
    with pytest.raises(kind, match=says):
        CheckpointModel(str(folder))


@pytest.mark.parametrize("case", ["a FIFO for weights", "other vocabulary", "more layers than weights"])
def test_several_ranks_are_not_started(folder, case) -> None:
    """The launcher compares the headers itself, before any process."""
    damage, kind, says = BROKEN[case]
    damage(folder)
    pool = PoolConfig(kv_cache_bytes=8 << 20, threads=1, tp=2)
    cluster = LocalCluster(Topology(model=str(folder), pools=Pools(colocated=pool)), ready_timeout_s=60.0)
    with pytest.raises(kind, match=says):
        cluster.start()
    assert cluster.processes == ()


OTHER_SHAPES = {
    "num_layers": ("llama-mqa-llama3", {"num_hidden_layers": 2}, 2, 3),
    "num_heads": ("llama-mqa-llama3", {"num_attention_heads": 2}, 2, 4),
    "num_kv_heads": ("llama-mqa-llama3", {"num_key_value_heads": 2}, 2, 1),
    "vocab_size": ("llama-mqa-llama3", {"vocab_size": 103}, 103, 101),
}


def other_weights(folder: Path) -> None:
    path = folder / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1000:] = bytes(1000)
    path.write_bytes(data)


@pytest.mark.parametrize("field", OTHER_SHAPES)
def test_a_worker_of_another_shape_is_refused_with_both_values(known, tmp_path, field) -> None:
    recipe, overrides, theirs, ours = OTHER_SHAPES[field]
    other = save(recipe, tmp_path / "other", **{"max_position_embeddings": 2048, **overrides})
    refused = (
        f"refused by the orchestrator: {field}: {theirs}: of decode-1 (model {other}) differs from {ours} "
        f"of the orchestrator (model {known.folder}); start the orchestrator and all workers with the same model"
    )
    with (
        pytest.raises(WorkerDied, match=re.escape(refused)),
        InProcessCluster(tmp_path, known.folder, ("prefill", "decode"), by_role={"decode": {"model": str(other)}}),
    ):
        pass


def test_a_worker_of_other_weights_is_refused_with_both_fingerprints(known, folder, tmp_path) -> None:
    """Same shapes, other weights."""
    other_weights(folder)
    refused = (
        r"refused by the orchestrator: model_fingerprint: '([0-9a-f]{32})': of (prefill|decode)-\d "
        r"\(model \S+broken\) differs from '(?!\1)[0-9a-f]{32}' of the orchestrator \(model (?!\S+broken)"
    )
    by_role = {"decode": {"model": str(folder)}}
    with (
        pytest.raises(WorkerDied, match=refused),
        InProcessCluster(tmp_path, known.folder, ("prefill", "decode"), by_role=by_role),
    ):
        pass


def test_an_orchestrator_without_weights_leaves_it_to_the_workers(known, folder, tmp_path) -> None:
    """It knows shapes and vocabulary alone; pools of other weights are still refused, by each other's values."""
    lean = Path(shutil.copytree(known.folder, tmp_path / "lean"))
    (lean / WEIGHTS).unlink()
    model = {"model": str(lean)}
    with InProcessCluster(tmp_path, known.folder, ("prefill", "decode"), orchestrator=model):
        pass
    other_weights(folder)
    refused = r"model_fingerprint: '\w{32}': of (prefill-0|decode-1) .* differs from '\w{32}' of (prefill-0|decode-1) "
    with (
        pytest.raises(WorkerDied, match=refused),
        InProcessCluster(
            tmp_path,
            known.folder,
            ("prefill", "decode"),
            orchestrator=model,
            by_role={"decode": {"model": str(folder)}},
        ),
    ):
        pass


def test_pools_of_different_dtypes_are_refused(known, tmp_path) -> None:
    by_role = {"prefill": {"dtype": "float32", "tp": 2}, "decode": {"dtype": "bfloat16", "cp": 2}}
    refused = (
        r"kv_dtype: '(float32|bfloat16)': of (prefill-0|decode-1) .* differs from '(?!\1)(float32|bfloat16)' "
        r"of (?!\2)(prefill-0|decode-1) .* all workers with the same dtype"
    )
    with (
        pytest.raises(WorkerDied, match=refused),
        InProcessCluster(tmp_path, known.folder, ("prefill", "decode"), by_role=by_role, rank_processes=False),
    ):
        pass


def up(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.main", "up", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("smollm3-9b", "'smollm3-9b' is no model known here (smollm2-135m), and no folder or GGUF file of that name"),
        ("/nowhere/model.gguf", "'/nowhere/model.gguf' is no model known here"),
    ],
)
def test_up_names_a_model_that_is_unknown(tmp_path, model, says) -> None:
    topology = tmp_path / "topology.yaml"
    topology.write_text(f"model: {model}\n")
    done = up(str(topology))
    assert done.returncode == 2
    assert says in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
