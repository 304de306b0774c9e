"""`python -m attn_nodes`: one attention worker."""

from attn_nodes.worker import AttnWorker
from runtime.entry import worker_main

if __name__ == "__main__":
    worker_main(
        "attn",
        "An attention worker: reserves blocks, receives KV caches from prefill workers and generates with continuous "
        "batching; it computes attention halves and sends rows to FFN workers twice a layer.",
        AttnWorker,
    )
