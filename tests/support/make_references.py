"""`python -m tests.support.make_references [NAME ...]`: computes what `tests/data/references` keeps, all of it again.

For one more case, run the test that asks for it with ANABRANCH_KEEP_REFERENCES=1 instead.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

from tests.support.known import SMOLLM2, Known, smollm2_answers
from tests.support.references import FOLDER, Kept, KnownAnswers


def model_of(kept: Kept, folder: Path) -> KnownAnswers:
    """The model of a file of the data, made anew in an empty folder."""
    if kept.model.get("known") == SMOLLM2:
        return smollm2_answers()
    recipe, context, overrides = (kept.model[name] for name in ("recipe", "context", "overrides"))
    assert isinstance(recipe, str) and isinstance(context, int) and isinstance(overrides, dict)
    return Known(recipe, folder, context, **overrides)


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")  # what is kept may well be of another model
    for path in sorted(FOLDER.glob("*.json")):
        if names and path.stem not in names:
            continue
        kept = Kept.read(path)
        with tempfile.TemporaryDirectory() as folder:
            model = model_of(kept, Path(folder))
            made = [model.compute(case.length, case.num_tokens, case.begin) for case in kept.cases]
            model.keep(made)
        changed = sum(old.answer != new.answer for old, new in zip(kept.cases, made, strict=True))
        print(f"{path.stem}: {len(made)} answers, {changed} changed", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
