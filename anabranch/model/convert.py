"""`python -m anabranch.model.convert FILE.gguf FOLDER`: a GGUF file as a Hugging Face folder, in float32.

Tokenizer, chat template and stop ids come along. Float32 keeps every dequantised value exactly.
"""

from __future__ import annotations

import sys
from pathlib import Path

from anabranch.model.sources import ModelSource
from anabranch.model.stop_ids import stop_ids
from anabranch.model.tokenizer import Tokenizer


def convert(gguf: Path, folder: Path) -> None:
    """Write `folder` with config.json, generation_config.json, model.safetensors and the tokenizer's files."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        trust_remote_code=False,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        local_files_only=True,
    )
    source = ModelSource(name=gguf.name, path=gguf, kind="gguf")
    tokenizer = Tokenizer(source)
    model.generation_config.eos_token_id = list(stop_ids(source.config(), tokenizer.eos_token_ids))
    model.save_pretrained(folder)
    tokenizer.save(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
