"""How many bytes of experts each FFN worker of a topology is going to hold: counted before anything is started."""

from __future__ import annotations

from collections.abc import Sequence

from anabranch.config.worker import WorkerConfig
from anabranch.engine.device import resolve_device, resolve_dtype
from anabranch.errors import ConfigError
from anabranch.model.config import ModelConfig
from anabranch.model.shared_layers import ffn_layers
from anabranch.parallel.expert_placement import place


def ffn_shares(workers: Sequence[WorkerConfig], model: ModelConfig, replicas: int) -> dict[str, int]:
    """Name of each ffn worker -> bytes of the experts that the orchestrator will place there, all ranks together.

    Args:
        workers: of any role.
        replicas: workers that hold each expert; 0: all.

    Raises:
        ConfigError: `capacity_bytes`: all experts, so many times, are more than the workers may hold.
    """
    nodes = [worker for worker in workers if worker.role == "ffn"]
    if not nodes:
        return {}
    dtype = str(resolve_dtype(nodes[0].dtype, resolve_device(nodes[0].device))).removeprefix("torch.")
    layers = ffn_layers(model, dtype, shared=nodes[0].shared_expert == "ffn")
    copies = replicas or len(nodes)
    capacity = nodes[0].capacity_bytes
    needed = copies * sum(count * size for count, size in layers)
    if capacity and needed > capacity * len(nodes):
        raise ConfigError(
            "capacity_bytes",
            capacity,
            f"{len(nodes)} ffn workers hold {capacity * len(nodes)} bytes; all experts, {copies} times, take {needed}: "
            f"raise it to at least {-(-needed // len(nodes))}, or workers to {-(-needed // capacity)}",
        )
    placed = place(
        layers,
        {worker.name: worker.capacity_bytes for worker in nodes},
        replicas=replicas,
        current={worker.name: () for worker in nodes},
    )
    sizes = [size for _, size in layers]
    return {
        name: sum(len(experts) * size for experts, size in zip(holding, sizes, strict=True))
        for name, holding in placed.items()
    }
