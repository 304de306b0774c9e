"""Greedy answers of transformers, kept as data: `tests/data/references/NAME.json`, one file for each model.

A test asks by lengths. What is kept holds for the model that it was made of: where a new torch or transformers makes
another one of the same recipe, and where a test asks for what is not kept, transformers computes the answer then and
there, and a warning says how to keep it. `scripts/make-references` computes all of it again.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file

from launch.reference import Reference

FOLDER = Path(__file__).parents[1] / "data" / "references"
# With it, what is computed because it is not kept is written to the data.
KEEP_VARIABLE = "ANABRANCH_KEEP_REFERENCES"
# Closer than this, the best two tokens might change places on another machine.
MIN_MARGIN = 2e-3
MAX_DRAWS = 40
# How far sums over a model's weights may be apart: machines draw normal numbers alike up to the last bit or two.
MAX_DRIFT = 1e-3

Prompt = tuple[int, ...]


class Fingerprint(msgspec.Struct, frozen=True, kw_only=True):
    """What answers depend on.

    Attributes:
        config: of the model; a digest, or a version.
        weights: sums over all weights, each weight times a factor of its own.
        prompt: the first prompt of 8 tokens, which shows how prompts are drawn.
    """

    config: str
    weights: tuple[float, ...] = ()
    prompt: Prompt

    def matches(self, other: Fingerprint) -> bool:
        """Whether one's answers are the other's."""
        return (
            (self.config, self.prompt, len(self.weights)) == (other.config, other.prompt, len(other.weights))
        ) and all(abs(mine - its) < MAX_DRIFT for mine, its in zip(self.weights, other.weights, strict=True))


class Case(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A prompt and its answer.

    Attributes:
        length: tokens of the prompt, of which `begin` are the first.
        num_tokens: tokens of the answer.
        draw: how many prompts were drawn before this one, whose answers are not clear.
        margin: the least, over the answer's tokens, of a token's logit minus the second best's.
    """

    length: int
    num_tokens: int
    begin: Prompt = ()
    draw: int = 0
    answer: Prompt
    margin: float

    @property
    def key(self) -> tuple[int, int, Prompt]:
        return self.length, self.num_tokens, self.begin

    def prompt(self, vocab_size: int) -> Prompt:
        return self.begin + draw_prompt(vocab_size, self.length, len(self.begin), self.draw)


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the data.

    Attributes:
        model: what the model is made of, for those who make it again.
    """

    model: dict[str, object]
    fingerprint: Fingerprint
    cases: list[Case]

    @classmethod
    def read(cls, path: Path) -> Kept:
        return msgspec.json.decode(path.read_bytes(), type=cls)

    def write(self, path: Path) -> None:
        """One case a line, in order, so that changes can be read."""
        model, fingerprint, *cases = (
            json.dumps(msgspec.to_builtins(item))
            for item in (self.model, self.fingerprint, *sorted(self.cases, key=lambda case: case.key))
        )
        path.write_text(
            f'{{"model": {model},\n"fingerprint": {fingerprint},\n"cases": [\n' + ",\n".join(cases) + "\n]}\n"
        )


def draw_prompt(vocab_size: int, length: int, num_begun: int = 0, draw: int = 0) -> Prompt:
    """Random tokens: what a prompt of `length` tokens has after the first `num_begun`."""
    rng = random.Random(f"{length}/{draw}")
    return tuple(rng.randrange(vocab_size) for _ in range(length - num_begun))


def fingerprint_of(folder: Path, vocab_size: int) -> Fingerprint:
    """Of a model folder whose weights lie in one file."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("transformers_version")
    weights = [0.0, 0.0, 0.0]
    for _, weight in sorted(load_file(folder / "model.safetensors").items()):
        flat = weight.double().flatten()
        places = torch.arange(len(flat), dtype=torch.float64)
        for index in range(len(weights)):
            weights[index] += float(flat @ torch.cos((index + 1) * places))
    return Fingerprint(
        config=hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16],
        weights=tuple(round(number, 6) for number in weights),
        prompt=draw_prompt(vocab_size, 8),
    )


class KnownAnswers:
    """A model's prompts whose greedy answers in transformers are clear.

    Args:
        name: of the file.
        model: what the file says of the model.
        make_reference: the model in transformers; called where something is to be computed.
    """

    def __init__(
        self,
        name: str,
        fingerprint: Fingerprint,
        vocab_size: int,
        make_reference: Callable[[], Reference],
        model: dict[str, object],
    ) -> None:
        self._path = FOLDER / f"{name}.json"
        self._fingerprint = fingerprint
        self._vocab_size = vocab_size
        self._make_reference = make_reference
        self._model = model
        self._reference: Reference | None = None
        kept = Kept.read(self._path) if self._path.exists() else None
        self._cases: dict[tuple[int, int, Prompt], Case] = {}
        self._stale = kept is not None and not kept.fingerprint.matches(fingerprint)
        if kept is not None and not self._stale:
            self._cases = {case.key: case for case in kept.cases}
        if self._stale:
            warnings.warn(
                f"{name} is another model here than the one whose answers are kept: run scripts/make-references",
                stacklevel=2,
            )

    def clear(self, length: int, num_tokens: int, begin: Prompt = ()) -> tuple[Prompt, Prompt]:
        """A prompt of `length` tokens, the first of them `begin`, and its answer past any end of sequence."""
        case = self._cases.get((length, num_tokens, begin))
        if case is None:
            case = self._cases[length, num_tokens, begin] = self.compute(length, num_tokens, begin)
            if os.environ.get(KEEP_VARIABLE):
                assert not self._stale, f"{self._path.stem} is kept of another model: run scripts/make-references first"
                self.keep(self._cases.values())
            else:
                warnings.warn(
                    f"{self._path.stem}: transformers computes the answer of {num_tokens} tokens to {length}; "
                    f"with {KEEP_VARIABLE}=1 this test keeps it in {self._path.parent.name}",
                    stacklevel=2,
                )
        return case.prompt(self._vocab_size), case.answer

    def compute(self, length: int, num_tokens: int, begin: Prompt = ()) -> Case:
        """By transformers, whatever is kept: the first prompt drawn whose answer is clear."""
        if self._reference is None:
            self._reference = self._make_reference()
        for draw in range(MAX_DRAWS):
            prompt = begin + draw_prompt(self._vocab_size, length, len(begin), draw)
            answer = self._reference.generate(prompt, num_tokens, ignore_eos=True)
            if (margin := min(answer.margins)) > MIN_MARGIN:
                return Case(
                    length=length,
                    num_tokens=num_tokens,
                    begin=begin,
                    draw=draw,
                    answer=answer.token_ids,
                    margin=round(margin, 6),
                )
        raise AssertionError(f"no prompt of {length} tokens has a clear answer of {num_tokens}")

    def keep(self, cases: Iterable[Case]) -> None:
        """Write the file anew."""
        Kept(model=self._model, fingerprint=self._fingerprint, cases=list(cases)).write(self._path)
