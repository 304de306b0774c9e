"""Who is in the cluster and how loaded; the token is read from the file that `$ANABRANCH_ADMIN_TOKEN_FILE` names."""

from __future__ import annotations

import os
import sys

from anabranch_client import Admin

ENDPOINT = os.environ.get("ANABRANCH_ENDPOINT", "127.0.0.1:50051")


def main(drain: str | None = None) -> None:
    """Args: drain: a worker that shall finish what runs and leave."""
    with Admin(ENDPOINT) as admin:
        if drain is not None:
            admin.drain(drain)
        cluster = admin.cluster()
    print(f"{cluster.num_requests} requests, {cluster.num_queued} of them queued")
    for worker in cluster.workers:
        blocks = f"{worker.num_free_blocks} of {worker.num_total_blocks} KV blocks free"
        print(f"{worker.name}: {worker.role}, {worker.state}, tp {worker.tp}, cp {worker.cp}, {blocks}")
    for departure in cluster.departures:
        print(f"{departure.name} is gone: {departure.reason}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
