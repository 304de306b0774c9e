"""SmolLM2-135M's shape with random weights and as many layers as asked for: what timings need of a model."""

from __future__ import annotations

from collections.abc import Collection

import torch

from anabranch.kernels.base import Kernels
from anabranch.model.config import ModelConfig, RopeConfig
from anabranch.model.load import load_transformer
from anabranch.model.transformer import Transformer
from anabranch.parallel.group import Group, SingleRank

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB = 576, 9, 3, 64, 1536, 49152


def smollm2_config(num_layers: int) -> ModelConfig:
    """The configuration, for contexts of any length."""
    inv_freq = (100_000.0 ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM)).tolist()
    return ModelConfig(
        architecture="LlamaForCausalLM",
        model_type="llama",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_layers=num_layers,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=FFN,
        rms_eps=1e-5,
        rope=RopeConfig(kind="default", inv_freq=tuple(inv_freq)),
        max_context=1 << 20,
        tie_embeddings=True,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        windows=(None,) * num_layers,
    )


class RandomWeights:
    """A `WeightSource` of small random values, the same for every rank."""

    def __init__(self, num_layers: int) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (VOCAB, HIDDEN),
            "model.norm.weight": (HIDDEN,),
        }
        for layer in range(num_layers):
            prefix = f"model.layers.{layer}."
            self._shapes |= {
                prefix + "input_layernorm.weight": (HIDDEN,),
                prefix + "post_attention_layernorm.weight": (HIDDEN,),
                prefix + "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
                prefix + "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
                prefix + "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
                prefix + "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
                prefix + "mlp.gate_proj.weight": (FFN, HIDDEN),
                prefix + "mlp.up_proj.weight": (FFN, HIDDEN),
                prefix + "mlp.down_proj.weight": (HIDDEN, FFN),
            }

    def names(self) -> Collection[str]:
        return self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, slices: tuple[slice, ...] = ()) -> torch.Tensor:
        generator = torch.Generator().manual_seed(len(name) + 7919 * sorted(self._shapes).index(name))
        return (torch.randn(self._shapes[name], generator=generator) * 0.05)[slices]

    def where(self, name: str) -> str:
        return "random weights"

    def close(self) -> None:
        """Nothing to close."""


def random_model(num_layers: int, dtype: torch.dtype, kernels: Kernels, group: Group | None = None) -> Transformer:
    """A model with `num_layers` layers on the CPU."""
    return load_transformer(
        smollm2_config(num_layers),
        RandomWeights(num_layers),
        dtype=dtype,
        device=torch.device("cpu"),
        kernels=kernels,
        group=group or SingleRank(),
    )
