"""Tiny random models of every family, and plain attention over contiguous memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import transformers

from anabranch.kernels.plain import PlainKernels, attend
from anabranch.model.load import load_model
from anabranch.model.transformer import Transformer
from anabranch.parallel.group import Group, SingleRank

VOCAB = 101
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def heads(query: int, kv: int, dim: int | None = None) -> dict[str, int | None]:
    sizes = {"num_attention_heads": query, "num_key_value_heads": kv}
    return sizes if dim is None else {**sizes, "head_dim": dim}


# Name -> (class in transformers, configuration). Between them: MHA, GQA, MQA; head dims that are not
# hidden / heads; tied and untied; biases; windows; dense and sparse layers mixed; every supported rope.
RECIPES: dict[str, tuple[str, dict[str, object]]] = {
    "llama-gqa-tied": ("Llama", {**heads(6, 2), "tie_word_embeddings": True}),
    "llama-mha-biases": ("Llama", {**heads(3, 3, 10), "attention_bias": True, "mlp_bias": True}),
    "llama-mqa-llama3": ("Llama", {**heads(4, 1, 20), "rope_parameters": LLAMA3_ROPE}),
    "mistral-window": ("Mistral", {**heads(6, 3, 14), "sliding_window": 7}),
    "mistral-full-linear": (
        "Mistral",
        {
            **heads(4, 2),
            "sliding_window": None,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        },
    ),
    "qwen2-window-layers": (
        "Qwen2",
        {
            **heads(6, 2),
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2-full-dynamic": (
        "Qwen2",
        {**heads(4, 4), "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "qwen3-odd": ("Qwen3", {**heads(5, 5, 18), "attention_bias": True}),
    "qwen3-yarn": (
        "Qwen3",
        {
            **heads(6, 2, 12),
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "mixtral": ("Mixtral", {**heads(6, 2), "num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral-window": (
        "Mixtral",
        {**heads(4, 1, 16), "num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 6},
    ),
    "qwen2-moe-mixed": (
        "Qwen2Moe",
        {
            **heads(6, 3),
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 14,
            "shared_expert_intermediate_size": 22,
            "mlp_only_layers": [1],
        },
    ),
    "qwen2-moe-norm-window": (
        "Qwen2Moe",
        {
            **heads(4, 2),
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 16,
            "norm_topk_prob": True,
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": 6,
        },
    ),
    "qwen3-moe-mixed": (
        "Qwen3Moe",
        {
            **heads(6, 2, 10),
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 15,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
        },
    ),
    "qwen3-moe-sparse": (
        "Qwen3Moe",
        {**heads(5, 5, 8), "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 9},
    ),
}

MakeModel = Callable[..., tuple[Path, transformers.PreTrainedModel]]


def build(recipe: str, **overrides: object) -> transformers.PreTrainedModel:
    family, fields = RECIPES[recipe]
    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(**{**BASE, **fields, **overrides})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    if "Moe" in family or family == "Mixtral":
        # Its grouped matrix product wants rows of 16 bytes, which odd expert widths have not.
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            # Wider than transformers' own start, so that a wrong weight anywhere moves the logits.
            parameter.normal_(0.0, 0.3) if parameter.dim() > 1 else parameter.uniform_(-0.5, 1.5)
    return model


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """`make_model(recipe, **overrides) -> (folder, transformers model)`, saved as a folder."""

    def make(recipe: str, *, shard_size: str = "5GB", **overrides: object) -> tuple[Path, transformers.PreTrainedModel]:
        model = build(recipe, **overrides)
        folder = tmp_path / recipe
        model.save_pretrained(folder, max_shard_size=shard_size)
        return folder, model

    return make


@pytest.fixture(params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@dataclass
class PlainAttention:
    """Causal attention of one sequence; K and V of all tokens so far, per layer."""

    cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def attend(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        k_CKD, v_CKD = k_TKD, v_TKD
        position = 0
        if layer in self.cache:
            position = self.cache[layer][0].shape[0]
            k_CKD = torch.cat((self.cache[layer][0], k_TKD))
            v_CKD = torch.cat((self.cache[layer][1], v_TKD))
        self.cache[layer] = (k_CKD, v_CKD)
        return attend(q_THD, k_CKD, v_CKD, position, scale, window)


class Session:
    """One sequence on one model: feed tokens, get the logits of each."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.attention = PlainAttention()
        self.position = 0

    def feed(self, ids: list[int]) -> torch.Tensor:
        rows = torch.arange(len(ids))
        positions = rows + self.position
        self.position += len(ids)
        return self.model.forward(torch.tensor(ids), positions, self.attention, rows)

    def generate(self, prompt: list[int], count: int) -> list[int]:
        logits = self.feed(prompt)
        tokens: list[int] = []
        for _ in range(count):
            tokens.append(int(logits[-1].argmax()))
            logits = self.feed(tokens[-1:])
        return tokens


@pytest.fixture
def session() -> type[Session]:
    return Session


@pytest.fixture
def load() -> Callable[..., Transformer]:
    """`load(path, group=...) -> Transformer` in float32 with plain kernels."""

    def run(path: Path, group: Group | None = None, dtype: torch.dtype = torch.float32) -> Transformer:
        _, model = load_model(
            str(path), dtype=dtype, device=torch.device("cpu"), kernels=PlainKernels(), group=group or SingleRank()
        )
        return model

    return run


@pytest.fixture
def prompt() -> list[int]:
    return [(7 * i * i + 3 * i + 11) % VOCAB for i in range(19)]


@pytest.fixture
def reference_tokens() -> Callable[[transformers.PreTrainedModel, list[int], int], list[int]]:
    """transformers' greedy tokens, end-of-sequence ignored."""

    def run(model: transformers.PreTrainedModel, ids: list[int], count: int) -> list[int]:
        with torch.inference_mode():
            cache = None
            tokens: list[int] = []
            step = torch.tensor([ids])
            for _ in range(count):
                out = model(step, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                tokens.append(int(out.logits[0, -1].argmax()))
                step = torch.tensor([tokens[-1:]])
        return tokens

    return run
