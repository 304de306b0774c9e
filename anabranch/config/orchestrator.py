"""What the orchestrator is told at its start: one frozen tree, from flags or from the launcher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from anabranch.config.bounds import Between, Count, Line, MessageSize, Options, Seconds, Size, Tokens, is_port
from anabranch.config.tenants import TenantWeights, parse_tenant_weights
from anabranch.errors import ConfigError
from anabranch.system.hosts import is_loopback


def check_secret_file(key: str, endpoint: str, secret_file: str) -> None:
    """Refuse TCP without a secret, since any process that reaches the port could speak. Raises ConfigError."""
    if endpoint.startswith("tcp://") and not secret_file:
        raise ConfigError(
            key,
            endpoint,
            "needs secret_file, the same for the orchestrator and all workers; make one with: "
            "(umask 077; openssl rand -hex 32 > FILE); on one machine, ipc://PATH needs none",
        )


@dataclass(frozen=True, kw_only=True)
class OrchestratorConfig(Options):
    """Configuration of the orchestrator.

    Attributes:
        model: a known name, a Hugging Face folder or a GGUF file; its tokenizer is used here.
        grpc_bind: address of the gateway, host:port or unix:path; port 0: chosen by the system.
        control_bind: address that workers connect to, ipc://path or, with a secret_file, tcp://host:port; empty: a
            Unix socket in a new private folder.
        secret_file: file of mode 0600 with the secret that workers must know; required with tcp://.
        admin_token_file: file of mode 0600 with the token that callers of Admin must show; empty: a new one in a new
            private folder.
        endpoints_file: JSON with grpc, control, admin_token_file and pid, written once both addresses are bound;
            empty: not written.
        allow_remote: let the two addresses be reachable from other machines, without TLS.
        max_queued: most requests that wait for their first token; more are refused at once.
        max_queued_bytes: most memory that these take together (message, prompt ids); more are refused at once.
        max_queued_tokens: most prompt tokens of these; more are refused at once. While several tenants want room, each
            may fill its share of these three bounds, or as much as is left free.
        priority_step_s: waiting that makes up for one step of priority, so that the lowest gets its turn.
        tenant_weights: NAME=WEIGHT of tenants that are served more or less than others, whose weight is 1.
        idempotency_s: how long the answer to a request with an idempotency key is remembered.
        idempotency_grace_s: how long a request with an idempotency key goes on after all its callers have left.
        max_idempotent_answers: most answers that are remembered, or under way with a key.
        max_idempotent_bytes: most memory of remembered answers; the oldest are forgotten first.
        max_calls: most calls at a time, of all clients; more are refused at once.
        max_connections: most connections of clients at a time; fewer where the process may not have the descriptors.
        max_request_bytes: largest message of a client.
        max_control_bytes: largest message to or from a worker.
        max_unread_tokens: most tokens kept for a client that does not read; one more ends the request.
        prefill_ahead_tokens: prompt tokens given to a prefill worker before the next request waits in the queue;
            a worker without work takes one request of any length.
        max_retries: times that one request is tried again because a worker gave it back without a new token.
        max_recoveries: times in a row that one request goes on elsewhere because a worker failed it, before it ends by
            name; 0: it ends with the worker's failure. What max_retries counts is not among them.
        encoders_per_lane: processes that turn prompts into token ids, for each of short texts, long texts, short
            chats and long chats.
        max_prompt_chars: most characters of a prompt of text, and of a chat before and after the model's template.
        encode_timeout_s: time that one prompt's template and tokenizer may take; then its process is killed.
        queue_timeout_s: wait for a process that can encode the prompt; wait for a worker that can take the request.
        no_worker_grace_s: wait of requests in the queue for a worker to come, while none of a role that is needed
            takes requests; new ones are refused at once.
        reserve_timeout_s: wait for a decode worker's KV blocks.
        prefill_timeout_s: wait from prefill's order to the first token.
        token_timeout_s: wait for the next token, or for the end after the last.
        preempted_timeout_s: wait for the next token of a request that was preempted at its worker.
        report_timeout_s: wait for prefill's report (timings, KV bytes) once the answer is complete.
        ffn_workers: FFN workers to wait for before experts are shared out among them; 0: whoever is there.
        ffn_replicas: FFN workers that hold each expert; 0: all do.
        ffn_gather_timeout_s: wait for all of ffn_workers from the first on; then those that are there hold everything.
        ffn_place_timeout_s: wait for an FFN worker to load what it was told to hold; then it counts as dead.
        ffn_rebalance_s: shortest time between two moves of experts to FFN workers that have less to do; 0: experts
            never move for the load's sake.
        client_stall_s: wait for a client to read, or to send what its call begins with.
        handshake_timeout_s: wait for a new connection's first frames.
        connection_idle_s: time without a call after which a connection is closed.
        keepalive_s: silence of a connection after which its client is asked for a sign of life.
        keepalive_timeout_s: wait for that sign; without it the connection is closed.
        worker_timeout_s: silence after which a worker counts as dead.
        heartbeat_s: time between signs of life sent to workers.
        drain_timeout_s: wait for running requests at the end of the process.
    """

    model: Line = "smollm2-135m"
    grpc_bind: Line = "127.0.0.1:0"
    control_bind: Line = ""
    secret_file: Line = ""
    admin_token_file: Line = ""
    endpoints_file: Line = ""
    allow_remote: bool = False
    max_queued: Count = 256
    max_queued_bytes: Size = 256 << 20
    max_queued_tokens: Tokens = 1 << 20
    priority_step_s: Seconds = 1.0
    tenant_weights: TenantWeights = ()
    idempotency_s: Seconds = 600.0
    idempotency_grace_s: Seconds = 10.0
    max_idempotent_answers: Count = 1024
    max_idempotent_bytes: Size = 64 << 20
    max_calls: Count = 4096
    max_connections: Count = 4096
    max_request_bytes: MessageSize = 4 << 20
    max_control_bytes: MessageSize = 8 << 20
    max_unread_tokens: Tokens = 16384
    prefill_ahead_tokens: Tokens = 4096
    max_retries: Annotated[int, Between(0)] = 8
    max_recoveries: Annotated[int, Between(0, 100)] = 3
    encoders_per_lane: Annotated[int, Between(1, 64)] = 1
    max_prompt_chars: Annotated[int, Between(1, unit="characters")] = 1 << 20
    encode_timeout_s: Seconds = 10.0
    queue_timeout_s: Seconds = 60.0
    no_worker_grace_s: Seconds = 10.0
    reserve_timeout_s: Seconds = 60.0
    prefill_timeout_s: Seconds = 120.0
    token_timeout_s: Seconds = 30.0
    preempted_timeout_s: Seconds = 300.0
    report_timeout_s: Seconds = 2.0
    ffn_workers: Annotated[int, Between(0, 256)] = 0
    ffn_replicas: Annotated[int, Between(0, 256)] = 1
    ffn_gather_timeout_s: Seconds = 60.0
    ffn_place_timeout_s: Seconds = 120.0
    ffn_rebalance_s: Annotated[int, Between(0, 86400, "seconds")] = 300
    client_stall_s: Seconds = 10.0
    handshake_timeout_s: Seconds = 5.0
    connection_idle_s: Seconds = 300.0
    keepalive_s: Seconds = 30.0
    keepalive_timeout_s: Seconds = 20.0
    worker_timeout_s: Seconds = 3.0
    heartbeat_s: Seconds = 0.5
    drain_timeout_s: Seconds = 30.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.worker_timeout_s < 2 * self.heartbeat_s:
            raise ConfigError(
                "worker_timeout_s", self.worker_timeout_s, f"must be at least two beats ({2 * self.heartbeat_s} s)"
            )
        parse_tenant_weights(self.tenant_weights)
        self._check_bind("grpc_bind", self.grpc_bind, "unix:")
        self._check_control_bind()

    def _check_control_bind(self) -> None:
        if not self.control_bind:
            return
        scheme, separator, address = self.control_bind.partition("://")
        if not separator or scheme not in ("tcp", "ipc"):
            raise ConfigError("control_bind", self.control_bind, "must be tcp://host:port or ipc://path")
        if scheme == "tcp":
            self._check_bind("control_bind", address, "")
            check_secret_file("control_bind", self.control_bind, self.secret_file)

    def _check_bind(self, key: str, address: str, local_prefix: str) -> None:
        if local_prefix and address.startswith(local_prefix):
            return
        host, separator, port = address.rpartition(":")
        if not separator or not host or not is_port(port):
            raise ConfigError(key, getattr(self, key), "must end in host:port, with a port from 0 to 65535")
        if not self.allow_remote and not is_loopback(host):
            raise ConfigError(
                key,
                getattr(self, key),
                "is reachable from other machines and there is no TLS; bind to 127.0.0.1, or set allow_remote",
            )
