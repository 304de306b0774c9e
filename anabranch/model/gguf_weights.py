"""A GGUF file as a weight source: Hugging Face names and order, dequantised slice by slice."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, overload

import torch

from anabranch.errors import CheckpointError
from anabranch.model.config_bounds import MAX_ROPE_VALUES, whole_number
from anabranch.model.gguf_header import check_gguf_header
from anabranch.model.weights import Slices

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    from gguf import ReaderTensor

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
# What an architecture means otherwise by a name.
_OWN_BLOCK = {("phi3", "ffn_up"): "mlp.gate_up_proj"}
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_BLOCK_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
ROPE_FACTORS = "rope_freqs.weight"
SHORT_FACTORS = "rope_factors_short.weight"
LONG_FACTORS = "rope_factors_long.weight"


@dataclass(frozen=True)
class _Entry:
    """Where a Hugging Face tensor lies: a GGUF tensor, or one expert's part of it.

    Attributes:
        heads: heads whose rows llama.cpp interleaved for its rotary convention; 0: not interleaved.
    """

    tensor: ReaderTensor
    shape: tuple[int, ...]
    expert: int | None = None
    heads: int = 0


class GgufFile:
    """Reads through a memory map; only the rows asked for are dequantised.

    Raises:
        CheckpointError: not a GGUF file, cut short, or with a tensor that no supported family has.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.path = path
        check_gguf_header(path)
        try:
            self._reader = GGUFReader(path)
        except (OSError, ValueError, KeyError, IndexError, OverflowError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a whole GGUF file: {error}; fetch it again") from error
        self._entries: dict[str, _Entry] = {}
        for tensor in self._reader.tensors:
            self._add(tensor)

    def _add(self, tensor: ReaderTensor) -> None:
        name = str(tensor.name)
        # GGUF counts axes from the innermost.
        shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))
        if name in (ROPE_FACTORS, SHORT_FACTORS, LONG_FACTORS):
            return
        if name in _TOP:
            self._entries[_TOP[name]] = _Entry(tensor, shape)
            return
        match = _BLOCK_NAME.fullmatch(name)
        layer, part, kind = match.groups() if match else ("", "", "")
        prefix = f"model.layers.{layer}"
        if part in _EXPERTS and len(shape) == 3:
            for expert in range(shape[0]):
                hf_name = f"{prefix}.mlp.experts.{expert}.{_EXPERTS[part]}.{kind}"
                self._entries[hf_name] = _Entry(tensor, shape[1:], expert=expert)
        elif part in _BLOCK:
            if part == "ffn_gate_inp_shexp" and len(shape) == 1:
                shape = (1, *shape)
            hf_part = _OWN_BLOCK.get((self.text("general.architecture"), part), _BLOCK[part])
            self._entries[f"{prefix}.{hf_part}.{kind}"] = _Entry(tensor, shape, heads=self._turned_heads(part))
        else:
            raise CheckpointError(f"{self.path}: tensor {name} belongs to no supported family")

    def _turned_heads(self, part: str) -> int:
        if part not in ("attn_q", "attn_k") or self.text("general.architecture") != "llama":
            return 0
        key = "llama.attention.head_count"
        if part == "attn_k" and self.number(f"{key}_kv"):
            key = f"{key}_kv"
        return whole_number(str(self.path), key, self.number(key), "num_attention_heads") if self.number(key) else 0

    def text(self, key: str) -> str:
        """A text field of the metadata; empty where there is none."""
        value = self._content(key)
        return value if isinstance(value, str) else ""

    @overload
    def number(self, key: str) -> float: ...
    @overload
    def number(self, key: str, default: None) -> float | None: ...
    def number(self, key: str, default: float | None = 0) -> float | None:
        """A number in the metadata, an int or a float as the file has it; `default` where there is none."""
        value = self._content(key)
        return value if isinstance(value, int | float) else default

    def flag(self, key: str, default: bool) -> bool:
        """A yes or no in the metadata; `default` where there is none."""
        value = self._content(key)
        return value if isinstance(value, bool) else default

    def texts(self, key: str) -> list[str]:
        """A list of texts in the metadata; empty where there is none."""
        value = self._content(key)
        return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else []

    def numbers(self, key: str) -> list[float]:
        """A list of numbers in the metadata, as `number` gives them; empty where there is none."""
        value = self._content(key)
        return value if isinstance(value, list) and all(isinstance(item, int | float) for item in value) else []

    def _content(self, key: str) -> object:
        field = self._reader.get_field(key)
        try:
            return field.contents() if field is not None else None
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {key} is not UTF-8: {error}") from error

    def rope_factors(self, name: str) -> list[float] | None:
        """Divisors of the rotary frequencies, one for each pair of features, where the file carries a tensor `name`."""
        for tensor in self._reader.tensors:
            if tensor.name == name:
                if tensor.data.ndim != 1 or len(tensor.data) > MAX_ROPE_VALUES:
                    raise CheckpointError(
                        f"{self.path}: {name} has shape {list(tensor.data.shape)}; "
                        f"it must be a list of at most {MAX_ROPE_VALUES} values"
                    )
                return [float(value) for value in tensor.data]
        return None

    def names(self) -> Collection[str]:
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def where(self, name: str) -> str:
        return str(self.path)

    def read(self, name: str, slices: Slices = ()) -> torch.Tensor:
        """Float32; see `WeightSource.read`."""
        from gguf import dequantize

        entry = self._entry(name)
        data: np.ndarray = entry.tensor.data if entry.expert is None else entry.tensor.data[entry.expert]
        if len(entry.shape) == 2 and data.ndim == 1:
            data = data.reshape(1, -1)
        rows, columns = (*slices, slice(None), slice(None))[:2]
        wanted = data[_interleaved_rows(entry.shape[0], entry.heads)[rows].numpy()] if entry.heads else data[rows]
        num_rows = len(wanted)
        # `dequantize` takes no empty array; one row shows whether it knows the quantisation.
        data = wanted if num_rows else data[:1]
        try:
            values = dequantize(data, entry.tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            kind = entry.tensor.tensor_type.name
            raise CheckpointError(f"{self.path}: {name}: quantisation {kind} cannot be read: {error}") from error
        # A memory map of a read-only file: torch wants writable memory, and the caller copies anyway.
        tensor = torch.from_numpy(values if values.flags.writeable else values.copy())
        tensor = tensor[:num_rows]
        return tensor if len(entry.shape) == 1 else tensor[:, columns]

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise CheckpointError(f"{self.path}: tensor {name} is missing")
        return self._entries[name]

    def close(self) -> None:
        self._entries.clear()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _interleaved_rows(num_rows: int, heads: int) -> torch.Tensor:
    """For each row in Hugging Face's order (halves apart), where llama.cpp put it (pairs side by side)."""
    return torch.arange(num_rows).view(heads, num_rows // heads // 2, 2).transpose(1, 2).reshape(-1)
