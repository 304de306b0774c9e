"""The KV stream: one request's KV cache, from the ranks that computed it to the ranks that will read it.

Decode side (one receiver for each rank; it is the handler of all of the rank's planes):

    receiver = KvStreamReceiver()
    planes = {name: create_plane(name, receiver, listen_host=host) for name in names}
    addresses = {name: plane.address for name, plane in planes.items()}      # KvDestination.addresses[rank]
    receiver.open(stream_id, generation, layout=layout, rank=rank,
                  num_cached_tokens=n, num_tokens=m, sink=sink)              # before the destination is given out
    receiver.close(stream_id)                                                # after committed/failed, or to abort

`sink` (a `KvSink`) hears, on a plane's progress thread:
    place(layer, head_start, tokens_T, k_TKD, v_TKD)       copy these rows into the pool before returning
    touch()                                                the stream lives: extend the lease
    then exactly one of committed(Commit) and failed(AnabranchError); nothing after `close` returned.
When `close` returns, no `place` of that stream is running or will run: its blocks may be given to others.

Prefill side (one source for each rank; it owns planes and links and shares them among streams):

    source = KvStreamSource(planes=configured_planes("auto", host), configured="auto", listen_host=host)
    sender = source.open(destination, source_layout=layout, source_rank=0)   # connects: call off the event loop
    sender.send_layer(layer, head_start, token_start, k_TKD, v_TKD)          # copies, then returns at once
    done = sender.commit(token_id=..., logprob=..., queue_s=..., prefill_s=..., num_cached_tokens=...)
    stats = sender.wait_ack(timeout_s)            # KvStreamStats; or `await asyncio.wrap_future(done)`
    sender.abort(error)                           # instead of commit; safe at any time, also twice
    source.close()

`send_layer` may be called with the tokens of one chunk after another and only for tokens from
`destination.num_cached_tokens` on (rows below it are skipped). It blocks only when `max_in_flight_bytes` are
on their way, at most `send_timeout_s` (DeadlineExceeded). Once the receiver refused or the peer is gone, every
call raises that error (StaleLease, ChecksumMismatch, PeerLost, ...), so that prefill stops early.

A stream's life at the receiver: open -> slices -> committed | failed -> closed. A slice is checked (stream,
generation, range, size, checksum, coverage) before it is placed. A Commit is accepted only when every
(layer, head, token) that the rank must hold has arrived exactly once, from all source ranks.
"""

from transport.kv_stream.messages import Abort, Ack, Commit, Slice
from transport.kv_stream.receiver import KvStreamReceiver
from transport.kv_stream.sender import KvStreamSender
from transport.kv_stream.sink import KvSink
from transport.kv_stream.source import KvStreamSource

__all__ = ["Abort", "Ack", "Commit", "KvSink", "KvStreamReceiver", "KvStreamSender", "KvStreamSource", "Slice"]
