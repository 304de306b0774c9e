"""What a worker must say of itself before it is taken in."""

from __future__ import annotations

from collections.abc import Iterable

from anabranch.errors import ConfigError
from anabranch.protocol.workers import ModelIdentity, WorkerInfo

# The fingerprint comes last: where shapes differ, they say more.
_MODEL_FIELDS = tuple(field for field in ModelIdentity.__struct_fields__ if field not in ("model", "model_fingerprint"))
_MODEL_FIELDS += ("model_fingerprint",)


def check_registration(
    info: WorkerInfo, living: Iterable[WorkerInfo], served: ModelIdentity, worker_timeout_s: float
) -> None:
    """Raise ConfigError, which names the field, both sides' values and the remedy, where a worker cannot be taken in.

    Args:
        living: the workers that are there.
        served: the orchestrator's own model.
        worker_timeout_s: the silence after which the orchestrator takes a worker for dead.
    """
    living = list(living)
    for other in living:
        if other.name == info.name:
            raise ConfigError(
                "name",
                info.name,
                f"is taken by a living worker (pid {other.pid} on {other.host}); choose another name",
            )
    # The orchestrator need not have the weights; a worker has them, and says which.
    for field in ("name", "model_fingerprint", "kv_dtype"):
        if not getattr(info, field):
            raise ConfigError(field, "", f"a worker must send its {field}; run the same release everywhere")
    # An ffn worker has no requests, and so no KV.
    needed = ("incarnation",) if info.role == "ffn" else ("max_context", "num_blocks", "block_size")
    for field in (*needed, "vocab_size"):
        if getattr(info, field) < 1:
            raise ConfigError(field, getattr(info, field), "must be at least 1")
    if info.role == "ffn" and not info.addresses:
        raise ConfigError("addresses", {}, "an ffn worker must send where attn workers reach it")
    _check_order(info, worker_timeout_s)
    _check_alike(info, served, "the orchestrator", _MODEL_FIELDS)
    for other in living:
        _check_alike(info, other, other.name, (*_MODEL_FIELDS, "kv_dtype"))


def _check_order(info: WorkerInfo, worker_timeout_s: float) -> None:
    """A worker that is well must not look silent, and one that is silent not like one whose step takes long."""
    if worker_timeout_s < 2 * info.heartbeat_s:
        raise ConfigError(
            "heartbeat_s",
            info.heartbeat_s,
            f"of {info.name} must be at most half of the orchestrator's worker_timeout_s ({worker_timeout_s:g} s); "
            "lower the one or raise the other",
        )
    if 0.0 < info.step_stall_s <= worker_timeout_s:
        raise ConfigError(
            "step_stall_s",
            info.step_stall_s,
            f"of {info.name} must be above the orchestrator's worker_timeout_s ({worker_timeout_s:g} s); "
            "raise the one or lower the other",
        )


def _check_alike(info: WorkerInfo, other: ModelIdentity, who: str, fields: tuple[str, ...]) -> None:
    """Raise ConfigError for the first field that differs.

    Only a fingerprint may be unknown (empty), and only on the other side: the orchestrator's, without the weights.
    """
    for field in fields:
        ours, theirs = getattr(info, field), getattr(other, field)
        if ours != theirs and not (field == "model_fingerprint" and theirs == ""):
            raise ConfigError(
                field,
                ours,
                f"of {info.name} (model {info.model}) differs from {theirs!r} of {who} (model {other.model}); "
                "start the orchestrator and all workers with the same model, and all workers with the same dtype",
            )
