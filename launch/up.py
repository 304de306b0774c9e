"""`anabranch up`: a cluster on this machine, for as long as the command runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from anabranch.config.load import load_topology
from anabranch.config.topology import Topology
from anabranch.system.files import write_atomically
from anabranch.system.user_cache import cache_problem
from anabranch_client import Client, ClientError
from launch.cluster import READY_TIMEOUT_S, LocalCluster
from launch.cluster_record import record_path, write_record
from launch.numbers import seconds
from launch.process_plan import ORCHESTRATOR_NAME
from launch.process_table import ProcessEnd
from launch.ready_file import claim_ready_file
from launch.report import EXIT_FAILED, interrupt_on_signals, reported, warn
from launch.show import err, out, process_table
from launch.terminal_text import said

MODEL_TIMEOUT_S = 10.0


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
        float,
        typer.Option(metavar="S", callback=seconds(), help="Give up where the cluster is not ready in time, seconds."),
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
    ready = claim_ready_file(ready_file) if ready_file is not None else None
    if (problem := cache_problem()) is not None:
        warn(f"{problem}; meanwhile compiled code goes to a temporary folder")
    cluster = LocalCluster(
        topology,
        verbose=verbose,
        ready_timeout_s=ready_timeout,
        log_folder=log_dir,
        sweep_paths=[record_path(), *([ready] if ready is not None else [])],
    )
    num_ends = 0
    ready_to_serve = False
    try:
        with err.status(f"starting {said(topology.model)} ..."):
            cluster.start()
        ready_to_serve = True
        try:
            write_record(cluster.endpoint, topology.model, str(cluster.admin_token_file))
        except OSError as error:
            warn(
                f"{record_path()}: cannot be written ({error.strerror}); "
                f"give `anabranch generate` --endpoint {cluster.endpoint}"
            )
        if ready is not None:
            write_atomically(ready, ready_json(cluster))
        out.print(process_table(cluster.processes))
        say_lowered_context(topology, cluster.endpoint)
        out.print(f"\ngRPC [bold]{said(cluster.endpoint)}[/bold]", soft_wrap=True)
        out.print('try  anabranch generate --chat "What is the capital of France?"\n', soft_wrap=True)
        while True:
            end = cluster.wait_for_end(after=num_ends)
            num_ends += 1
            role = next((process.role for process in cluster.processes if process.name == end.exit.name), "")
            missing_role = cluster.missing_role
            say_end(end, role, still_serves=not missing_role)
            if end.exit.name == ORCHESTRATOR_NAME:
                raise typer.Exit(EXIT_FAILED)
            if missing_role:
                err.print(f"no {missing_role} worker is left, so nothing can be served; `anabranch up` starts anew")
                raise typer.Exit(EXIT_FAILED)
    except KeyboardInterrupt:
        err.print("stopping ...")
        if not ready_to_serve:
            raise
    finally:
        lost = cluster.lost
        cluster.stop()
    if lost:
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


def say_lowered_context(topology: Topology, endpoint: str) -> None:
    """Say where requests may be no longer than the model's context although the topology asks for more."""
    asked = topology.max_context
    if not asked:
        return
    try:
        with Client(endpoint, timeout_s=MODEL_TIMEOUT_S) as client:
            served = client.model().max_context
    except ClientError:
        # A gateway that has gone again is said by whoever waits for its death.
        return
    if served < asked:
        err.print(f"[yellow]max_context:[/yellow] {asked} asked, {served} served: the model's context ends there")


def say_end(end: ProcessEnd, role: str, *, still_serves: bool) -> None:
    """Say what ended, how, what it said last, and what that means where the others go on."""
    death = end.exit
    if end.left:
        err.print(f"{said(death.name)} has left", soft_wrap=True)
        return
    lines = "".join(f"\n    {line}" for line in death.log_tail[-5:])
    err.print(f"[bold red]died:[/bold red] {said(str(death) + lines)}", soft_wrap=True)
    if death.name == ORCHESTRATOR_NAME:
        return
    if end.again_in_s is not None:
        err.print(f"{said(death.name)} is started again in {end.again_in_s:g} s", soft_wrap=True)
    elif still_serves:
        meanwhile = "its requests have failed, the others go on"
        if role.startswith("ffn"):
            meanwhile = "the other ffn workers load what it held, where that fits"
        err.print(f"{said(death.name)} stays away (restart); {meanwhile}; `anabranch up` again brings it back")
