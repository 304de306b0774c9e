"""What the machine can do, and what a worker makes of `auto`."""

from __future__ import annotations

import os

import torch

from anabranch.config.options import DtypeName, RowExact
from anabranch.errors import ConfigError

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pin_process(cores: tuple[int, ...], threads: int) -> int:
    """Pin this process to `cores` (none: as it is) and set torch's threads (0: one for each core).

    Returns:
        The number of compute threads.

    Raises:
        ConfigError: a core that this process may not use.
    """
    if cores:
        try:
            os.sched_setaffinity(0, cores)
        except OSError:
            allowed = sorted(os.sched_getaffinity(0))
            raise ConfigError(
                "cores", list(cores), f"choose from the CPUs that this process may use: {allowed}"
            ) from None
    count = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(count)
    return count


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device computes bfloat16 faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    with open("/proc/cpuinfo") as info:
        flags = next((line for line in info if line.startswith("flags")), "")
    return "avx512_bf16" in flags or "amx_bf16" in flags


def resolve_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """The dtype that `name` stands for; `auto` takes bfloat16 where it is fast, else float32."""
    if name == "auto":
        return torch.bfloat16 if fast_bfloat16(device) else torch.float32
    return TORCH_DTYPES[name]


def resolve_row_exact(choice: RowExact, dtype: torch.dtype) -> bool:
    """Whether FFN products are row-exact; `auto` has them so where tokens are to be those of one worker: in float32."""
    return dtype is torch.float32 if choice == "auto" else choice == "on"


def resolve_device(name: str) -> torch.device:
    """The device called `name`. Raises ConfigError where it cannot be had."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError("device", name, "must be cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", name, "no CUDA device is visible here; use cpu")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError("device", name, "must be cpu, cuda or cuda:N")
    return device
