"""Collectives between the ranks of one worker: sums, gathers, transfers.

    world = create_group("auto", rank=rank, size=mesh.world_size, rendezvous=folder, device="cpu")
    tp, cp = world.split(mesh.cp_rank(rank)), world.split(mesh.tp_rank(rank))
    hidden = tp.all_reduce(hidden)
    handle = cp.post([k, v], next_rank, [next_k, next_v], previous_rank)
    ...                                         # the bytes travel while this rank computes
    handle.wait()
    for group in (tp, cp, world):
        group.close()

`folder` is private to the worker's ranks and used once: their parent makes it with mode 0700, starts the ranks,
and removes it when they are gone. Every wait has a deadline; a rank that dies, stalls or aborts ends all others'
waits with PeerLost or DeadlineExceeded, and the group with them.

| name | between | carried by |
|---|---|---|
| shm | CPU ranks of a host | shared memory; needs Linux and a C++ compiler |
| gloo | CPU ranks | TCP on loopback |
| nccl | GPU ranks | NVLink, PCIe or network |

In tests, ranks are threads: `anabranch.parallel.threads.run_ranks`. A group that spans hosts would sum within
each host first and then between hosts; `split` by host gives both levels.
"""

from transport.collectives.backends import BACKENDS, choose_backend, create_group
from transport.collectives.base import COLLECTIVE_TIMEOUT_S, CollectiveGroup

__all__ = [
    "BACKENDS",
    "COLLECTIVE_TIMEOUT_S",
    "CollectiveGroup",
    "choose_backend",
    "create_group",
]
