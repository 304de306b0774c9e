"""`python -m benchmarks.spoilt_ffn`: an FFN worker whose answers come through a proxy that changes a byte now and then.

Takes the flags of `python -m ffn_nodes`; says SPOILT on its log with each byte.
"""

from __future__ import annotations

import logging

import msgspec

from anabranch.protocol.workers import WorkerInfo
from benchmarks.spoiling_proxy import SpoilingProxy
from ffn_nodes.worker import FfnWorker
from runtime.entry import worker_main

logger = logging.getLogger(__name__)

SPOILT = "a byte was changed on its way"
GOOD_BYTES = 20_000
MOST = 5


class SpoiltFfnWorker(FfnWorker):
    """Registers the proxy's address for its own."""

    def build(self) -> WorkerInfo:
        info = super().build()
        proxy = SpoilingProxy(info.addresses["tcp"], GOOD_BYTES, most=MOST, spoilt=lambda: logger.warning(SPOILT))
        return msgspec.structs.replace(info, addresses={"tcp": proxy.address})


if __name__ == "__main__":
    worker_main("ffn", "An FFN worker behind a proxy that changes bytes.", SpoiltFfnWorker)
