"""The likeliest tokens at each place of an answer, with their log-probabilities."""

from __future__ import annotations

import math
import os

from anabranch_client import Client, Sampling

ENDPOINT = os.environ.get("ANABRANCH_ENDPOINT", "127.0.0.1:50051")


def main() -> None:
    with Client(ENDPOINT) as client:
        answer = client.complete("The sky is", Sampling(max_tokens=4, temperature=0.0, logprobs=3))
    print(answer.text)
    for token_id, chosen in zip(answer.token_ids, answer.logprobs, strict=True):
        others = ", ".join(f"{other} {math.exp(logprob):.1%}" for other, logprob in chosen.top)
        print(f"token {token_id} {math.exp(chosen.logprob):.1%} of {others}")


if __name__ == "__main__":
    main()
