"""From what a run has found to figures with targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.attack.census import Census
from benchmarks.attack.probe import Probe
from benchmarks.attack.tally import Tally
from benchmarks.report import Figure

# Caches fill and allocators keep pages: what counts is that memory does not grow with the number of inputs.
MAX_RSS_GROWTH = 1.25
# Pools of bounded size start a thread when one is first needed.
MAX_MORE_THREADS = 8
# Whose errors are expected: requests of a worker that is killed, or of one that spoils them.
_MAY_FAIL = ("kills", "victims")
_UNNAMED = ("internal", "unknown")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Everything that a run has found.

    Attributes:
        unlisted_sockets: listening sockets that docs/security.md does not list.
        phase_s: seconds, by phase.
    """

    tally: Tally
    probe: Probe
    before: Census
    after_attacks: Census
    after_kills: Census
    unlisted_sockets: tuple[str, ...]
    phase_s: dict[str, float]


def figures_of(outcome: Outcome) -> list[Figure]:
    """First what has a target, then how everything ended."""
    tally, probe = outcome.tally, outcome.probe
    ends = list(tally)
    figures = [
        _most("status.INTERNAL", tally.num_faults("INTERNAL"), "calls", 0),
        _most("status.UNKNOWN", tally.num_faults("UNKNOWN"), "calls", 0),
        # Of requests that went through the SDK, which says the code and not the status.
        _most("errors.unnamed", sum(n for _, end, n in ends if end.rpartition(".")[2] in _UNNAMED), "requests", 0),
        _most("hung", sum(n for _, end, n in ends if end.endswith(("hung", ".open"))), "calls and connections", 0),
        # A refused registration, hello or commit that was taken after all.
        _most("let_in", sum(n for _, end, n in ends if end.endswith(("WELCOME", "ACCEPTED"))), "strangers", 0),
        _most("answers.wrong", probe.num_wrong, "answers", 0),
        Figure(key="answers.right", value=probe.num_right, unit="answers", target=1),
        _most(
            "answers.missing",
            sum(n for phase, end, n in ends if end.startswith("probe.") and phase not in _MAY_FAIL),
            "answers",
            0,
        ),
        _most("sockets.unlisted", len(outcome.unlisted_sockets), "sockets", 0),
        *_kept("after_attacks", outcome.before, outcome.after_attacks),
        *_kept("after_kills", outcome.before, outcome.after_kills),
    ]
    figures.extend(Figure(key=f"{phase}.{end}", value=number, unit="times") for phase, end, number in ends)
    figures.extend(Figure(key=f"{phase}.time", value=value, unit="s") for phase, value in outcome.phase_s.items())
    return figures


def _most(key: str, value: float, unit: str, target: float) -> Figure:
    return Figure(key=key, value=value, unit=unit, target=target, higher_is_better=False)


def _kept(when: str, before: Census, after: Census) -> Iterator[Figure]:
    """What is held, beside what was held before; of those who are still there."""
    yield _most(f"{when}.leases", after.num_leases, "leases", 0)
    yield _most(f"{when}.requests", after.num_requests, "requests", 0)
    for name, free in after.free_blocks.items():
        yield _beside(f"{when}.{name}.free_blocks", free, before.free_blocks[name], "blocks", 1.0, higher=True)
    for name, held in after.holdings.items():
        was = before.holdings[name]
        yield _beside(f"{when}.{name}.descriptors", held.num_descriptors, was.num_descriptors, "files", 1.0)
        yield _most(f"{when}.{name}.more_threads", held.num_threads - was.num_threads, "threads", MAX_MORE_THREADS)
        yield _beside(f"{when}.{name}.rss", held.rss_bytes / 2**20, was.rss_bytes / 2**20, "MiB", MAX_RSS_GROWTH)


def _beside(key: str, value: float, before: float, unit: str, target: float, *, higher: bool = False) -> Figure:
    return Figure(
        key=key,
        value=value,
        unit=unit,
        reference=before,
        reference_name="before",
        target=target,
        higher_is_better=higher,
    )
