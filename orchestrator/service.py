"""The orchestrator: gateway, requests, workers, and the tasks that keep them going.

    clients --gRPC--> Gateway -> Intake -> Lifecycle (one task each) --control channel--> workers
                                              ^--- its inbox <--- receive task <-------------'

Tasks: one receives from workers, one beats and notices silence, one tells workers which FFN workers hold what, one
watches the processes that encode prompts, one per request.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
from collections.abc import Coroutine
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from anabranch.config.orchestrator import OrchestratorConfig
from anabranch.errors import ConfigError, Draining, PeerLost
from anabranch.protocol.workers import (
    Beat,
    Ended,
    ExpertRows,
    Failing,
    Leaving,
    Placed,
    Preempted,
    PrefillEnded,
    Register,
    Reserved,
    Tokens,
    ToOrchestrator,
)
from anabranch.system.clock import timeout
from anabranch.system.files import write_atomically
from anabranch.system.private_files import read_secret, runtime_folder, write_secret
from orchestrator import admin, gateway
from orchestrator.call_guard import CallGuard
from orchestrator.connections import server_options
from orchestrator.dispatcher import Dispatcher
from orchestrator.ffn_pool import FfnPool
from orchestrator.ffn_scale import FfnScale
from orchestrator.health import HealthReporter
from orchestrator.intake import Intake
from orchestrator.member import Member
from orchestrator.membership import Membership
from orchestrator.router import LeastWork, Router
from orchestrator.served_model import PromptEncoder, ServedModel
from transport.control import ControlServer

logger = logging.getLogger(__name__)

# How long calls that have their answer may take to get it out, at the end of the process.
GRPC_GRACE_S = 1.0


class Orchestrator:
    """Life: construct -> `start` (bound, announced) -> serves -> `drain` -> `close`.

    Args:
        encoder: is started and closed with this.
        router: None takes LeastWork.

    Attributes:
        failed: set when a task that must run for ever has failed; the process should end.
        grpc_endpoint, control_endpoint: where clients and workers connect, once started.
        admin_token_file: where callers of Admin find the token, once started.
    """

    def __init__(
        self, config: OrchestratorConfig, model: ServedModel, encoder: PromptEncoder, router: Router | None = None
    ) -> None:
        self._config = config
        self._model = model
        self._encoder = encoder
        self._router = router or LeastWork(config.prefill_ahead_tokens)
        self._tasks: list[asyncio.Task[None]] = []
        self.failed = asyncio.Event()
        self._run_folder: Path | None = None
        self._server: grpc.aio.Server | None = None
        self.grpc_endpoint = ""
        self.control_endpoint = ""
        self.admin_token_file = ""

    async def start(self) -> None:
        """Bind both addresses, begin to serve, and announce it.

        Raises ConfigError, TransportUnavailable, and see the encoder's `start`.
        """
        try:
            await self._start()
        except BaseException:
            self._remove_run_folder()
            raise

    async def _start(self) -> None:
        config = self._config
        secret = read_secret("secret_file", config.secret_file) if config.secret_file else b""
        self.admin_token_file = config.admin_token_file or str(write_secret(self._private("admin.token")))
        self._admin_token = read_secret("admin_token_file", self.admin_token_file)
        self._control = ControlServer(
            config.control_bind or f"ipc://{self._private('control.sock')}",
            ToOrchestrator,
            secret=secret,
            max_message_bytes=config.max_control_bytes,
            allow_remote=config.allow_remote,
        )
        self.control_endpoint = self._control.endpoint
        self.membership = Membership(
            self._control,
            self._model.identity,
            worker_timeout_s=config.worker_timeout_s,
            heartbeat_s=config.heartbeat_s,
            on_change=self._cluster_changed,
        )
        self._ffn_pool = FfnPool(config, self._model, self.membership, self._serving_changed)
        self._ffn_scale = FfnScale(self._ffn_pool)
        self._dispatcher = Dispatcher(config, self._model, self._router, self.membership)
        self._intake = Intake(config, self._model, self._encoder, self.membership, self._dispatcher)
        self._gateway = gateway.Gateway(self._model, self._intake, self.membership)
        self._health = HealthReporter((gateway.SERVICE,), lambda: self.membership.serving and not self.draining)
        try:
            await self._encoder.start()
            await self._start_grpc()
            await self._control.start()
            self._spawn(self._encoder.run(), "encoders")
            self._spawn(self._receive(), "receive")
            self._spawn(self.membership.watch(), "watch")
            self._spawn(self._ffn_pool.run(), "ffn pool")
            if config.endpoints_file:
                self._announce(Path(config.endpoints_file))
        except BaseException:
            await self.close()
            raise
        logger.info(
            "gRPC on %s, workers on %s, Admin's token in %s",
            self.grpc_endpoint,
            self.control_endpoint,
            self.admin_token_file,
        )

    async def _start_grpc(self) -> None:
        config = self._config
        guard = CallGuard(
            max_calls=config.max_calls, stall_s=config.client_stall_s, retry_after_s=self._intake.retry_after_s
        )
        server = grpc.aio.server(interceptors=(guard,), options=server_options(config))
        administration = admin.Admin(
            self.membership, self._dispatcher, self._intake, self._ffn_scale, self._admin_token
        )
        server.add_generic_rpc_handlers((self._gateway.handlers(), administration.handlers()))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            (gateway.SERVICE, admin.SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        try:
            port = server.add_insecure_port(config.grpc_bind)
        except RuntimeError as error:
            raise ConfigError("grpc_bind", config.grpc_bind, f"cannot be bound ({error}); choose another") from error
        if config.grpc_bind.startswith("unix:"):
            self.grpc_endpoint = config.grpc_bind
        else:
            self.grpc_endpoint = f"{config.grpc_bind.rpartition(':')[0]}:{port}"
        self._server = server
        await server.start()

    def _private(self, name: str) -> Path:
        """A path in this process's private folder, which is made when it is first needed."""
        if self._run_folder is None:
            self._run_folder = runtime_folder()
        return self._run_folder / name

    def _remove_run_folder(self) -> None:
        if self._run_folder is not None:
            shutil.rmtree(self._run_folder, ignore_errors=True)

    def _announce(self, path: Path) -> None:
        """Write the endpoints down, for programs. Raises ConfigError."""
        announcement = {
            "grpc": self.grpc_endpoint,
            "control": self.control_endpoint,
            "admin_token_file": self.admin_token_file,
            "pid": os.getpid(),
        }
        try:
            write_atomically(path, json.dumps(announcement).encode())
        except OSError as error:
            raise ConfigError(
                "endpoints_file", str(path), f"cannot be written ({error.strerror}); choose another"
            ) from error

    # Serving ----------------------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._task_done)
        self._tasks.append(task)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            logger.critical("the task %s failed", task.get_name(), exc_info=task.exception())
            self.failed.set()

    async def _receive(self) -> None:
        """Hand out what workers say, until cancelled or the channel is closed."""
        while True:
            try:
                peer, message = await self._control.recv()
            except PeerLost:
                return
            # A channel that always has a message ready would otherwise let nothing else run.
            await asyncio.sleep(0)
            if isinstance(message, Register):
                await self.membership.register(peer, message.worker)
            elif isinstance(message, Beat):
                await self.membership.heard(peer, message.stats)
            elif isinstance(message, Failing):
                member = await self.membership.heard(peer)
                if member is not None:
                    self.membership.lose(member, message.error.message, failed=True)
            elif isinstance(message, Placed):
                member = await self.membership.heard(peer)
                if member is not None:
                    self._ffn_pool.placed(member, message)
            elif isinstance(message, ExpertRows):
                member = await self.membership.heard(peer)
                if member is not None:
                    self._ffn_pool.measured(member, message)
            elif isinstance(message, Leaving):
                member = await self.membership.heard(peer)
                if member is not None:
                    self.membership.mark_draining(member)
            elif isinstance(message, Reserved | Tokens | Preempted | PrefillEnded | Ended):
                member = await self.membership.heard(peer)
                if member is not None:
                    self._dispatcher.deliver(member, message)

    def _cluster_changed(self, member: Member) -> None:
        if member.end is not None:
            self._dispatcher.worker_lost(member, member.end)
        self._ffn_pool.changed(member)
        self._serving_changed()

    def _serving_changed(self) -> None:
        self._health.changed()
        self._dispatcher.queue.pump()

    # Ending -----------------------------------------------------------------------------------------------

    @property
    def draining(self) -> bool:
        return self._intake.draining

    @property
    def num_requests(self) -> int:
        return self._dispatcher.num_requests

    async def drain(self) -> None:
        """Take no new requests; wait for those in flight, and end what is left after `drain_timeout_s`."""
        self._intake.draining = True
        self._health.changed()
        try:
            async with timeout(self._config.drain_timeout_s):
                await self._dispatcher.wait_until_idle()
        except TimeoutError:
            num_left = self._dispatcher.num_requests
            logger.warning("%d requests are ended after drain_timeout_s", num_left)
            await self._dispatcher.stop_all(
                Draining(f"drain_timeout_s: not finished {self._config.drain_timeout_s:g} s after shutdown began")
            )

    async def close(self) -> None:
        """Shut workers down, end every task, release every address. To be called once, drained or not."""
        self._intake.draining = True
        self._ffn_scale.close()
        self.membership.log.close()
        await self._dispatcher.stop_all(Draining("the orchestrator ends"))
        await self._intake.close()
        if self._server is not None:
            await self._server.stop(GRPC_GRACE_S)
        await self.membership.shut_down()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._ffn_pool.close()
        await self._encoder.close()
        await self._control.close()
        self._remove_run_folder()

    def check_integrity(self) -> None:
        """Assert that no request has left anything behind; to be called when idle."""
        self._dispatcher.check_integrity()
        assert self._gateway.num_calls == 0, f"{self._gateway.num_calls} Generate calls"
        self._intake.check_integrity()
        strays = [t.get_name() for t in asyncio.all_tasks() if t.get_name().startswith("request ")]
        assert not strays, f"tasks: {strays}"
