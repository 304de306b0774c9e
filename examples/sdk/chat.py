"""A chat of two turns; the second prompt begins with the first, whose KV the prefix cache has kept."""

from __future__ import annotations

import os

from anabranch_client import ChatMessage, Client, Sampling

ENDPOINT = os.environ.get("ANABRANCH_ENDPOINT", "127.0.0.1:50051")
QUESTIONS = ("What is the capital of France?", "And of Italy?")


def main() -> None:
    turns = [ChatMessage("system", "You answer in one short sentence.")]
    with Client(ENDPOINT) as client:
        for question in QUESTIONS:
            turns.append(ChatMessage("user", question))
            # Answers to requests of another salt are no faster for what this chat has asked.
            answer = client.complete(turns, Sampling(max_tokens=24, temperature=0.0), cache_salt="this user")
            turns.append(ChatMessage("assistant", answer.text))
            cached, total = answer.usage.num_cached_tokens, answer.usage.num_prompt_tokens
            print(f"> {question}\n{answer.text}\n({cached} of {total} prompt tokens were cached)")


if __name__ == "__main__":
    main()
