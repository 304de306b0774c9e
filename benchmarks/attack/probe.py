"""Whether right answers still come: fixed prompts, asked all the time, whose greedy tokens must never change."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

from anabranch_client import AsyncClient, ClientError, Sampling
from benchmarks.attack.tally import Tally
from benchmarks.tiny_model import VOCAB

NUM_PROMPTS = 6
NUM_TOKENS = 16
TIMEOUT_S = 60.0
PAUSE_S = 0.05


class Probe:
    """Asks, and compares with the first answers.

    Attributes:
        num_right, num_wrong: answers so far.
        phase: what the errors of the probe are counted under.
    """

    def __init__(self, client: AsyncClient, tally: Tally, seed: int) -> None:
        rng = random.Random(f"{seed}/probe")
        self.prompts = [tuple(rng.randrange(3, VOCAB) for _ in range(rng.randint(3, 90))) for _ in range(NUM_PROMPTS)]
        self._client = client
        self._tally = tally
        self._answers: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._next = 0
        self.num_right = 0
        self.num_wrong = 0
        self.phase = "probe"

    async def learn(self) -> None:
        """Take the answers before any attack, twice, for they must repeat. Raises ClientError."""
        for _ in range(2):
            for prompt in self.prompts:
                self._judge(prompt, await self._ask(prompt))

    async def ask(self) -> bool:
        """Ask the next prompt; whether it was answered."""
        prompt = self.prompts[self._next % NUM_PROMPTS]
        self._next += 1
        try:
            self._judge(prompt, await self._ask(prompt))
            return True
        except ClientError as error:
            self._tally.count(self.phase, f"probe.{error.code}")
            return False

    async def ask_all(self) -> None:
        """Each prompt once."""
        for _ in range(NUM_PROMPTS):
            await self.ask()

    async def ask_at_once(self, times: int) -> None:
        """So many, side by side."""
        await asyncio.gather(*(self.ask() for _ in range(times)))

    def judge(self, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> None:
        """Compare an answer to one of the prompts, or its beginning, that somebody else has got."""
        whole = self._answers[prompt]
        self.num_right += tokens == whole[: len(tokens)]
        self.num_wrong += tokens != whole[: len(tokens)]

    @contextlib.asynccontextmanager
    async def asking(self, phase: str) -> AsyncIterator[None]:
        """Ask one after the other meanwhile."""
        self.phase = phase
        stop = asyncio.Event()

        async def ask_on() -> None:
            while not stop.is_set():
                await self.ask()
                await asyncio.sleep(PAUSE_S)

        task = asyncio.create_task(ask_on())
        try:
            yield
        finally:
            stop.set()
            await task

    async def _ask(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        sampling = Sampling(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
        return (await self._client.complete(prompt, sampling, timeout_s=TIMEOUT_S)).token_ids

    def _judge(self, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> None:
        known = self._answers.setdefault(prompt, tokens)
        self.num_right += tokens == known
        self.num_wrong += tokens != known
