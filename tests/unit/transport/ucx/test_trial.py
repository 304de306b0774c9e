"""UCX's shared memory belongs to this user alone, and UCX that does not work is found at the start."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.planes import Recorder, needs_ucx, payload_of
from tests.support.waiting import WAIT_S
from transport.planes.ucx import UcxPlane
from transport.ucx import trial
from transport.ucx.api import HOST_TRANSPORTS, NETWORK_TRANSPORTS

pytestmark = [pytest.mark.unit, needs_ucx]

ROOT = Path(__file__).parents[3]

ASK = """
import json, logging, sys
from anabranch.errors import AnabranchError
from transport.planes import available_planes, configured_planes
logging.basicConfig(stream=sys.stderr)
answers = {"auto": configured_planes("auto", "127.0.0.1")}
for host in ("127.0.0.1", "0.0.0.0"):
    try:
        answers[host] = configured_planes("ucx", host)
    except AnabranchError as error:
        answers[host] = str(error)
print(json.dumps(answers))
"""


def mapped_segments() -> list[str]:
    """Shared memory that this process has mapped now: SysV segments, and files of /dev/shm."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line.split(maxsplit=5)[-1] for line in lines if "/SYSV" in line or "/dev/shm/ucx" in line]


@pytest.mark.parametrize("transports", [HOST_TRANSPORTS, NETWORK_TRANSPORTS])
def test_segments_are_this_users_alone_and_have_no_name(transports: str) -> None:
    names_before = set(os.listdir("/dev/shm"))
    at_a, at_b = Recorder(), Recorder()
    a, b = UcxPlane(at_a, transports=transports), UcxPlane(at_b, transports=transports)
    try:
        link = a.connect(b.address, WAIT_S)
        for num_bytes in (100, 64 << 10, 16 << 20):
            link.send(b"x", payload_of(num_bytes)).result(WAIT_S)
        segments = mapped_segments()
        assert [name for name in segments if "SYSV" in name] == []
        files = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        shared = [path for path in files if os.path.lexists(path) and "/dev/shm/ucx" in os.readlink(path)]
        assert shared
        assert segments
        for path in shared:
            assert os.stat(path).st_mode & 0o777 == 0o600
            assert os.stat(path).st_uid == os.getuid()
        assert set(os.listdir("/dev/shm")) <= names_before
    finally:
        a.close()
        b.close()


@pytest.mark.parametrize("transports", [HOST_TRANSPORTS, NETWORK_TRANSPORTS])
def test_the_trial_passes_where_ucx_works(transports: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    assert trial.failure.__wrapped__(transports) == ""
    assert len(os.listdir("/proc/self/fd")) <= before


def start(command: list[str]) -> subprocess.CompletedProcess[str]:
    """A process without what this one has told UCX in the environment."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("UCX")}
    return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=60, check=True)


def test_a_start_writes_nothing_of_ucx() -> None:
    """UCX warns of the variables that ucxx sets, unless it is told not to before it is loaded."""
    script = "from transport.planes import create_plane; create_plane('ucx', None).close(); print('made')"
    ran = start([sys.executable, "-c", script])
    assert (ran.stdout, ran.stderr) == ("made\n", "")


def can_mount() -> bool:
    command = ["unshare", "-m", "sh", "-c", "mount -t tmpfs -o ro none /dev/shm"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("options", "remedy"),
    [("ro", "/dev/shm is read-only: mount it writable"), ("size=1m", "/dev/shm has less than 16 MiB free")],
)
def test_shared_memory_that_does_not_work_is_found_at_the_start(options: str, remedy: str) -> None:
    if not can_mount():
        pytest.skip("a mount namespace of one's own needs root")
    script = f'mount -t tmpfs -o {options} none /dev/shm && exec "$@"'
    ran = start(["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-c", ASK])
    # UCX writes its own complaints, but not into what programs read.
    answers = json.loads(ran.stdout)
    assert answers["auto"] == ["inproc", "tcp"]
    assert "kv_transport auto passes over ucx: UCX moves nothing over posix,cma,self" in ran.stderr
    assert remedy in ran.stderr
    assert answers["127.0.0.1"].startswith("kv_transport: ucx cannot be used: UCX moves nothing over posix,cma,self")
    assert remedy in answers["127.0.0.1"]
    assert "or set kv_transport: tcp" in answers["127.0.0.1"]
    if options == "ro":
        assert remedy in answers["0.0.0.0"]
    else:  # between hosts UCX has other ways
        assert answers["0.0.0.0"] == ["ucx"]
