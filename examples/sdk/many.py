"""Many answers at a time with the asyncio client: the workers batch them."""

from __future__ import annotations

import asyncio
import os

from anabranch_client import AsyncClient, Completion, Overloaded, Sampling

ENDPOINT = os.environ.get("ANABRANCH_ENDPOINT", "127.0.0.1:50051")
RETRY_S = 0.5


async def ask(client: AsyncClient, prompt: str) -> Completion:
    """One answer; a full queue refuses at once, so try again after a while."""
    while True:
        try:
            return await client.complete(prompt, Sampling(max_tokens=8, temperature=0.8, seed=1))
        except Overloaded:
            await asyncio.sleep(RETRY_S)


async def main() -> None:
    prompts = [f"A story about {subject} begins" for subject in ("a river", "a stone", "rain", "an island")]
    async with AsyncClient(ENDPOINT) as client:
        answers = await asyncio.gather(*(ask(client, prompt) for prompt in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        print(f"{prompt}: {answer.text!r}")


if __name__ == "__main__":
    asyncio.run(main())
