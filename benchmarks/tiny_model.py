"""A tiny random model as a folder that can be served: for benchmarks that are not about the model."""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch
import transformers

VOCAB, CONTEXT = 101, 192
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"


def save_tiny_model(folder: Path, seed: int = 7) -> Path:
    """Write a Llama of 3 layers and a tokenizer whose words are `w0`, `w1`, ...; returns the folder.

    Its layers weigh much beside the embedding, so that greedy answers vary with the context.
    """
    torch.manual_seed(seed)
    return _save(transformers.LlamaForCausalLM(transformers.LlamaConfig(tie_word_embeddings=True, **_SHAPE)), folder)


def save_tiny_mixture(folder: Path, seed: int = 7) -> Path:
    """The same of a Mixtral, 2 of whose 6 experts compute each token."""
    torch.manual_seed(seed)
    config = transformers.MixtralConfig(num_local_experts=6, num_experts_per_tok=2, **_SHAPE)
    return _save(transformers.MixtralForCausalLM(config), folder)


def _save(model: transformers.PreTrainedModel, folder: Path) -> Path:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(-0.5, 1.5)
            else:
                parameter.normal_(0.0, 0.05 if "embed_tokens" in name else 0.6)
    model.save_pretrained(folder)
    words = {f"w{number}": number for number in range(VOCAB)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="w2", chat_template=CHAT_TEMPLATE
    ).save_pretrained(folder)
    return folder
