"""Plans of decode steps, as a worker's scheduler makes them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from anabranch.request.sampling_params import SamplingParams
from anabranch.step.plan import SampleSpec, SequencePlan, StepPlan
from tests.support.families import VOCAB

BLOCK_SIZE, NUM_BLOCKS = 4, 96


@dataclass
class Steps:
    """Decode steps of requests that come, grow, take new blocks and go."""

    seed: int = 0
    lane: int = 0
    blocks: range = range(NUM_BLOCKS)

    def __iter__(self) -> Iterator[StepPlan]:
        rng = random.Random(self.seed)
        free = list(self.blocks)
        rng.shuffle(free)
        lens: dict[int, int] = {}
        tables: dict[int, list[int]] = {}
        came = 0
        for step, count in enumerate([1, 2, 4, 4, 3, 3, 4, 1, 1, 4, 2, 4, 4, 4, 3]):
            while len(lens) > count:
                gone = rng.choice(list(lens))
                del lens[gone]
                free.extend(tables.pop(gone))
            while len(lens) < count:
                lens[came], tables[came] = rng.choice([0, 3, 7, 8, 21, 60]), []
                came += 1
            order = rng.sample(list(lens), count)
            for key in order:
                while len(tables[key]) * BLOCK_SIZE < lens[key] + 1:
                    tables[key].append(free.pop(0))
            yield StepPlan(
                step=step,
                lane=self.lane,
                sequences=tuple(
                    SequencePlan(
                        request_id=str(key),
                        epoch=0,
                        token_ids=(rng.randrange(VOCAB),),
                        start=lens[key],
                        block_ids=tuple(tables[key]),
                        sample=SampleSpec(params=SamplingParams(), index=step),
                    )
                    for key in order
                ),
            )
            for key in order:
                lens[key] += 1
