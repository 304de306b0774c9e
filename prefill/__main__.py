"""`python -m prefill`: one prefill worker."""

from prefill.worker import PrefillWorker
from runtime.entry import worker_main

if __name__ == "__main__":
    worker_main(
        "prefill",
        "A prefill worker: computes prompts in chunks and streams each layer's KV cache to the decode worker "
        "that reserved room for it.",
        PrefillWorker,
    )
