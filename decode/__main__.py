"""`python -m decode`: one decode worker; with `--role colocated` it computes prompts too."""

from decode.worker import DecodeWorker
from runtime.entry import worker_main

if __name__ == "__main__":
    worker_main(
        "decode",
        "A decode worker: reserves blocks, receives KV caches from prefill workers and generates with continuous "
        "batching. With --role colocated it computes prompts itself.",
        DecodeWorker,
    )
