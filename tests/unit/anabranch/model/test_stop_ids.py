"""One list of what ends an answer, from configuration, generation configuration, tokenizer and chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import transformers

from anabranch.errors import CheckpointError
from anabranch.model.sources import resolve_model
from anabranch.model.stop_ids import stop_ids
from anabranch.model.tokenizer import Tokenizer
from launch.reference import Reference
from orchestrator.resolved_model import CheckpointModel
from tests.support.families import VOCAB, save_tokenizer

pytestmark = pytest.mark.unit

IM_END, END = VOCAB - 1, VOCAB - 2


def save_chat_tokenizer(folder: Path, template: str, eos: str | None = None) -> None:
    """A tokenizer whose last tokens are `<|end|>` and `<|im_end|>`."""
    words = {f"w{number}": number for number in range(VOCAB - 2)} | {"<|end|>": END, "<|im_end|>": IM_END}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|end|>", "<|im_end|>"])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, chat_template=template)
    made.save_pretrained(folder)


def configure(folder: Path, config: object, generation: object = "none") -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": config}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation != "none":
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (None, "none", (2,)),
        (None, None, (2,)),
        (7, "none", (7, 2)),
        (7, None, (7, 2)),
        (7, [9, 8], (9, 8, 2)),
        ([2, 3], "none", (2, 3)),
        (-1, "none", (2,)),
        (VOCAB, "none", (2,)),
    ],
)
def test_the_tokenizers_end_counts_beside_the_configurations(make_model, config, generation, expected) -> None:
    folder, _ = make_model("llama-gqa-tied")
    save_tokenizer(folder)
    configure(folder, config, generation)
    source = resolve_model(str(folder))
    assert stop_ids(source.config(), Tokenizer(source).eos_token_ids) == expected
    assert CheckpointModel(str(folder)).eos_token_ids == expected
    assert Reference(source).eos_token_ids == frozenset(expected)


@pytest.mark.parametrize(
    ("template", "eos", "expected"),
    [
        ("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}", None, (2, IM_END)),
        ("{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}", "<|im_end|>", (2, IM_END, END)),
        # A vocabulary may have tokens that this model's turns do not end with.
        ("{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}", "w3", (2, 3)),
        ("{% for m in messages %}{{ m['content'] }}<|eot_id|>{% endfor %}", None, (2,)),
    ],
)
def test_what_the_chat_template_ends_turns_with_ends_an_answer(make_model, template, eos, expected) -> None:
    folder, _ = make_model("llama-gqa-tied")
    save_chat_tokenizer(folder, template, eos)
    source = resolve_model(str(folder))
    assert stop_ids(source.config(), Tokenizer(source).eos_token_ids) == expected


def test_without_a_tokenizer_the_configuration_has_the_word(make_model) -> None:
    folder, _ = make_model("llama-gqa-tied")
    configure(folder, [5, 6])
    assert stop_ids(resolve_model(str(folder)).config(), ()) == (5, 6)
    assert Reference(resolve_model(str(folder))).eos_token_ids == frozenset((5, 6))


def test_more_stop_tokens_than_a_request_carries_are_named(make_model) -> None:
    folder, _ = make_model("llama-gqa-tied")
    config = resolve_model(str(folder)).config()
    with pytest.raises(CheckpointError, match="70 tokens end an answer of this model; at most 64 may"):
        stop_ids(config, tuple(range(3, 72)))
