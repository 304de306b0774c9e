"""What `scripts/demo` shows: prefill and decode apart, one question, where the time went, nothing left behind."""

from __future__ import annotations

import sys

from anabranch.config.options import KvTransport
from anabranch.config.topology import PoolConfig, Pools, Topology
from anabranch.errors import AnabranchError
from anabranch.system.standard_streams import standard_streams
from anabranch_client import ChatMessage, Client, ClientError, Sampling
from launch import sweeper
from launch.cluster import LocalCluster
from launch.generate import stream_answer
from launch.report import interrupt_on_signals
from launch.show import err, out, process_table
from launch.terminal_text import said
from transport.planes.registry import available_planes

QUESTION = "What is the capital of France, and what is it known for?"
MAX_TOKENS = 96
ANSWER_TIMEOUT_S = 120.0


def choose_transport() -> KvTransport:
    """UCX, or TCP with the reason said aloud."""
    ucx = next(status for status in available_planes() if status.name == "ucx")
    if ucx.usable:
        return "ucx"
    out.print(f"[yellow]UCX is not to be had here[/yellow] ({said(ucx.reason)}); KV goes over TCP")
    return "tcp"


def demo(question: str) -> None:
    """Start 1 prefill + 1 decode, ask, show, stop.

    Raises:
        AnabranchError, ClientError: what went wrong.
    """
    transport = choose_transport()
    topology = Topology(kv_transport=transport, pools=Pools(prefill=PoolConfig(), decode=PoolConfig()))
    with err.status(f"starting one prefill and one decode worker, {topology.model}, KV over {transport} ..."):
        cluster = LocalCluster(topology)
        cluster.start()
    with cluster, Client(cluster.endpoint) as client:
        folder = cluster.folder
        out.print(f"\n[bold]> {said(question)}[/bold]\n")
        sampling = Sampling(max_tokens=MAX_TOKENS)
        stream_answer(client, [ChatMessage("user", question)], sampling, ANSWER_TIMEOUT_S, out)
        out.print()
        out.print(process_table(cluster.processes))
    left = sweeper.marked_processes(str(folder))
    out.print(f"\nstopped: {len(left)} processes and {int(folder.exists())} folders left behind")
    if left or folder.exists():
        raise SystemExit(1)


def main() -> None:
    interrupt_on_signals()
    try:
        demo(" ".join(sys.argv[1:]) or QUESTION)
    except (AnabranchError, ClientError) as error:
        err.print(f"[bold red]error:[/bold red] {said(error)}", soft_wrap=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    with standard_streams():
        main()
