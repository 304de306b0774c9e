"""A rank's empty expert table, as its configuration says."""

from __future__ import annotations

import logging

from anabranch.config.worker import WorkerConfig
from anabranch.engine.device import resolve_device, resolve_dtype, resolve_row_exact
from anabranch.kernels.native import select_kernels
from anabranch.kernels.row_exact import RowExact
from anabranch.model.config import ModelConfig
from anabranch.model.expert_table import ExpertTable
from anabranch.model.load import load_expert_table
from anabranch.parallel.group import Group

logger = logging.getLogger(__name__)


def make_table(config: WorkerConfig, model: ModelConfig, group: Group) -> ExpertTable:
    """Check the checkpoint and select what is computed with; see `load_expert_table`.

    Args:
        config: the rank's.
        model: the configuration, read before.
        group: the worker's ranks.
    """
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    kernels = select_kernels(device, dtype, config.native_kernels)
    exact = resolve_row_exact(config.row_exact, dtype)
    products = RowExact(kernels) if exact else kernels
    _, table = load_expert_table(
        config.model,
        dtype=dtype,
        device=device,
        products=products,
        group=group,
        shared=config.shared_expert == "ffn",
        config=model,
    )
    logger.info(
        "%s in %s on %s, %s kernels%s, %d threads",
        config.model,
        str(dtype).removeprefix("torch."),
        device,
        kernels.name,
        ", row-exact" if exact else "",
        config.threads,
    )
    return table
