"""Answers that are kept are those that transformers gives here: a part of them is computed again."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from tests.support.families import VOCAB
from tests.support.known import SMOLLM2, Known
from tests.support.make_references import model_of
from tests.support.references import FOLDER, MIN_MARGIN, Fingerprint, Kept, KnownAnswers, fingerprint_of

pytestmark = pytest.mark.e2e

NUM_AGAIN = 3


@pytest.mark.parametrize("name", ["qwen3-yarn-640", "qwen2-moe-mixed-448", SMOLLM2])
def test_a_part_is_computed_again(name: str, tmp_path: Path) -> None:
    kept = Kept.read(FOLDER / f"{name}.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = model_of(kept, tmp_path)
    for case in sorted(kept.cases, key=lambda case: case.length + case.num_tokens)[:NUM_AGAIN]:
        again = model.compute(*case.key)
        assert (again.draw, again.answer) == (case.draw, case.answer)
        assert again.margin == pytest.approx(case.margin, abs=MIN_MARGIN / 10)


def test_all_that_is_kept_is_clear() -> None:
    files = sorted(FOLDER.glob("*.json"))
    assert len(files) > 20
    for path in files:
        kept = Kept.read(path)
        assert len({case.key for case in kept.cases}) == len(kept.cases)
        for case in kept.cases:
            assert case.margin > MIN_MARGIN
            assert len(case.answer) == case.num_tokens


@pytest.mark.parametrize("change", ["another context", "other weights", "another way to draw prompts"])
def test_answers_of_another_model_are_not_taken(change: str, tmp_path: Path) -> None:
    kept = Kept.read(FOLDER / "llama-gqa-tied-640.json")
    folder = Known("llama-gqa-tied", tmp_path, 640).folder
    fingerprint = fingerprint_of(folder, VOCAB)
    assert fingerprint.matches(kept.fingerprint)
    other = {
        "another context": Fingerprint(config="x", weights=fingerprint.weights, prompt=fingerprint.prompt),
        "other weights": Fingerprint(
            config=fingerprint.config,
            weights=(*fingerprint.weights[:-1], fingerprint.weights[-1] + 0.01),
            prompt=fingerprint.prompt,
        ),
        "another way to draw prompts": Fingerprint(
            config=fingerprint.config, weights=fingerprint.weights, prompt=fingerprint.prompt[::-1]
        ),
    }[change]

    class Asked(Exception):
        pass

    def make_reference() -> None:
        raise Asked

    with pytest.warns(UserWarning, match="llama-gqa-tied-640 is another model here.*run scripts/make-references"):
        answers = KnownAnswers("llama-gqa-tied-640", other, VOCAB, make_reference, {})  # type: ignore[arg-type]
    with pytest.raises(Asked):
        answers.clear(17, 9)
