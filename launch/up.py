"""`anabranch up`: a cluster on this machine, for as long as the command runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from anabranch.config.load import load_topology
from anabranch.config.topology import Topology
from launch.cluster import READY_TIMEOUT_S, LocalCluster
from launch.plan import ORCHESTRATOR_NAME
from launch.process import ProcessExit
from launch.record import record_path, write_atomically, write_record
from launch.report import EXIT_FAILED, fail, interrupt_on_signals, reported
from launch.show import err, out, process_table


@reported
def up(
    topology_file: Annotated[
        Path | None,
        typer.Argument(metavar="[TOPOLOGY.yaml]", help="What to start; default: one prefill and one decode worker."),
    ] = None,
    ready_file: Annotated[
        Path | None,
        typer.Option(metavar="F", help='Write {"grpc": "host:port", ...} there once requests can be served.'),
    ] = None,
    ready_timeout: Annotated[
        float, typer.Option(metavar="S", help="Give up where the cluster is not ready in time, seconds.")
    ] = READY_TIMEOUT_S,
    log_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep each process's log there as NAME.log.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Echo the logs of all processes.")] = False,
) -> None:
    """Start a cluster on this machine and keep it until Ctrl-C.

    Without a file: smollm2-135m on one prefill and one decode worker.
    While it runs, `anabranch generate` finds it by itself.
    Ctrl-C ends every process and removes every file.

    \b
    Examples:
      anabranch up
      anabranch up cluster.yaml --ready-file /tmp/ready.json

    \b
    A topology file:
      model: smollm2-135m          # anabranch models, a Hugging Face folder, or a GGUF file
      dtype: auto                  # float32, bfloat16, auto
      kv_transport: auto           # inproc, tcp, ucx, auto
      pools: {prefill: {workers: 1}, decode: {workers: 2, kv_cache: 1GiB}}"""
    topology = load_topology(topology_file) if topology_file is not None else Topology()
    interrupt_on_signals()
    ready = ready_file.absolute() if ready_file is not None else None
    if ready is not None:
        if not ready.parent.is_dir():
            fail(f"--ready-file: {ready.parent} is no folder; make it first")
        ready.unlink(missing_ok=True)
    cluster = LocalCluster(
        topology,
        verbose=verbose,
        ready_timeout_s=ready_timeout,
        log_folder=log_dir,
        sweep_paths=[record_path(), *([ready] if ready is not None else [])],
    )
    num_deaths = 0
    ready_to_serve = False
    try:
        with err.status(f"starting {topology.model} ..."):
            cluster.start()
        ready_to_serve = True
        write_record(cluster.endpoint, topology.model, str(cluster.admin_token_file))
        if ready is not None:
            write_atomically(ready, ready_json(cluster))
        out.print(process_table(cluster.processes))
        out.print(f"\ngRPC [bold]{cluster.endpoint}[/bold]")
        out.print('try  anabranch generate --chat "What is the capital of France?"\n')
        while True:
            death = cluster.wait_for_death(after=num_deaths)
            assert death is not None
            num_deaths += 1
            say_death(death)
            if death.name == ORCHESTRATOR_NAME:
                raise typer.Exit(EXIT_FAILED)
    except KeyboardInterrupt:
        err.print("stopping ...")
        if not ready_to_serve:
            raise
    finally:
        cluster.stop()
    if num_deaths:
        raise typer.Exit(EXIT_FAILED)


def ready_json(cluster: LocalCluster) -> bytes:
    """What `--ready-file` gets."""
    processes = [{"name": p.name, "role": p.role, "pid": p.pid} for p in cluster.processes]
    ready = {
        "grpc": cluster.endpoint,
        "model": cluster.topology.model,
        "admin_token_file": str(cluster.admin_token_file),
        "processes": processes,
    }
    return json.dumps(ready).encode()


def say_death(death: ProcessExit) -> None:
    """Say what died, how, and what it said last."""
    lines = "".join(f"\n    {line}" for line in death.log_tail[-5:])
    err.print(f"[bold red]died:[/bold red] {escape(str(death) + lines)}", soft_wrap=True)
    if death.name != ORCHESTRATOR_NAME:
        err.print("its requests have failed, the others go on; `anabranch up` again brings it back")
