"""Coming back when the server has no room, at the time that it says; nothing is computed twice."""

from __future__ import annotations

import os
import time
import uuid

from anabranch_client import Client, Completion, Overloaded, Sampling, Unavailable

ENDPOINT = os.environ.get("ANABRANCH_ENDPOINT", "127.0.0.1:50051")
NUM_TRIES = 5


def ask(client: Client, prompt: str) -> Completion:
    """An answer, in the end."""
    key = uuid.uuid4().hex
    for _ in range(NUM_TRIES - 1):
        try:
            return client.complete(prompt, Sampling(max_tokens=16), tenant="examples", priority=10, idempotency_key=key)
        except Overloaded as error:
            time.sleep(error.retry_after_s or 1.0)
        except Unavailable:
            time.sleep(1.0)
    return client.complete(prompt, Sampling(max_tokens=16), tenant="examples", priority=10, idempotency_key=key)


def main() -> None:
    with Client(ENDPOINT) as client:
        print(ask(client, "The capital of France is").text)


if __name__ == "__main__":
    main()
