"""Backends of collective groups by name: which there are here, which to use, and how to make a group."""

from __future__ import annotations

import logging
from pathlib import Path

from anabranch.errors import ConfigError, TransportUnavailable
from transport.collectives import rendezvous as meeting
from transport.collectives.base import COLLECTIVE_TIMEOUT_S, CollectiveGroup

log = logging.getLogger(__name__)

BACKENDS = ("auto", "shm", "gloo", "nccl")
START_TIMEOUT_S = 60.0


def create_group(
    name: str,
    *,
    rank: int,
    size: int,
    rendezvous: Path,
    device: str = "cpu",
    collective_timeout_s: float = COLLECTIVE_TIMEOUT_S,
    start_timeout_s: float = START_TIMEOUT_S,
) -> CollectiveGroup:
    """Make the group of a worker's ranks; every rank calls it with the same folder.

    Args:
        name: shm, gloo, nccl, or auto: nccl on GPUs; on CPU shm where it can be built, else gloo.
        rendezvous: a private, empty folder that the ranks' parent made for this group alone.
        device: where the ranks' tensors are.
        start_timeout_s: how long to wait for the others to come.

    Raises:
        ConfigError: no group has that name, or an unfit folder.
        TransportUnavailable: it cannot be had here; says why and the remedy.
        DeadlineExceeded: a rank did not come.
    """
    if name not in BACKENDS:
        raise ConfigError("collectives", name, f"must be one of {', '.join(BACKENDS)}")
    meeting.check_folder(rendezvous)
    if name == "auto":
        name = _agree(rank, rendezvous, device, start_timeout_s)
    if name == "shm":
        from transport.collectives import shm

        return shm.join(
            rank=rank,
            size=size,
            rendezvous=rendezvous,
            collective_timeout_s=collective_timeout_s,
            start_timeout_s=start_timeout_s,
        )
    from transport.collectives import torch_dist

    return torch_dist.join(
        backend=name,
        rank=rank,
        size=size,
        rendezvous=rendezvous,
        collective_timeout_s=collective_timeout_s,
        start_timeout_s=start_timeout_s,
    )


def choose_backend(device: str) -> str:
    """What `auto` stands for here, with a line in the log where it is not the best."""
    if device.partition(":")[0] != "cpu":
        return "nccl"
    from transport.collectives.build import load_library

    try:
        load_library()
    except TransportUnavailable as error:
        log.warning("collectives over gloo, about a hundred times slower than shared memory: %s", error)
        return "gloo"
    return "shm"


def _agree(rank: int, folder: Path, device: str, start_timeout_s: float) -> str:
    """Rank 0 chooses for all."""
    if rank == 0:
        chosen = choose_backend(device)
        meeting.leave_ticket(folder, "backend", chosen.encode())
        return chosen
    patience = meeting.Patience("rank 0's choice of collectives", start_timeout_s)
    while (found := meeting.read_ticket(folder, "backend")) is None:
        patience.pause()
    chosen = found.decode("ascii", "replace")
    if chosen not in BACKENDS[1:]:
        raise ConfigError("collectives", chosen, f"rank 0 must choose one of {', '.join(BACKENDS[1:])}")
    return chosen
