"""Whether a topology's meshes fit the model and this machine, before anything is started."""

from __future__ import annotations

from anabranch.config.topology import Topology, file_key
from anabranch.errors import ConfigError
from anabranch.model.sources import ModelSource
from launch.process_plan import plan_workers


def check_fit(topology: Topology, source: ModelSource) -> None:
    """Check workers of several ranks, and whether FFN workers can hold all experts; what else there is checks itself.

    Raises:
        ConfigError: names the key, the value, what the machine or the model has, and the remedy.
        ModelError: the model's configuration cannot be read, or its weights' headers say something else.
    """
    ffn = topology.pools.ffn
    if ffn is None and all(pool.num_ranks == 1 for pool in topology.pools.by_role.values()):
        return
    # These need torch, which a launcher of single ranks can do without.
    from anabranch.engine.ffn_shares import ffn_shares
    from anabranch.engine.fit import check_memory, check_worker
    from anabranch.model.load import check_weights

    model, weights = source.open()
    with weights:
        check_weights(model, weights)
    workers = plan_workers(topology, control="")
    shares: dict[str, int] = {}
    try:
        for role in topology.pools.by_role:
            for worker in workers:
                if worker.role == role:
                    check_worker(worker, model)
            if role == "ffn" and ffn is not None:
                shares = ffn_shares(workers, model, ffn.replicas)
    except ConfigError as error:
        key = error.key if error.key == "device" else f"pools.{role}.{file_key(error.key)}"
        raise ConfigError(key, error.value, error.remedy) from None
    check_memory(workers, model, shares)
