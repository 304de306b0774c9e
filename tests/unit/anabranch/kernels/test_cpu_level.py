"""A lower level of CPU can be forced, by its name alone, and never a higher one than the machine has."""

from __future__ import annotations

import pytest
import torch

from anabranch.errors import ConfigError
from anabranch.kernels.cpu_level import LEVELS, VARIABLE, check_reached, forced_level
from anabranch.kernels.native import select_kernels

pytestmark = pytest.mark.unit


def test_nothing_is_forced_where_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert forced_level() is None
    monkeypatch.setenv(VARIABLE, "")
    assert forced_level() is None


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: str(level.name))
def test_each_level_has_a_name(monkeypatch: pytest.MonkeyPatch, level: object) -> None:
    monkeypatch.setenv(VARIABLE, getattr(level, "name", ""))
    assert forced_level() is level


@pytest.mark.parametrize("name", ["AVX2", "sse", "1", "x" * 1000])
def test_an_unknown_level_is_refused_by_whoever_builds(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(VARIABLE, name)
    with pytest.raises(ConfigError, match=f"^{VARIABLE}: .*must be one of portable, avx2, avx512, avx512-bf16, amx"):
        select_kernels(torch.device("cpu"), torch.float32)


def test_a_level_that_the_cpu_has_not_is_refused() -> None:
    portable, avx2, avx512, *_ = LEVELS
    check_reached(portable, avx2)
    check_reached(avx2, avx2)
    with pytest.raises(ConfigError, match=f"^{VARIABLE}: 'avx512': is more than this CPU has, which is avx2"):
        check_reached(avx512, avx2)
