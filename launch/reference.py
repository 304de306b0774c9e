"""What every topology is compared with: transformers, greedy, one prompt at a time, token ids in and out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import transformers

from anabranch.config.options import DtypeName
from anabranch.engine.device import resolve_dtype
from anabranch.model.sources import ModelSource
from anabranch.model.stop_ids import stop_ids
from anabranch.model.tokenizer import Tokenizer

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, kw_only=True)
class ReferenceAnswer:
    """A greedy answer.

    Attributes:
        token_ids: the end-of-sequence token, where it ended the answer, included.
        margins: for each token, its logit minus the second best's: how clear the choice was.
    """

    token_ids: tuple[int, ...]
    margins: tuple[float, ...]
    finish_reason: Literal["stop", "length"]


class Reference:
    """A model in transformers.

    Args:
        source: a Hugging Face folder or a GGUF file.
        dtype: of weights and arithmetic; auto: as a worker on this machine's CPU would choose.
    """

    def __init__(self, source: ModelSource, dtype: DtypeName = "float32") -> None:
        transformers.utils.logging.disable_progress_bar()
        where: dict[str, str | bool] = {"local_files_only": True, "trust_remote_code": False}
        how: dict[str, object] = {"dtype": resolve_dtype(dtype, torch.device("cpu"))}
        if source.kind == "gguf":
            where |= {"gguf_file": source.path.name}
            how |= {"quantization_config": transformers.GgufConfig(dequantize=True)}
        folder = source.path.parent if source.kind == "gguf" else source.path
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, **where, **how)
        # The grouped matrix product that transformers would choose refuses experts of uneven width.
        self.model.set_experts_implementation("eager")
        self.model.eval()
        has_tokenizer = source.kind == "gguf" or any((folder / name).exists() for name in _TOKENIZER_FILES)
        # transformers' own reader of GGUF tokenizers replaces, in silence, pre-tokenizers that it does not know.
        self.tokenizer = Tokenizer(source) if has_tokenizer else None
        config = source.config()
        self.max_context = config.max_context
        self.eos_token_ids = frozenset(
            stop_ids(config, self.tokenizer.eos_token_ids if self.tokenizer is not None else ())
        )

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.vocab_size)

    @torch.inference_mode()
    def generate(self, token_ids: tuple[int, ...], max_tokens: int, *, ignore_eos: bool = False) -> ReferenceAnswer:
        """The greedy answer to a prompt, computed with a KV cache."""
        chosen: list[int] = []
        margins: list[float] = []
        cache = None
        inputs = torch.tensor([token_ids], dtype=torch.int64)
        while len(chosen) < max_tokens:
            step = self.model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = step.past_key_values
            best = torch.topk(step.logits[0, -1].float(), 2)
            token = int(best.indices[0])
            chosen.append(token)
            margins.append(float(best.values[0] - best.values[1]))
            if token in self.eos_token_ids and not ignore_eos:
                return ReferenceAnswer(token_ids=tuple(chosen), margins=tuple(margins), finish_reason="stop")
            inputs = torch.tensor([[token]], dtype=torch.int64)
        return ReferenceAnswer(token_ids=tuple(chosen), margins=tuple(margins), finish_reason="length")

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a plain text. Raises LookupError where the folder has no tokenizer."""
        if self.tokenizer is None:
            raise LookupError("the model folder has no tokenizer; give prompts as token ids")
        return tuple(self.tokenizer.encode(text))

    def decode(self, token_ids: tuple[int, ...]) -> str:
        """Text of token ids; the ids themselves where the folder has no tokenizer."""
        if self.tokenizer is None:
            return " ".join(map(str, token_ids))
        return self.tokenizer.decode(token_ids, skip_special_tokens=False)
