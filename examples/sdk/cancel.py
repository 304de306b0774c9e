"""Leaving an answer early: the end of the `with` block cancels the request, and its KV blocks are free again."""

from __future__ import annotations

import os

from anabranch_client import Client, Sampling, Tokens

ENDPOINT = os.environ.get("ANABRANCH_ENDPOINT", "127.0.0.1:50051")
ENOUGH = 5


def main() -> None:
    count = 0
    # Whoever forgets to cancel is covered by a deadline.
    with Client(ENDPOINT) as client, client.generate("1, 2, 3,", Sampling(ignore_eos=True), timeout_s=60) as stream:
        for event in stream:
            if isinstance(event, Tokens):
                print(event.text, end="", flush=True)
                count += len(event.token_ids)
            if count >= ENOUGH:
                break
    print("\nleft")


if __name__ == "__main__":
    main()
