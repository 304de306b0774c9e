"""A dense model that was made a mixture answers as it did, in transformers and here."""

from __future__ import annotations

import pytest
import torch
import transformers

from anabranch.model.sources import resolve_model
from anabranch.model.weights import SafetensorsFolder
from tests.support.mixture import write_mixture

pytestmark = pytest.mark.unit


def test_a_mixture_answers_as_the_dense_model_does(
    make_model, load, session, prompt, reference_tokens, tmp_path
) -> None:
    dense, model = make_model("llama-gqa-tied")
    folder = write_mixture(dense, tmp_path / "mixture")
    moe = resolve_model(str(folder)).config().moe
    assert moe is not None
    assert (moe.num_experts, moe.top_k, moe.expert_intermediate, set(moe.sparse_layers)) == (8, 8, 5, {True})
    expected = reference_tokens(model, prompt, 20)
    mixture = transformers.MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    mixture.set_experts_implementation("eager")
    assert reference_tokens(mixture, prompt, 20) == expected
    assert session(load(folder)).generate(prompt, 20) == expected
    logits = session(load(folder)).feed(prompt)
    torch.testing.assert_close(logits, session(load(dense)).feed(prompt), rtol=1e-4, atol=1e-4)


def test_nothing_is_rounded(make_model, tmp_path) -> None:
    dense, _ = make_model("llama-gqa-tied", shard_size="20KB")
    with SafetensorsFolder(dense) as old, SafetensorsFolder(write_mixture(dense, tmp_path / "mixture")) as new:
        down = [new.read(f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight").clone() for e in range(8)]
        assert torch.equal(torch.cat(down, dim=1) / 8, old.read("model.layers.1.mlp.down_proj.weight"))
        up = [new.read(f"model.layers.1.block_sparse_moe.experts.{e}.w3.weight").clone() for e in range(8)]
        assert torch.equal(torch.cat(up), old.read("model.layers.1.mlp.up_proj.weight"))
        assert not new.read("model.layers.1.block_sparse_moe.gate.weight").any()


@pytest.mark.parametrize(("recipe", "num_experts"), [("llama-mha-biases", 8), ("mixtral", 8), ("llama-gqa-tied", 16)])
def test_what_cannot_be_a_mixture_is_refused(recipe: str, num_experts: int, make_model, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"Mixtral|must be a power of two that divides 40"):
        write_mixture(make_model(recipe)[0], tmp_path / "mixture", num_experts)
