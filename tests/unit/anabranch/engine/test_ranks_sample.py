"""Every rank of a mesh ends a step with the same tokens, and they are those that one rank alone would choose."""

from __future__ import annotations

import pytest
import torch

from anabranch.engine.sampling import RankSampler
from anabranch.kernels.plain import PlainKernels
from anabranch.model.embedding import LmHead
from anabranch.parallel.context import RankContext
from anabranch.parallel.mesh import Mesh
from anabranch.parallel.split import padded_share
from anabranch.parallel.threads import run_ranks
from anabranch.request.sampling_params import SamplingParams
from anabranch.request.token import TokenLogprob
from anabranch.sampling.sampler import Sampler
from anabranch.step.plan import SampleSpec

pytestmark = pytest.mark.unit

VOCAB = 23
CPU = torch.device("cpu")


def spec(index: int = 0, output: tuple[int, ...] = (), **sampling: object) -> SampleSpec:
    return SampleSpec(params=SamplingParams(**sampling), index=index, output_ids=output)  # type: ignore[arg-type]


GREEDY = [spec(), spec(3)]
MIXED = [
    spec(),
    spec(temperature=1.0, seed=5),
    spec(logit_bias={22: 50.0}),
    spec(logprobs=3),
    spec(),
    spec(2, (4, 4, 7), presence_penalty=2.0, logprobs=0),
    spec(9, temperature=0.7, top_p=0.8, top_k=9, seed=6, logprobs=2),
]
OTHERS = [spec(temperature=1.0, seed=7), spec(1, logprobs=1)]


@pytest.mark.parametrize("specs", [GREEDY, MIXED, OTHERS, []], ids=["greedy", "mixed", "others", "none"])
@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (2, 1), (3, 1), (1, 2), (1, 3), (2, 2)])
def test_all_ranks_end_with_one_ranks_tokens(tp: int, cp: int, specs: list[SampleSpec]) -> None:
    logits = 3.0 * torch.randn((len(specs), VOCAB), generator=torch.Generator().manual_seed(1))
    expected = Sampler().sample(logits, specs)
    mesh = Mesh(tp=tp, cp=cp)

    def rank(world) -> tuple[list[int], list[TokenLogprob | None]]:  # type: ignore[no-untyped-def]
        context = RankContext(
            mesh=mesh,
            rank=world.rank,
            tp=world.split(mesh.cp_rank(world.rank)),
            cp=world.split(mesh.tp_rank(world.rank)) if cp > 1 else None,
        )
        share, held = padded_share(VOCAB, tp, context.tp_rank)
        sampler = RankSampler(LmHead(torch.zeros(share, 4), PlainKernels(), context.tp, VOCAB), context, CPU)
        mine = torch.zeros(len(specs), share)
        # What other CP ranks would have worked out does not matter: they are told.
        mine[:, : len(held)] = logits[:, held.start : held.stop] if context.cp_rank == 0 else -1.0
        tokens, logprobs = sampler.sample(mine, specs)
        return tokens.tolist(), logprobs.read()

    results = run_ranks(mesh.world_size, rank)
    assert [tokens for tokens, _ in results] == [[token for token, _ in expected]] * mesh.world_size
    driver = results[0][1]
    assert driver == [logprob for _, logprob in expected]
