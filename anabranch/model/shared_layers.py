"""Shared experts where FFN workers hold them: who holds what is said of layers, and each of these is one of its own.

    layer       0 .. n - 1        the model's: dense FFNs and chosen experts
                n ..              one for each layer with a shared expert: it is that layer's only one, 0

So placing them is placing dense layers: they have a size of their own, and every row needs them. Rows know nothing of
it: in a call, a layer's shared expert is its last one.
"""

from __future__ import annotations

from anabranch.model.config import ModelConfig
from anabranch.model.size import expert_bytes, num_experts
from anabranch.protocol.ffn import Holding


def ffn_layers(config: ModelConfig, dtype: str, *, shared: bool) -> tuple[tuple[int, int], ...]:
    """For each layer how many experts it has, and bytes of one of them; a dense layer has one expert.

    Args:
        dtype: float32, bfloat16 or float16.
        shared: whether shared experts follow.
    """
    layers = [(num_experts(config, layer), expert_bytes(config, dtype, layer)) for layer in range(config.num_layers)]
    sharing = sharing_layers(config) if shared else []
    return (*layers, *((1, expert_bytes(config, dtype, layer, num_experts(config, layer))) for layer in sharing))


def with_shared(config: ModelConfig, holding: Holding) -> Holding:
    """The same by the model's layers alone, as rows name experts."""
    experts = list(holding[: config.num_layers])
    for layer, held in zip(sharing_layers(config), holding[config.num_layers :], strict=False):
        experts[layer] += (num_experts(config, layer),) * bool(held)
    return tuple(experts)


def sharing_layers(config: ModelConfig) -> list[int]:
    """The layers that have a shared expert."""
    layers = range(config.num_layers)
    return [layer for layer in layers if num_experts(config, layer, shared=True) > num_experts(config, layer)]
