"""`anabranch doctor`: what this machine has, what will be used, and what to do about what is missing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.table import Table

from anabranch import __version__
from anabranch.config.load import usable_cores
from anabranch.model.known import known_models
from anabranch.system.user_cache import cache_folder, cache_problem
from launch.report import reported
from launch.show import bytes_text, out
from launch.terminal_text import said

# Flags that decide which CPU kernels run, fastest first.
_CPU_FLAGS = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx512f", "avx2", "fma", "bf16", "asimd")
_PACKAGES = ("torch", "transformers", "msgspec", "pyzmq", "uvloop", "grpcio", "gguf", "safetensors")
_NVIDIA_SMI_TIMEOUT_S = 10.0
_MIN_FREE_BYTES = 2 << 30
_MIN_SHM_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    Attributes:
        found: what the machine has.
        used: what Anabranch makes of it.
        remedy: what to do about what is missing; empty where all is well.
    """

    name: str
    found: str
    used: str = ""
    remedy: str = ""


@reported
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False) -> None:
    """Show what this machine has and what will be used, with the remedy for what is missing.

    \b
    Examples:
      anabranch doctor
      anabranch doctor --json"""
    findings = examine()
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    table.add_column("what")
    table.add_column("found", overflow="fold")
    table.add_column("will be used", overflow="fold")
    for finding in findings:
        mark = "[yellow]![/yellow]" if finding.remedy else "[green]ok[/green]"
        table.add_row(mark, finding.name, said(finding.found), said(finding.used))
    out.print(table)
    remedies = [finding for finding in findings if finding.remedy]
    if remedies:
        out.print()
    for finding in remedies:
        out.print(f"[yellow]![/yellow] {finding.name}: {said(finding.remedy)}", soft_wrap=True)


def examine() -> list[Finding]:
    """Everything that decides how Anabranch runs here."""
    return [
        _system(),
        _cores(),
        _cpu_flags(),
        _memory(),
        _shared_memory(),
        _cache(),
        _gpus(),
        *_planes(),
        _compiler(),
        *_models(),
        _versions(),
    ]


def _system() -> Finding:
    python = platform.python_version()
    remedy = "" if sys.platform == "linux" else "only Linux is tested; process cleanup and core pinning need it"
    return Finding(name="system", found=f"{platform.system()} {platform.release()}, Python {python}", remedy=remedy)


def _cores() -> Finding:
    total = os.cpu_count() or 1
    usable = usable_cores()
    found = f"{total} CPUs, of which this process may use {len(usable)} ({_ranges(usable)})"
    quota = cpu_quota()
    if quota is not None:
        found += f", with a quota of {quota:g}"
    remedy = ""
    if quota is not None and quota < len(usable):
        remedy = f"set `threads` so that all workers together use at most {max(1, int(quota))}"
    return Finding(name="cores", found=found, used="dealt out evenly to the workers", remedy=remedy)


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """CPUs' worth of time that the control group allows, or None where it does not limit."""
    try:
        limit, period = (root / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        return None


def _cpu_flags() -> Finding:
    flags: set[str] = set()
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags.update(value.split())
                break
            if key.strip() == "model name":
                model = value.strip()
    except OSError:
        pass
    present = [flag for flag in _CPU_FLAGS if flag in flags]
    fast = "avx512_bf16" in flags or "amx_bf16" in flags
    return Finding(
        name="CPU",
        found=f"{model}: {', '.join(present) or 'no vector extensions that matter'}",
        used=f"dtype auto is {'bfloat16' if fast else 'float32'} on the CPU",
    )


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    found = f"{bytes_text(memory.total)}, {bytes_text(memory.available)} free"
    remedy = "" if memory.available >= _MIN_FREE_BYTES else "free some memory, or lower `kv_cache` in the topology"
    return Finding(name="memory", found=found, remedy=remedy)


def _shared_memory() -> Finding:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return Finding(name="shared memory", found="no /dev/shm", remedy="mount a tmpfs at /dev/shm for UCX")
    if not os.access("/dev/shm", os.W_OK | os.X_OK):
        return Finding(name="shared memory", found="/dev/shm cannot be written to", remedy="mount /dev/shm writable")
    remedy = "" if usage.free >= _MIN_SHM_BYTES else "make /dev/shm larger (containers: --shm-size=1g)"
    return Finding(name="shared memory", found=f"{bytes_text(usage.free)} free in /dev/shm", remedy=remedy)


def _cache() -> Finding:
    return Finding(
        name="cache",
        found=str(cache_folder()),
        used="converted models, compiled kernels",
        remedy=cache_problem() or "",
    )


def _gpus() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return Finding(name="GPUs", found=names, used="where a topology says `device: cuda`")
    seen = _nvidia_smi()
    if not seen:
        return Finding(name="GPUs", found="none", used="the CPU")
    built = torch.version.cuda or "none"
    remedy = f"this torch ({torch.__version__}, CUDA {built}) does not see them; install a CUDA build of torch"
    return Finding(name="GPUs", found="; ".join(seen), used="the CPU", remedy=remedy)


def _nvidia_smi() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        ran = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=_NVIDIA_SMI_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in ran.stdout.splitlines() if line.strip()] if ran.returncode == 0 else []


def _planes() -> list[Finding]:
    from transport.planes.registry import available_planes

    findings: list[Finding] = []
    statuses = available_planes()
    best = next((status.name for status in statuses if status.usable and status.name != "inproc"), "tcp")
    for status in statuses:
        used = "kv_transport auto between processes" if status.name == best else ""
        found = status.detail if status.usable else status.reason
        findings.append(Finding(name=f"plane {status.name}", found=found, used=used, remedy=status.remedy))
    return findings


def _compiler() -> Finding:
    from anabranch.kernels.compiler import native_status

    status = native_status()
    found = f"{status.compiler} ({status.version})" if status.compiler else "none"
    if status.usable:
        return Finding(name="compiler", found=found, used=f"compiled CPU kernels: {status.reason}")
    return Finding(name="compiler", found=found, used="PyTorch's operations on the CPU (slower)", remedy=status.reason)


def _models() -> list[Finding]:
    return [
        Finding(
            name=f"model {model.name}",
            found=model.origin if model.available else "not installed",
            remedy="" if model.available else model.remedy,
        )
        for model in known_models()
    ]


def _versions() -> Finding:
    found = [f"anabranch {__version__}"]
    missing: list[str] = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    remedy = f"missing: {', '.join(missing)}; run scripts/setup, or pip install 'anabranch[server]'" if missing else ""
    return Finding(name="versions", found=", ".join(found), remedy=remedy)


def _ranges(cores: tuple[int, ...]) -> str:
    """`(0, 1, 2, 5)` -> `0-2,5`."""
    runs: list[tuple[int, int]] = []
    for core in cores:
        if runs and core == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], core)
        else:
            runs.append((core, core))
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
