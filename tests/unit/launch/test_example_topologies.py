"""Every topology of `examples/` is read as `anabranch up` reads it, and means workers that fit its model."""

from __future__ import annotations

from pathlib import Path

import pytest

from anabranch.config.load import load_topology
from launch.process_plan import plan_processes, plan_workers

pytestmark = pytest.mark.unit

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
MESHES = {
    "one_colocated": ["colocated-0 1x1"],
    "prefill_decode": ["prefill-0 1x1", "decode-0 1x1"],
    "two_decodes_tp2": ["prefill-0 1x1", "decode-0 2x1", "decode-1 2x1"],
    "cp2": ["prefill-0 1x2", "decode-0 1x2"],
    "attention_and_ffn": ["prefill-0 1x1", "attn-0 1x1", "ffn-0 1x1", "ffn-1 1x1"],
    "gguf": ["prefill-0 1x1", "decode-0 1x1"],
}


def test_every_file_is_known_here_and_in_the_readme() -> None:
    files = sorted((EXAMPLES / "topologies").iterdir())
    assert {file.stem for file in files} == set(MESHES)
    readme = (EXAMPLES / "README.md").read_text()
    for file in [*files, *(EXAMPLES / "sdk").glob("*.py")]:
        assert f"({file.parent.name}/{file.name})" in readme, file


@pytest.mark.parametrize("name", MESHES)
def test_it_means_these_workers(name: str) -> None:
    topology = load_topology(EXAMPLES / "topologies" / f"{name}.yaml")
    workers = plan_workers(topology, "ipc://x", cores=(0, 1))
    assert [f"{worker.name} {worker.tp}x{worker.cp}" for worker in workers] == MESHES[name]
    assert topology.grpc == "127.0.0.1:50051", "where the snippets ask"
    processes = plan_processes(topology, workers)
    assert len(processes) == (1 if topology.kv_transport == "inproc" else len(workers))
