"""What every benchmark prints and writes: a table of figures with units, bounds and targets, and JSON.

A benchmark is a module with a `main()`:

    def main() -> int:
        options = parse_options("kernels", __doc__)
        figures = [Figure(key="copy", value=measure(), unit="GB/s", reference=peak, target=0.8)]
        return report("kernels", figures, options.json)
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured figure.

    Attributes:
        key: short name, unique in the benchmark.
        value: what was measured, in `unit`.
        reference: the peer or the bound measured in the same run, in the same unit; None: there is none.
        target: what is asked for: of `value / reference` where there is a reference, else of `value`.
        higher_is_better: whether the target is a floor, or a ceiling.
        reference_name: what the reference is, for the table.
    """

    key: str
    value: float
    unit: str
    reference: float | None = None
    target: float | None = None
    higher_is_better: bool = True
    reference_name: str = ""

    @property
    def ratio(self) -> float | None:
        return self.value / self.reference if self.reference else None

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is no target."""
        if self.target is None:
            return None
        judged = self.value if self.ratio is None else self.ratio
        return judged >= self.target if self.higher_is_better else judged <= self.target


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every benchmark's command line has: `--quick` (ends within a minute) and `--json FILE`."""

    quick: bool
    json: Path | None


def parse_options(name: str, about: str | None, parser: argparse.ArgumentParser | None = None) -> Options:
    """Parse `--quick` and `--json`; a benchmark with options of its own passes a parser that has them."""
    parser = parser or option_parser(name, about)
    parsed = parser.parse_args()
    return Options(quick=parsed.quick, json=parsed.json)


def option_parser(name: str, about: str | None) -> argparse.ArgumentParser:
    """A parser with the common options, to add others to."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repetitions: under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    return parser


def describe_machine() -> dict[str, str | int]:
    """The machine that figures were measured on: processor, cores, memory, GPU and versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line.partition(":") for line in info.read_text().splitlines()]
        found = {key.strip(): value.strip() for key, _, value in lines}
        cpu = found.get("model name", cpu)
        flags = set(found.get("flags", "").split())
        cpu += "".join(f" {flag}" for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
    }


def report(name: str, figures: Sequence[Figure], json_path: Path | None = None) -> int:
    """Print the figures as a table, with the command that repeats it, and write them as JSON.

    Returns:
        An exit status: always 0. A missed target is a result and stands in the table.
    """
    machine = describe_machine()
    table = Table(title=f"benchmarks.{name}")
    for column in ("figure", "value", "unit", "reference", "ratio", "target", "met"):
        table.add_column(column, justify="left" if column in ("figure", "unit") else "right")
    for figure in figures:
        reference = "" if figure.reference is None else f"{_short(figure.reference)} {figure.reference_name}".strip()
        bound = "" if figure.target is None else f"{'>=' if figure.higher_is_better else '<='} {_short(figure.target)}"
        met = {True: "yes", False: "[red]NO[/red]", None: ""}[figure.met]
        ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}"
        table.add_row(figure.key, _short(figure.value), figure.unit, reference, ratio, bound, met)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    console.print("machine: " + ", ".join(f"{key} {value}" for key, value in machine.items()), highlight=False)
    command = shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])
    console.print(f"repeat: {command}", highlight=False)
    if json_path is not None:
        document = {"name": name, "machine": machine, "figures": {f.key: _as_json(f) for f in figures}}
        json_path.write_text(json.dumps(document, indent=2) + "\n")
    return 0


def _short(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.4g}"


def _as_json(figure: Figure) -> dict[str, float | str | bool | None]:
    return {
        "value": figure.value,
        "unit": figure.unit,
        "reference": figure.reference,
        "ratio": figure.ratio,
        "target": figure.target,
        "met": figure.met,
    }
