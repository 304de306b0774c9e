"""How many bytes a rank's weights take, and how far they can be cut: counted before anything is loaded."""

from __future__ import annotations

from anabranch.model.config import ModelConfig, MoeConfig
from anabranch.parallel.layout import DTYPE_BYTES
from anabranch.parallel.split import kv_heads_of, padded_share, query_heads_of, split_range

_ROTARY_BYTES = 4


def weight_bytes(config: ModelConfig, dtype: str, tp: int = 1) -> int:
    """Bytes of the weights of the tensor-parallel rank that holds most, in float32, bfloat16 or float16."""
    return max(attention_bytes(config, dtype, tp, rank) + ffn_bytes(config, dtype, tp, rank) for rank in range(tp))


def attention_bytes(
    config: ModelConfig, dtype: str, tp: int, rank: int, *, shared_experts: bool = False, shared_gates: bool = False
) -> int:
    """Bytes of an `AttentionStack`, with shared experts, with their gates alone, or with neither."""
    vocabulary = padded_share(config.vocab_size, tp, rank)[0] * config.hidden_size
    count = vocabulary if config.tie_embeddings else 2 * vocabulary
    for layer in range(config.num_layers):
        count += _attention_elements(config, tp, rank)
        if config.moe is not None and config.is_sparse(layer):
            count += config.moe.num_experts * config.hidden_size  # the gate
            count += _shared_elements(config, config.moe, tp, rank) if shared_experts else 0
            count += config.hidden_size if shared_gates and config.moe.shared_expert_intermediate else 0
    return (count + config.hidden_size) * DTYPE_BYTES[dtype] + _ROTARY_BYTES * config.rope.rotary_dim


def expert_bytes(config: ModelConfig, dtype: str, layer: int, expert: int = 0) -> int:
    """Bytes of one expert of a layer, whole, without the shared one's gate; see `num_experts`."""
    if config.moe is not None and config.is_sparse(layer):
        shared = expert == config.moe.num_experts
        features = config.moe.shared_expert_intermediate if shared else config.moe.expert_intermediate
        return _dense_elements(config, features, 1, 0) * DTYPE_BYTES[dtype]
    return _dense_elements(config, config.intermediate_size, 1, 0, bias=config.mlp_bias) * DTYPE_BYTES[dtype]


def num_experts(config: ModelConfig, layer: int, *, shared: bool = False) -> int:
    """Experts of a layer; a dense layer is one expert.

    Args:
        shared: count the one that all rows choose too, where there is one: it has the last number.
    """
    if config.moe is None or not config.is_sparse(layer):
        return 1
    return config.moe.num_experts + bool(shared and config.moe.shared_expert_intermediate)


def ffn_bytes(config: ModelConfig, dtype: str, tp: int, rank: int) -> int:
    """Bytes of an `FfnStack`."""
    count = 0
    for layer in range(config.num_layers):
        if config.moe is not None and config.is_sparse(layer):
            count += _experts_elements(config, config.moe, tp, rank)
        else:
            count += _dense_elements(config, config.intermediate_size, tp, rank, bias=config.mlp_bias)
    return count * DTYPE_BYTES[dtype]


def _attention_elements(config: ModelConfig, tp: int, rank: int) -> int:
    hidden = config.hidden_size
    q = len(query_heads_of(config.num_heads, config.num_kv_heads, tp, rank)) * config.head_dim
    qkv = q + 2 * len(kv_heads_of(config.num_kv_heads, tp, rank)) * config.head_dim
    count = hidden * (qkv + q) + 2 * hidden
    count += qkv if config.qkv_bias else 0
    count += hidden if config.o_bias and rank == 0 else 0
    return count + (2 * config.head_dim if config.qk_norm else 0)


def _dense_elements(config: ModelConfig, num_features: int, tp: int, rank: int, *, bias: bool = False) -> int:
    held = len(split_range(num_features, tp, rank))
    count = 3 * held * config.hidden_size
    return count + (2 * held + (config.hidden_size if rank == 0 else 0) if bias else 0)


def _experts_elements(config: ModelConfig, moe: MoeConfig, tp: int, rank: int) -> int:
    experts = moe.num_experts * _dense_elements(config, moe.expert_intermediate, tp, rank)
    return experts + _shared_elements(config, moe, tp, rank)


def _shared_elements(config: ModelConfig, moe: MoeConfig, tp: int, rank: int) -> int:
    if not moe.shared_expert_intermediate:
        return 0
    return _dense_elements(config, moe.shared_expert_intermediate, tp, rank) + config.hidden_size


def smallest_ffn(config: ModelConfig) -> int:
    """Features of the narrowest FFN or expert: the most ranks that a whole model can be cut among."""
    return min(smallest_expert(config), shared_features(config) or smallest_expert(config))


def smallest_held(config: ModelConfig, *, shared: bool) -> int:
    """Features of the narrowest that an FFN worker holds, shared experts or not: the most ranks that it can have."""
    return smallest_ffn(config) if shared else smallest_expert(config)


def smallest_expert(config: ModelConfig) -> int:
    """Features of the narrowest dense FFN or chosen expert."""
    if config.moe is None:
        return config.intermediate_size
    if all(config.moe.sparse_layers):
        return config.moe.expert_intermediate
    return min(config.moe.expert_intermediate, config.intermediate_size)


def shared_features(config: ModelConfig) -> int:
    """Features of the expert that every token of a sparse layer passes; 0 where there is none."""
    return 0 if config.moe is None else config.moe.shared_expert_intermediate
