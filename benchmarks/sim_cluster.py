"""A real orchestrator with simulated workers, in a process of its own.

`SimCluster` starts `python -m benchmarks.sim_cluster SETTINGS`, which says where it listens in one line, and ends with
its standard input.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping
from types import TracebackType

import msgspec
import uvloop

from anabranch.config.orchestrator import OrchestratorConfig
from anabranch.system.child_process import python_environment, python_module
from benchmarks.sim_worker import Rates, SimEncoder, SimModel, SimWorker
from orchestrator.connections import raise_descriptor_limit
from orchestrator.service import Orchestrator

STOP_TIMEOUT_S = 10.0


class SimCluster:
    """Use as a context manager.

    Args:
        workers: how many.
        options: of the orchestrator.

    Attributes:
        endpoint, admin_token_file: for clients and operators.
    """

    def __init__(self, workers: int, rates: Rates, options: Mapping[str, object]) -> None:
        self._settings = json.dumps(
            {
                "workers": workers,
                "rates": [rates.step_s, rates.prefill_tokens_per_s, rates.max_running],
                "options": dict(options),
            }
        )

    def __enter__(self) -> SimCluster:
        self._process = subprocess.Popen(
            python_module("benchmarks.sim_cluster", self._settings),
            env=python_environment({"OMP_NUM_THREADS": "1"}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the simulated cluster ended with status {self._process.wait(STOP_TIMEOUT_S)}")
        said = json.loads(line)
        self.endpoint: str = said["endpoint"]
        self.admin_token_file: str = said["admin_token_file"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


async def _serve(settings: dict[str, object]) -> None:
    options, workers, numbers = settings["options"], settings["workers"], settings["rates"]
    assert isinstance(options, dict) and isinstance(workers, int) and isinstance(numbers, list)
    rates = Rates(step_s=numbers[0], prefill_tokens_per_s=numbers[1], max_running=numbers[2])
    config = msgspec.convert({"model": "simulated", **options}, OrchestratorConfig)
    orchestrator = Orchestrator(config, SimModel(), SimEncoder())
    await orchestrator.start()
    endpoint = orchestrator.control_endpoint
    tasks = [
        asyncio.create_task(SimWorker(endpoint, f"sim-{number}", rates).run(), name=f"sim-{number}")
        for number in range(workers)
    ]
    while len(orchestrator.membership.members) < workers:
        failed = next((task for task in tasks if task.done()), None)
        if failed is not None:
            failed.result()
        await asyncio.sleep(0.01)
    said = {"endpoint": orchestrator.grpc_endpoint, "admin_token_file": orchestrator.admin_token_file}
    print(json.dumps(said), flush=True)
    await asyncio.to_thread(sys.stdin.buffer.read)
    await orchestrator.close()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    raise_descriptor_limit()
    uvloop.run(_serve(json.loads(sys.argv[1])))
