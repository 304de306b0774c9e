"""Documents are about what is there: links, paths, floors, indexes, options and variables."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from launch.cli import app

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
DOCS = ROOT / "docs"
# The history names what was there at its time.
HISTORY = (ROOT / "CHANGELOG.md", DOCS / "decisions")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# `folder/file.ext` or `folder/folder` in backticks, of a folder that is ours.
PATH = re.compile(r"`((?:anabranch|anabranch_client|benchmarks|decode|docs|launch|orchestrator|prefill|runtime|scripts|"
                  r"tests|transport)/[\w./-]+)`")  # fmt: skip
OUR_VARIABLE = re.compile(r"\bANABRANCH_[A-Z_]*[A-Z]\b")


def is_history(page: Path) -> bool:
    return any(page == past or past in page.parents for past in HISTORY)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if not is_history(page)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_paths_are_there(page: Path) -> None:
    # Results are named by their pattern, `DATE-NAME.json`.
    paths = [path for path in PATH.findall(page.read_text()) if not path.startswith("benchmarks/results/DATE")]
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_floors_are_those_that_import_linter_holds() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    section = (DOCS / "architecture.md").read_text().partition("## Packages")[2]
    block = re.search(r"^```\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert block is not None
    assert block[1].splitlines() == layers


def test_every_document_is_in_the_index() -> None:
    named = {(DOCS / target).resolve() for target in LINK.findall((DOCS / "README.md").read_text())}
    expected = {page for page in [*DOCS.glob("*.md"), *(DOCS / "how-to").glob("*.md")] if page.name != "README.md"}
    assert expected <= named, f"docs/README.md: {sorted(page.name for page in expected - named)}"


def records() -> Iterator[tuple[Path, str, str, str]]:
    """Each decision record with its number, title and status."""
    for page in sorted((DOCS / "decisions").glob("[0-9]*.md")):
        head = re.match(r"# (\d{4})\. (.+)\n\n\*\*Status:\*\* ((?:Accepted|Superseded by) ?.*\.)\n\n", page.read_text())
        assert head is not None, f"{page.name}: begins with '# NNNN. Title', then '**Status:** Accepted.'"
        yield page, head[1], head[2], head[3]


def test_decisions_have_one_heading_style_and_are_in_their_index() -> None:
    index = (DOCS / "decisions" / "README.md").read_text()
    numbers = []
    for page, number, title, status in records():
        assert page.name.startswith(number)
        assert f"| [{number}]({page.name}) | {title} | {status} |" in index
        numbers.append(int(number))
    assert numbers == list(range(1, len(numbers) + 1))


def test_the_map_of_the_cpp_is_complete() -> None:
    page = (DOCS / "how-to" / "add-a-kernel-set.md").read_text()
    for folder in ("anabranch/kernels/cpu", "transport/collectives/native"):
        for file in sorted((ROOT / folder).iterdir()):
            assert file.suffix not in (".h", ".cpp") or f"`{file.name}`" in page, f"{folder}/{file.name}"


def test_every_option_of_the_command_line_is_described() -> None:
    page = (DOCS / "command-line.md").read_text()
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    for name, command in group.commands.items():
        assert f"`anabranch {name}" in page
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name != "help":
                assert re.search(rf"`{parameter.opts[0]}[ `]", page), f"{name} {parameter.opts[0]}"


def test_every_variable_is_described() -> None:
    page = (DOCS / "command-line.md").read_text()
    folders = ("anabranch", "anabranch_client", "launch", "orchestrator", "prefill", "decode", "runtime", "transport")
    sources = (file.read_text() for folder in folders for file in (ROOT / folder).rglob("*.py"))
    used = {name for text in sources for name in OUR_VARIABLE.findall(text)}
    assert used and all(f"`{name}`" in page for name in used), sorted(used)
