"""An answer as it comes."""

from __future__ import annotations

import os

from anabranch_client import Client, Finished, Sampling, Tokens

ENDPOINT = os.environ.get("ANABRANCH_ENDPOINT", "127.0.0.1:50051")


def main() -> None:
    sampling = Sampling(max_tokens=24, temperature=0.0)
    with Client(ENDPOINT) as client, client.generate("The capital of France is", sampling) as stream:
        for event in stream:
            if isinstance(event, Tokens):
                print(event.text, end="", flush=True)
            elif isinstance(event, Finished):
                print(f"\n{event.finish_reason} after {event.usage.num_output_tokens} tokens from {event.route}")


if __name__ == "__main__":
    main()
