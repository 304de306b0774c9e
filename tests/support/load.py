"""Requests in flight, for tests that hurt the cluster meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from anabranch_client import Client, ClientError, Finished, Sampling, Tokens

Prompt = tuple[int, ...]


class Load:
    """Requests in flight, each read by a thread that checks its tokens' indexes.

    Args:
        kinds: more of what they ask for, in turn.
    """

    def __init__(
        self,
        client: Client,
        prompts: Sequence[Prompt],
        max_tokens: int,
        kinds: Sequence[Mapping[str, object]] = ({},),
    ) -> None:
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.texts = [""] * len(prompts)
        self.logprobs: list[list[float]] = [[] for _ in prompts]
        # Of those that ended well: how often workers failed them.
        self.recoveries: list[int] = []
        self._client = client
        self._kinds = kinds
        self._max_tokens = max_tokens
        self._pool = ThreadPoolExecutor(len(prompts))
        self.ends: list[Future[str]] = [
            self._pool.submit(self._follow, number, prompt) for number, prompt in enumerate(prompts)
        ]

    def results(self) -> list[str]:
        """How each ended: its route, or an error's code and message."""
        found = [end.result(180) for end in self.ends]
        self._pool.shutdown()
        return found

    def failed(self) -> list[str]:
        return [end.result() for end in self.ends if end.done() and ": " in end.result()]

    def _follow(self, number: int, prompt: Prompt) -> str:
        seen = self.tokens[number]
        kind = self._kinds[number % len(self._kinds)]
        sampling = Sampling(max_tokens=self._max_tokens, ignore_eos=True, **kind)  # type: ignore[arg-type]
        try:
            for event in self._client.generate(prompt, sampling):
                if isinstance(event, Tokens):
                    assert event.first_index == len(seen)
                    seen.extend(event.token_ids)
                    self.texts[number] += event.text
                    self.logprobs[number] += [item.logprob for item in event.logprobs]
                elif isinstance(event, Finished):
                    assert len(seen) == self._max_tokens
                    self.recoveries.append(event.num_recoveries)
                    return "+".join(event.route)
        except ClientError as error:
            return f"{error.code}: {error}"
        raise AssertionError("the stream ended without an end")
