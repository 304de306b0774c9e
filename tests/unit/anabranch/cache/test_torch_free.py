"""What schedulers and gateways import must not bring torch in."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit

MODULES = [
    "anabranch.cache.kv_manager",
    "anabranch.cache.lease",
    "anabranch.parallel.reshard",
    "anabranch.sampling.detokenizer",
    "anabranch.sampling.stop",
]


def test_no_torch() -> None:
    code = f"import sys, {', '.join(MODULES)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
