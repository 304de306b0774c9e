"""A model's shape as plain data: all that layers, cache and scheduler need to know of a checkpoint."""

from __future__ import annotations

import hashlib
import math

import msgspec

from anabranch.errors import CheckpointError

# Positions are counted in 32 bits in places.
MAX_CONTEXT = (1 << 31) - 1


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rotary embedding, its scaling already worked into the frequencies.

    Attributes:
        kind: default, linear, llama3, yarn, dynamic, longrope, or factors where a GGUF file lists them.
        inv_freq: inverse frequencies of the features that are turned, two each; exact float32 values.
        attention_scaling: factor on cos and sin.
    """

    kind: str
    inv_freq: tuple[float, ...]
    attention_scaling: float = 1.0

    @property
    def rotary_dim(self) -> int:
        """Features of a head that are turned, its first ones; the others know no position."""
        return 2 * len(self.inv_freq)


class MoeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Mixture of experts.

    Attributes:
        top_k: experts that each token chooses.
        expert_intermediate: features of one expert.
        shared_expert_intermediate: features of the expert that every token passes; 0: there is none.
        norm_topk_prob: whether the chosen experts' weights are scaled to sum to 1.
        sparse_layers: per layer, whether it has experts; the others are dense.
    """

    num_experts: int
    top_k: int
    expert_intermediate: int
    shared_expert_intermediate: int
    norm_topk_prob: bool
    sparse_layers: tuple[bool, ...]


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A decoder-only transformer of a supported family.

    Attributes:
        architecture: the class name in transformers, e.g. LlamaForCausalLM.
        intermediate_size: features of a dense FFN.
        max_context: most tokens of prompt and answer.
        tie_embeddings: the LM head is the embedding; False where the checkpoint stores another (`tied_head`).
        fused_projections: the checkpoint stores q, k and v as one `qkv_proj`, and gate and up as one `gate_up_proj`.
        windows: per layer, the tokens that a token sees (itself included); None: all before it.
        eos_token_ids: end-of-sequence tokens that the configuration names; `stop_ids` knows all that end an answer.
        weights_digest: hash of the weights' names, shapes and a sample of their values; empty: not read yet.
    """

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_eps: float
    rope: RopeConfig
    max_context: int
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    fused_projections: bool = False
    moe: MoeConfig | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    weights_digest: str = ""

    def __post_init__(self) -> None:
        def check(ok: bool, what: str) -> None:
            if not ok:
                raise CheckpointError(f"model configuration of {self.architecture}: {what}")

        for key in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "max_context",
        ):
            check(getattr(self, key) >= 1, f"{key} is {getattr(self, key)}; it must be at least 1")
        check(self.max_context <= MAX_CONTEXT, f"max_context is {self.max_context}; it must be at most {MAX_CONTEXT}")
        check(
            self.num_heads % self.num_kv_heads == 0,
            f"{self.num_heads} query heads are no multiple of {self.num_kv_heads} KV heads",
        )
        check(
            2 <= self.rope.rotary_dim <= self.head_dim,
            f"{len(self.rope.inv_freq)} rotary frequencies turn {self.rope.rotary_dim} of {self.head_dim} features",
        )
        check(
            all(0.0 <= freq < math.inf for freq in self.rope.inv_freq) and 0.0 < self.rope.attention_scaling < math.inf,
            "the rotary frequencies are not finite; look at the rope's parameters",
        )
        check(len(self.windows) == self.num_layers, f"{len(self.windows)} windows for {self.num_layers} layers")
        check(all(w is None or w >= 1 for w in self.windows), "a sliding window must hold at least 1 token")
        if self.moe is not None:
            moe = self.moe
            check(len(moe.sparse_layers) == self.num_layers, f"{len(moe.sparse_layers)} layer kinds, not one per layer")
            check(1 <= moe.top_k <= moe.num_experts, f"a token cannot choose {moe.top_k} of {moe.num_experts} experts")
            check(moe.expert_intermediate >= 1, f"experts of {moe.expert_intermediate} features")

    def is_sparse(self, layer: int) -> bool:
        """Whether the layer's FFN is a mixture of experts."""
        return self.moe is not None and self.moe.sparse_layers[layer]

    def fingerprint(self) -> str:
        """32 hex digits that two pools compare to know that they serve the same model."""
        return hashlib.blake2b(msgspec.msgpack.encode(self), digest_size=16).hexdigest()
