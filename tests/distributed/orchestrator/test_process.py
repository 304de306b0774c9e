"""`python -m orchestrator` as a process: announces itself, serves, drains on SIGTERM, refuses bad settings."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import tokenizers
import transformers

from anabranch.config.orchestrator import OrchestratorConfig
from anabranch.errors import ConfigError, TransportUnavailable
from anabranch.protocol.workers import Generate, Shutdown
from anabranch.system.private_files import write_secret
from anabranch_client import AsyncClient, ChatMessage, Draining, InvalidRequest, Sampling, ServerFailed, Unavailable
from benchmarks.attack.http2 import PREFACE, connect, settings
from orchestrator.service import Orchestrator
from tests.support.thread_encoder import ThreadEncoder
from tests.support.waiting import WAIT_S

pytestmark = pytest.mark.distributed

START_TIMEOUT_S = 60.0
WORDS = ["<eos>", "hello", "world", "again"]
# Of the checkpoint below, as a worker tells them.
HEADS = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A checkpoint's configuration and tokenizer; the orchestrator reads no weights."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<eos>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        eos_token_id=0,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    return folder


async def started(
    wait, *flags: str, folder: Path, endpoints: Path, prefix: tuple[str, ...] = ()
) -> tuple[asyncio.subprocess.Process, dict[str, object]]:
    process = await asyncio.create_subprocess_exec(
        *prefix,
        sys.executable,
        "-m",
        "orchestrator",
        f"--model={folder}",
        f"--endpoints-file={endpoints}",
        *flags,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        await wait(lambda: endpoints.exists() or process.returncode is not None, START_TIMEOUT_S)
    except TimeoutError:
        process.kill()
        raise
    assert process.returncode is None, (await process.stderr.read()).decode()
    return process, read(endpoints)


def read(endpoints: Path) -> dict[str, object]:
    return json.loads(endpoints.read_text())


def test_it_serves_and_drains(model_folder, tmp_path, scripted, wait):
    async def main() -> None:
        process, announced = await started(wait, folder=model_folder, endpoints=tmp_path / "endpoints.json")
        try:
            assert announced["pid"] == process.pid
            assert announced["grpc"].startswith("127.0.0.1:")
            private = os.path.dirname(announced["admin_token_file"])
            assert announced["control"] == f"ipc://{private}/control.sock"
            assert stat.S_IMODE(os.stat(private).st_mode) == 0o700
            worker = scripted(announced["control"], "both-0", "colocated", max_context=64, vocab_size=4, **HEADS)
            await worker.register()
            async with AsyncClient(announced["grpc"]) as client:
                assert await client.health() == "serving"
                assert await client.tokenize("hello again") == (1, 3)
                answer = asyncio.create_task(client.complete("hello", Sampling(max_tokens=2)))
                request = (await worker.expect(Generate)).request
                assert request.prompt_ids == (1,)
                process.send_signal(signal.SIGTERM)
                await wait(lambda: not_serving(client))
                with pytest.raises(Draining):
                    await client.complete("hello")
                await worker.tokens(request, [2, 3], 0)
                await worker.ended(request, "length")
                done = await answer
                assert (done.text, done.token_ids) == ("world again", (2, 3))
            await worker.expect(Shutdown)
            assert await asyncio.wait_for(process.wait(), WAIT_S) == 0
            assert os.path.basename(private) not in os.listdir(os.path.dirname(private))
            await worker.close()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    asyncio.run(main())


def test_a_second_signal_ends_at_once(model_folder, tmp_path, scripted, wait):
    async def main() -> None:
        process, announced = await started(
            wait, f"--control-bind=ipc://{tmp_path}/control", folder=model_folder, endpoints=tmp_path / "endpoints.json"
        )
        try:
            worker = scripted(announced["control"], "both-0", "colocated", max_context=64, vocab_size=4, **HEADS)
            await worker.register()
            async with AsyncClient(announced["grpc"]) as client:
                answer = asyncio.create_task(client.complete("hello", Sampling(max_tokens=2)))
                await worker.expect(Generate)
                process.send_signal(signal.SIGINT)
                await wait(lambda: not_serving(client))
                process.send_signal(signal.SIGINT)
                with pytest.raises(Draining):
                    await answer
            assert await asyncio.wait_for(process.wait(), WAIT_S) == 0
            await worker.close()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    asyncio.run(main())


def test_silent_connections_starve_nobody(model_folder, tmp_path, scripted, wait):
    """More of them than the process may have descriptors; a third says nothing, half a preface, or all but a call."""

    def flood(endpoint: str) -> list[socket.socket]:
        sockets = []
        for number in range(300):
            sockets.append(connect(endpoint))
            with contextlib.suppress(OSError):  # one too many is closed at once
                sockets[-1].sendall((b"", PREFACE[:10], PREFACE + settings(0))[number % 3])
        return sockets

    async def main() -> None:
        process, announced = await started(
            wait,
            "--handshake-timeout-s=1",
            "--connection-idle-s=2",
            f"--control-bind=ipc://{tmp_path}/control",
            folder=model_folder,
            endpoints=tmp_path / "endpoints.json",
            prefix=("sh", "-c", 'ulimit -Sn 64; ulimit -Hn 256; exec "$@"', "sh"),
        )
        sockets: list[socket.socket] = []
        try:
            assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (256, 256)
            before = len(os.listdir(f"/proc/{process.pid}/fd"))
            async with AsyncClient(announced["grpc"]) as client:
                assert await client.health() == "not_serving"
                sockets = await asyncio.to_thread(flood, announced["grpc"])
                # A worker comes, and the client that is connected goes on.
                worker = scripted(announced["control"], "both-0", "colocated", max_context=64, vocab_size=4, **HEADS)
                assert (await worker.register()).error is None
                assert await client.health() == "serving"
            # New clients are served again as soon as the silent are gone; nobody had to close them.
            for _ in range(4):
                async with AsyncClient(announced["grpc"], call_timeout_s=WAIT_S) as client:

                    async def served(client: AsyncClient = client) -> bool:
                        with contextlib.suppress(Unavailable):
                            return await client.tokenize("hello") == (1,)
                        return False

                    await wait(served)
            await wait(lambda: len(os.listdir(f"/proc/{process.pid}/fd")) <= before + 10)
            await worker.close()
        finally:
            for sock in sockets:
                sock.close()
            process.kill()
            said = (await process.communicate())[1].decode()
        assert "max_connections: 128, not 4096: this process may have 256 descriptors" in said
        assert "Traceback" not in said


# Each does what the first message says.
BAD_TEMPLATE = """
{%- macro again(x) %}{{ again(x) }}{% endmacro -%}
{%- set order = messages[0].content -%}
{%- if order == "wedge" %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}
{%- elif order == "huge" %}{{ order * 15000000 }}
{%- elif order == "huger" %}{{ order * 10**10 }}
{%- elif order == "zero" %}{{ 1 / 0 }}
{%- elif order == "recursion" %}{{ again(1) }}
{%- elif order == "range" %}{% for a in range(10**8) %}{% endfor %}
{%- elif order == "refuse" %}{{ raise_exception("roles must alternate") }}
{%- else %}hello world{% endif -%}
"""


def test_no_chat_template_holds_up_or_ends_the_process(model_folder, tmp_path, wait):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / "chat_template.jinja").write_text(BAD_TEMPLATE)

    async def main() -> None:
        process, announced = await started(
            wait, "--encode-timeout-s=1", folder=folder, endpoints=tmp_path / "endpoints.json"
        )
        encoders = psutil.Process(process.pid).children(recursive=True)
        assert len(encoders) == 5
        try:
            async with AsyncClient(announced["grpc"]) as client:

                async def chat(order: str) -> tuple[int, ...]:
                    return await client.tokenize([ChatMessage("user", order)])

                assert await chat("hello") == (1, 2)
                for order, says in {
                    "huge": "8 characters become 60000000 ",
                    "huger": "chat template failed: MemoryError",
                    "zero": "chat template failed: ZeroDivisionError: division by zero",
                    "recursion": "chat template failed: RecursionError",
                    "range": "chat template failed: OverflowError: Range too big",
                    "wedge": r"chat template was not done after 1 s \(encode_timeout_s\)",
                }.items():
                    with pytest.raises(ServerFailed, match=says) as caught:
                        await chat(order)
                    assert caught.value.code == "chat_template"
                with pytest.raises(InvalidRequest, match=r"messages: .* refuses them: roles must alternate"):
                    await chat("refuse")
                assert await chat("hello") == (1, 2)

                process.send_signal(signal.SIGSTOP)
                wedged = [asyncio.create_task(chat("wedge")) for _ in range(30)]
                texts = [asyncio.create_task(client.tokenize("hello again")) for _ in range(30)]
                process.send_signal(signal.SIGCONT)
                assert set(await asyncio.gather(*texts)) == {(1, 3)}
                assert not wedged[-1].done()
                encoders += psutil.Process(process.pid).children(recursive=True)
                process.send_signal(signal.SIGTERM)
                await asyncio.wait_for(process.wait(), WAIT_S)
                assert process.returncode == 0
                await asyncio.gather(*wedged, return_exceptions=True)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        await wait(lambda: not any(encoder.is_running() for encoder in encoders))
        log = (await process.stderr.read()).decode()
        assert "Traceback" not in log
        assert log.count("ZeroDivisionError") == log.count("60000000 ") == 1

    asyncio.run(main())


async def not_serving(client: AsyncClient) -> bool:
    return await client.health() == "not_serving"


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", *flags], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--grpc-bind=0.0.0.0:0"], "grpc_bind: '0.0.0.0:0': is reachable from other machines"),
        (["--control-bind=udp://x"], "control_bind: 'udp://x': must be tcp://host:port or ipc://path"),
        (["--control-bind=tcp://127.0.0.1:0"], "control_bind: 'tcp://127.0.0.1:0': needs secret_file"),
        (["--worker-timeout-s=0"], "worker_timeout_s: 0.0: must be above 0"),
        (["--model=/nowhere"], "/nowhere"),
        (["--modle=x"], "modle"),
    ],
)
def test_bad_settings_end_it_with_status_2(flags, says):
    done = run(*flags)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_an_endpoints_file_that_cannot_be_written_ends_it_with_status_2(model_folder, tmp_path):
    done = run(f"--model={model_folder}", f"--endpoints-file={tmp_path}/none/x.json")
    assert done.returncode == 2
    assert f"endpoints_file: '{tmp_path}/none/x.json': cannot be written (No such file or directory)" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_teaches():
    done = run("--help")
    assert done.returncode == 0
    for flag in ("--model", "--grpc-bind", "--control-bind", "--worker-timeout-s", "--max-queued"):
        assert flag in done.stdout
    assert "silence after which a worker counts as dead" in " ".join(done.stdout.split())


def test_addresses_that_are_taken(model, tmp_path):
    def encoder() -> ThreadEncoder:
        return ThreadEncoder(model.encode_prompt)

    async def main() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(ConfigError, match=f"grpc_bind: '127.0.0.1:{port}': cannot be bound"):
                await Orchestrator(OrchestratorConfig(grpc_bind=f"127.0.0.1:{port}"), model, encoder()).start()
            secret = str(write_secret(tmp_path / "secret"))
            config = OrchestratorConfig(control_bind=f"tcp://127.0.0.1:{port}", secret_file=secret)
            with pytest.raises(TransportUnavailable, match="cannot bind"):
                await Orchestrator(config, model, encoder()).start()
        first = Orchestrator(OrchestratorConfig(grpc_bind=f"unix:{tmp_path}/grpc"), model, encoder())
        await first.start()
        async with AsyncClient(first.grpc_endpoint) as client:
            assert await client.tokenize("ab") == (97, 98)
        await first.close()

    asyncio.run(main())


def test_nothing_is_left_of_a_start_that_cannot_be_announced(model, tmp_path):
    def orchestrator(endpoints_file: Path, encoder: ThreadEncoder) -> Orchestrator:
        config = OrchestratorConfig(
            grpc_bind=f"unix:{tmp_path}/grpc",
            control_bind=f"ipc://{tmp_path}/control",
            endpoints_file=str(endpoints_file),
        )
        return Orchestrator(config, model, encoder)

    async def main() -> None:
        encoder = ThreadEncoder(model.encode_prompt)
        failed = orchestrator(tmp_path / "none" / "x.json", encoder)
        with pytest.raises(ConfigError, match=r"endpoints_file: '.*/none/x.json': cannot be written"):
            await failed.start()
        private = os.path.dirname(failed.admin_token_file)
        names = {task.get_name() for task in asyncio.all_tasks()}
        assert not names & {"encoders", "receive", "watch"}
        assert os.path.basename(private) not in os.listdir(os.path.dirname(private))
        with pytest.raises(RuntimeError, match="after shutdown"):
            await encoder.encode("a")
        # Both addresses are free, which they are not while they are served.
        second = orchestrator(tmp_path / "x.json", ThreadEncoder(model.encode_prompt))
        await second.start()
        assert read(tmp_path / "x.json")["grpc"] == f"unix:{tmp_path}/grpc"
        async with AsyncClient(second.grpc_endpoint) as client:
            assert await client.tokenize("ab") == (97, 98)
        await second.close()

    asyncio.run(main())
