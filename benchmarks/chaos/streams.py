"""Streams of four kinds that go on and on; each answer is compared with the undisturbed one, index by index."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field

from anabranch_client import Client, ClientError, Finished, Sampling, TokenLogprob, Tokens

# Of log-probabilities, between a prompt's pass and a step.
LOGPROB_TOLERANCE = 1e-2


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one answer was."""

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]

    def same_as(self, other: Answer) -> bool:
        return (self.token_ids, self.text, len(self.logprobs)) == (
            other.token_ids,
            other.text,
            len(other.logprobs),
        ) and all(
            abs(ours - theirs) < LOGPROB_TOLERANCE for ours, theirs in zip(self.logprobs, other.logprobs, strict=True)
        )


@dataclass
class Tally:
    """What the streams have seen; guarded by `lock`."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    num_right: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    num_recoveries: int = 0
    # Longest wait between two events, of each answer that a worker failed.
    stalls_s: list[float] = field(default_factory=list)
    # Of these, from a failure's notice to the next token.
    recoveries_s: list[float] = field(default_factory=list)


class Streams:
    """Asks the same few questions again and again, from one thread each.

    Args:
        vocab_size: prompts are made of ids below it.
        max_tokens: of each answer.
    """

    def __init__(self, client: Client, num_streams: int, *, vocab_size: int, max_tokens: int, seed: int) -> None:
        dice = random.Random(seed)
        self._client = client
        self._max_tokens = max_tokens
        self._prompts = [
            tuple(dice.randrange(3, vocab_size) for _ in range(dice.randrange(8, 40))) for _ in range(num_streams)
        ]
        self._samplings: list[Sampling] = []
        self._expected: list[Answer] = []
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self.tally = Tally()

    def learn(self) -> None:
        """Get each answer undisturbed. Raises ClientError."""
        for number, prompt in enumerate(self._prompts):
            sampling = self._sampling(number, prompt)
            answer, _, _ = self._ask(prompt, sampling)
            self._samplings.append(sampling)
            self._expected.append(answer)

    def start(self) -> None:
        for number in range(len(self._prompts)):
            thread = threading.Thread(target=self._run, args=(number,), name=f"stream {number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Let each stream come to the end of its answer, and wait for it."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _sampling(self, number: int, prompt: tuple[int, ...]) -> Sampling:
        """Greedy; seeded with penalties; a stop string; log-probabilities; in turn."""
        common = {"max_tokens": self._max_tokens, "ignore_eos": True}
        match number % 4:
            case 0:
                return Sampling(**common)  # type: ignore[arg-type]
            case 1:
                return Sampling(temperature=0.8, seed=number, repetition_penalty=1.1, frequency_penalty=0.2, **common)  # type: ignore[arg-type]
            case 2:
                # A piece from late in its own answer.
                text = self._ask(prompt, Sampling(**common))[0].text  # type: ignore[arg-type]
                start = len(text) * 3 // 4
                return Sampling(stop=(text[start : start + 8],), **common)  # type: ignore[arg-type]
            case _:
                return Sampling(logprobs=2, **common)  # type: ignore[arg-type]

    def _ask(self, prompt: tuple[int, ...], sampling: Sampling) -> tuple[Answer, Finished, float]:
        """An answer, its end, and the longest wait for something to come. Raises ClientError."""
        ids: list[int] = []
        texts: list[str] = []
        logprobs: list[TokenLogprob] = []
        longest_s, last = 0.0, time.monotonic()
        finished: Finished | None = None
        for event in self._client.generate(prompt, sampling):
            now = time.monotonic()
            longest_s, last = max(longest_s, now - last), now
            if isinstance(event, Tokens):
                assert event.first_index == len(ids), f"index {event.first_index} where {len(ids)} was due"
                ids += event.token_ids
                texts.append(event.text)
                logprobs += event.logprobs
            elif isinstance(event, Finished):
                finished = event
        assert finished is not None, "the stream ended without an end"
        answer = Answer(
            token_ids=tuple(ids), text="".join(texts), logprobs=tuple(logprob.logprob for logprob in logprobs)
        )
        return answer, finished, longest_s

    def _run(self, number: int) -> None:
        while not self._stop.is_set():
            try:
                answer, finished, longest_s = self._ask(self._prompts[number], self._samplings[number])
            except ClientError as error:
                with self.tally.lock:
                    self.tally.errors.append(f"{error.code}: {error}")
                continue
            except AssertionError as error:
                with self.tally.lock:
                    self.tally.wrong.append(f"stream {number}: {error}")
                continue
            with self.tally.lock:
                if answer.same_as(self._expected[number]):
                    self.tally.num_right += 1
                else:
                    routes = " | ".join(f"{'+'.join(r.workers)} {r.num_tokens} {r.left}" for r in finished.routes)
                    self.tally.wrong.append(f"stream {number} differs ({routes})")
                self.tally.num_recoveries += finished.num_recoveries
                if finished.num_recoveries:
                    assert finished.timings is not None
                    self.tally.stalls_s.append(longest_s)
                    self.tally.recoveries_s.append(finished.timings.recovery_s / finished.num_recoveries)
