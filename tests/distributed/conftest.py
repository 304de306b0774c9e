"""What tests of several processes share: the fork server, which imports while models are made."""

from __future__ import annotations

import pytest

from launch.process import IMPORTS
from runtime.start import prepare_forks


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> None:
    prepare_forks(IMPORTS)
