"""Requests that are left at every stage, under names that come again and again; what they said must be right."""

from __future__ import annotations

import asyncio
import random

from anabranch_client import AsyncClient, ClientError, Finished, Sampling, Tokens
from benchmarks.attack.probe import NUM_TOKENS, Probe
from benchmarks.attack.tally import Tally

NUM_AT_ONCE = 8
TIMEOUT_S = 60.0
# How many events are taken before the client leaves; None: it stays to the end.
STAGES: dict[str, int | None] = {
    "at once": 0,
    "accepted": 1,
    "first token": 2,
    "third token": 4,
    "tenth token": 11,
    "whole": None,
}


async def attack(endpoint: str, seed: int, num_requests: int, probe: Probe, tally: Tally) -> None:
    """Ask and leave so many times; counted as `cancels`."""
    rng = random.Random(f"{seed}/cancels")
    left = num_requests

    async def ask_on(client: AsyncClient) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            stage, prompt = rng.choice(tuple(STAGES)), rng.choice(probe.prompts)
            # Some run out of time instead, at a stage that the machine's speed decides.
            timeout_s = rng.choice((0.001, 0.005, 0.02)) if rng.random() < 0.2 else TIMEOUT_S
            request_id = f"again-{rng.randrange(4)}"
            try:
                tokens = await _ask(client, prompt, request_id, STAGES[stage], timeout_s)
                probe.judge(prompt, tokens)
                tally.count("cancels", stage)
            except ClientError as error:
                tally.count("cancels", f"error.{error.code}")

    async with AsyncClient(endpoint) as client:
        await asyncio.gather(*(ask_on(client) for _ in range(NUM_AT_ONCE)))


async def _ask(
    client: AsyncClient, prompt: tuple[int, ...], request_id: str, num_events: int | None, timeout_s: float
) -> tuple[int, ...]:
    """The tokens that came before the client left."""
    tokens: list[int] = []
    sampling = Sampling(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    async with client.generate(prompt, sampling, request_id=request_id, timeout_s=timeout_s) as stream:
        taken = 0
        while taken != num_events:
            event = await anext(stream)
            taken += 1
            if isinstance(event, Tokens):
                assert event.first_index == len(tokens)
                tokens.extend(event.token_ids)
            elif isinstance(event, Finished):
                break
    return tuple(tokens)
