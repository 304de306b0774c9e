"""`scripts/verify-afd`: every combination of (M, N), lanes and meshes gives transformers' tokens, for each model.

    scripts/verify-afd                           all models, 528 topologies each
    scripts/verify-afd --quick mixtral           a part in which every two values of two columns meet
    scripts/verify-afd --done FILE               note what was equal there, and leave out what is noted already

A line for each topology, then a line for each model; exit status 1 where something differed or did not start.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from anabranch.config.options import SharedExpert
from anabranch.config.topology import AttnPoolConfig, FfnPoolConfig, PoolConfig, Pools, Topology
from anabranch.errors import AnabranchError
from anabranch.model.sources import resolve_model
from launch.mesh_option import with_meshes
from launch.verify import Verifier, print_report
from tests.support.families import ROUTINGS
from tests.support.known import SMOLLM2, Known, smollm2_answers
from tests.support.mixture import write_mixture
from tests.support.references import KnownAnswers

SMOLLM2_MIXTURE = "smollm2-135m-8-experts"
TINY = ("mixtral", "qwen2-moe-mixed", "qwen3-moe-mixed", *ROUTINGS)
# With its shared experts at the FFN workers.
POOLED = "qwen2-moe-mixed-pooled"
MODELS = (SMOLLM2, SMOLLM2_MIXTURE, *TINY, POOLED)

PAIRS = (*itertools.product((1, 2, 3), repeat=2), (4, 1), (1, 4))
LANES = (1, 2, 3, 4)
ATTN_MESHES = ("1x1", "2x1", "1x2", "2x2")
PREFILL_MESHES = ("1x1", "2x1", "1x2")
COLUMNS = (PAIRS, LANES, ATTN_MESHES, PREFILL_MESHES)
Row = tuple[object, ...]

CONTEXT = 640
TINY_LENGTHS, TINY_TOKENS = (1, 2, 5, 17, 63, 410), 9
SMOLLM2_LENGTHS, SMOLLM2_TOKENS = (1, 7, 31, 90, 200), 8
READY_TIMEOUT_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model to verify, and prompts whose answers are clear.

    Attributes:
        prompts: a file of them.
        max_tokens: of each answer.
        shared_expert: see `ClusterOptions`.
    """

    name: str
    source: str
    prompts: Path
    max_tokens: int
    shared_expert: SharedExpert = "attn"

    def topology(self) -> Topology:
        small = {"threads": 1, "kv_cache_bytes": 64 << 20, "offload_bytes": 0, "preemption": "recompute"}
        return Topology(
            model=self.source,
            dtype="float32",
            shared_expert=self.shared_expert,
            max_context=CONTEXT,
            pools=Pools(
                prefill=PoolConfig(**small),  # type: ignore[arg-type]
                attn=AttnPoolConfig(**small),  # type: ignore[arg-type]
                ffn=FfnPoolConfig(threads=1),
            ),
        )


def product() -> list[Row]:
    return list(itertools.product(*COLUMNS))


def pairwise() -> list[Row]:
    """Rows of the product in which any two values of two columns meet: each time the row with the most new meetings."""
    rows = product()
    places = list(itertools.combinations(range(len(COLUMNS)), 2))

    def meetings(row: Row) -> set[tuple[object, ...]]:
        return {(a, b, row[a], row[b]) for a, b in places}

    missing = set().union(*map(meetings, rows))
    chosen: list[Row] = []
    while missing:
        best = max(rows, key=lambda row: len(meetings(row) & missing))
        chosen.append(best)
        missing -= meetings(best)
    return chosen


def mesh_of(row: Row) -> str:
    """As `--mesh` has it."""
    (num_attn, num_ffn), lanes, attn, prefill = row  # type: ignore[misc]
    return f"{prefill}:attn{num_attn}*{attn}/{lanes}+ffn{num_ffn}"


@contextmanager
def made(name: str) -> Iterator[Model]:
    """A model by its name, written to a folder of its own where it has to be made."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        answers: KnownAnswers
        if name in (*TINY, POOLED):
            known = Known(name.removesuffix("-pooled"), folder / "model", CONTEXT)
            answers, source = known, str(known.folder)
            lengths, max_tokens = TINY_LENGTHS, TINY_TOKENS
        else:
            answers, source = smollm2_answers(), SMOLLM2
            lengths, max_tokens = SMOLLM2_LENGTHS, SMOLLM2_TOKENS
        if name == SMOLLM2_MIXTURE:
            source = str(write_mixture(resolve_model(SMOLLM2).path, folder / "model"))
        prompts = folder / "prompts.jsonl"
        prompts.write_text("\n".join(json.dumps(list(answers.clear(length, max_tokens)[0])) for length in lengths))
        shared_expert: SharedExpert = "ffn" if name == POOLED else "attn"
        yield Model(name=name, source=source, prompts=prompts, max_tokens=max_tokens, shared_expert=shared_expert)


def verify(model: Model, meshes: list[str], note: Callable[[str], None]) -> list[str]:
    """Compare all; those that differ or do not start."""
    verifier = Verifier(
        prompts_file=model.prompts, max_tokens=model.max_tokens, ignore_eos=True, ready_timeout_s=READY_TIMEOUT_S
    )
    failed: list[str] = []
    for number, mesh in enumerate(meshes, start=1):
        began_s = time.monotonic()
        print(f"[{number}/{len(meshes)}] {model.name} {mesh}: ", end="", flush=True)
        try:
            report = verifier.verify(with_meshes(model.topology(), mesh))
        except AnabranchError as error:
            failed.append(mesh)
            print(f"not started: {error}", flush=True)
            continue
        if report.ok:
            print(f"equal, {report.num_tokens} tokens, {time.monotonic() - began_s:.1f} s", flush=True)
            note(mesh)
        else:
            failed.append(mesh)
            print_report(report)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/verify-afd", description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="a pairwise part of the product")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="the first N topologies of each model")
    parser.add_argument("--done", type=Path, metavar="FILE", help="leave out what is noted there; note what is equal")
    options = parser.parse_args()
    unknown = set(options.models) - set(MODELS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: give some of {', '.join(MODELS)}")
    rows = pairwise() if options.quick else product()
    meshes = [mesh_of(row) for row in rows][: options.limit or None]
    done = set(options.done.read_text().splitlines()) if options.done and options.done.exists() else set()
    summary: list[str] = []
    any_failed = False
    for name in options.models or MODELS:
        due = [mesh for mesh in meshes if f"{name} {mesh}" not in done]

        def note(mesh: str, name: str = name) -> None:
            if options.done:
                with options.done.open("a") as file:
                    file.write(f"{name} {mesh}\n")

        with made(name) as model:
            failed = verify(model, due, note)
        any_failed = any_failed or bool(failed)
        skipped = f", {len(meshes) - len(due)} noted before" if len(due) < len(meshes) else ""
        summary.append(f"{name}: {len(due) - len(failed)} of {len(due)} equal{skipped}")
        summary += [f"    not: {mesh}" for mesh in failed]
    print("\n".join(summary))
    return 1 if any_failed else 0


if __name__ == "__main__":
    sys.exit(main())
