"""The served model from a checkpoint on this machine."""

from __future__ import annotations

from anabranch.model.identity import read_identity
from anabranch.model.shared_layers import ffn_layers
from anabranch.model.sources import resolve_model
from anabranch.model.stop_ids import stop_ids
from anabranch.model.tokenizer import Tokenizer
from anabranch.request.sampling_params import SamplingParams
from anabranch.sampling.detokenizer import IncrementalDetokenizer, StopStringMatcher


class CheckpointModel:
    """A `ServedModel` by known name, Hugging Face folder or GGUF file.

    Reads configuration and tokenizer, and of weights, where there are any, enough to tell them from others.

    Raises:
        ModelError: unknown, unsupported or broken.
    """

    def __init__(self, name: str) -> None:
        source = resolve_model(name)
        config = source.config()
        self._config = config
        self.tokenizer = Tokenizer(source)
        self.name = name
        self.identity = read_identity(source, config)
        self.vocab_size = config.vocab_size
        self.max_context = config.max_context
        self.eos_token_ids = stop_ids(config, self.tokenizer.eos_token_ids)
        self.has_chat_template = self.tokenizer.has_chat_template
        self.longest_token_chars = self.tokenizer.longest_token_chars

    def expert_bytes(self, dtype: str, *, shared: bool) -> tuple[tuple[int, int], ...]:
        """See `ServedModel.expert_bytes`."""
        return ffn_layers(self._config, dtype, shared=shared)

    def text_stream(self, sampling: SamplingParams) -> CheckpointText:
        return CheckpointText(self.tokenizer, sampling)


class CheckpointText:
    """A `TextStream` through the model's tokenizer."""

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer.decode)
        self._matcher = StopStringMatcher(sampling.stop)

    def push(self, token_id: int) -> tuple[str, bool]:
        """The text that became certain, and whether a stop string is complete."""
        return self._matcher.push(self._detokenizer.push(token_id))

    def finish(self) -> str:
        """The text held back; a stop string completed only now still hides itself."""
        text, _ = self._matcher.push(self._detokenizer.flush())
        return text + self._matcher.flush()
