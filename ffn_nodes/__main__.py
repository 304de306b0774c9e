"""`python -m ffn_nodes`: one FFN worker."""

from ffn_nodes.throttle import share_interpreter
from ffn_nodes.worker import FfnWorker
from runtime.entry import worker_main

if __name__ == "__main__":
    share_interpreter()
    worker_main(
        "ffn",
        "An FFN worker: holds dense FFNs and experts, and computes rows that attention workers send. It has neither "
        "requests nor KV.",
        FfnWorker,
    )
