"""Attacks a cluster of real processes from every side, and counts what it says and what it keeps.

Fuzzed calls; strangers on the control channel; KV slices that nobody should send; requests that are left at every stage
under names that come again; clients that stop reading or say nothing; workers that are stopped, and killed. All the
while fixed prompts are asked, whose greedy tokens must never change. Figures: how everything ended, by status and named
error; what orchestrator and surviving workers hold afterwards beside what they held before.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from anabranch.system.private_files import read_secret
from anabranch_client import Admin, AsyncClient
from benchmarks.attack import calls, cancels, cluster, control, faults, slices
from benchmarks.attack.census import settle, take
from benchmarks.attack.connections import Stalled
from benchmarks.attack.figures import Outcome, figures_of
from benchmarks.attack.listeners import unlisted
from benchmarks.attack.probe import Probe
from benchmarks.attack.tally import Tally
from benchmarks.report import option_parser, report
from benchmarks.tiny_model import save_tiny_model
from launch.cluster import LocalCluster

QUICK_INPUTS, INPUTS = 2_000, 20_000
# Of all inputs; what is left is calls.
CONTROL_SHARE, SLICES_SHARE, CANCELS_SHARE = 0.35, 0.3, 0.04
# Before the first census: what is made when it is first needed is there then.
WARM_UP_INPUTS = 300


class Attack:
    """One run against one cluster."""

    def __init__(self, running: LocalCluster, model: Path, seed: int) -> None:
        self._cluster = running
        self._seed = seed
        self._tally = Tally()
        self._info = cluster.prefill_info(model, slices.NAME)
        self._control = f"ipc://{running.folder}/control.sock"
        self._secret = read_secret("secret_file", str(running.folder / "control.secret"))
        self._token = running.admin_token_file.read_text().strip()
        self._phase_s: dict[str, float] = {}

    async def run(self, num_inputs: int) -> Outcome:
        """All phases, one after the other. Raises ClientError where the cluster does not even serve at first."""
        with Admin(self._cluster.endpoint, token_file=self._cluster.admin_token_file) as admin:
            async with AsyncClient(self._cluster.endpoint) as client:
                probe = Probe(client, self._tally, self._seed)
                await probe.learn()
                await self._phases(WARM_UP_INPUTS, 0, -self._seed, probe, Tally())
                before = await asyncio.to_thread(settle, self._cluster, admin, take(self._cluster, admin))
                await self._phases(num_inputs, min(20, 1 + num_inputs // 500), self._seed, probe, self._tally)
                with self._timed("freezes"):
                    await faults.freeze(self._cluster, probe, self._tally)
                    probe.phase = "probe"
                    await probe.ask_all()
                unlisted_sockets = unlisted(self._cluster)
                after_attacks = await asyncio.to_thread(settle, self._cluster, admin, before)
                with self._timed("kills"):
                    for name in cluster.VICTIMS:
                        await faults.kill(self._cluster, name, probe, self._tally)
                        await probe.ask_all()
                after_kills = await asyncio.to_thread(settle, self._cluster, admin, before)
        return Outcome(
            tally=self._tally,
            probe=probe,
            before=before,
            after_attacks=after_attacks,
            after_kills=after_kills,
            unlisted_sockets=unlisted_sockets,
            phase_s=self._phase_s,
        )

    async def _phases(self, num_inputs: int, num_stalled: int, seed: int, probe: Probe, tally: Tally) -> None:
        """What outsiders do."""
        endpoint = self._cluster.endpoint
        num_control, num_slices, num_cancels = (
            int(share * num_inputs) for share in (CONTROL_SHARE, SLICES_SHARE, CANCELS_SHARE)
        )
        num_calls = num_inputs - num_control - num_slices - num_cancels
        stalled = Stalled(endpoint, f"{self._cluster.folder}/control.sock", num_stalled)
        watching = asyncio.create_task(stalled.watch(tally))
        try:
            async with probe.asking("probe"):
                with self._timed("calls"):
                    await calls.attack(endpoint, seed, self._token, num_calls, tally)
                with self._timed("control"):
                    await control.attack(self._control, self._secret, seed, self._info, "decode-0", num_control, tally)
                with self._timed("cancels"):
                    await cancels.attack(endpoint, seed, num_cancels, probe, tally)
            # Nobody else asks meanwhile: what the hostile worker gets is spoilt.
            with self._timed("slices"):
                await slices.attack(endpoint, self._control, self._secret, seed, self._info, num_slices, probe, tally)
            with self._timed("connections"):
                await watching
        finally:
            stalled.close()
        await probe.ask_all()

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start_s = time.monotonic()
        yield
        self._phase_s[phase] = time.monotonic() - start_s


def main() -> int:
    parser = option_parser("attack", __doc__)
    parser.add_argument("--seed", type=int, default=1, help="of all inputs; the machine's timing is not repeated")
    parser.add_argument(
        "--inputs", type=int, help=f"calls, messages and slices [{INPUTS:,}, or {QUICK_INPUTS:,} with --quick]"
    )
    options = parser.parse_args()
    num_inputs = options.inputs or (QUICK_INPUTS if options.quick else INPUTS)
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        model = save_tiny_model(Path(folder))
        with LocalCluster(cluster.topology(model)) as running:
            outcome = asyncio.run(Attack(running, model, options.seed).run(num_inputs))
    for (phase, end), details in outcome.tally.details.items():
        print(f"{phase}: {end}: {details}", file=sys.stderr)
    for socket in outcome.unlisted_sockets:
        print(f"docs/security.md does not list: {socket}", file=sys.stderr)
    return report("attack", figures_of(outcome), options.json)


if __name__ == "__main__":
    sys.exit(main())
