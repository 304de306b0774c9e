"""What `verify` finds and how it says it, with a cluster and a reference that give what the test wants."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from click.testing import Result
from typer.testing import CliRunner

import launch.verify
from anabranch.config.topology import Topology
from anabranch.errors import ConfigError
from anabranch_client import Client, ClientError, Completion, KvTransfer, Sampling, ServerFailed, Usage
from anabranch_client.types import FinishReason
from launch.cli import app
from launch.prompts import VerifyPrompt
from launch.reference import Reference, ReferenceAnswer
from launch.verify import Comparison, Difference, Verifier, VerifyReport, check_prompts

pytestmark = pytest.mark.unit

DIFFERENCE = Difference(
    prompt="b", mode="together", index=1, expected_token=21, got_token=99, expected_text="x", got_text="y"
)
PROMPTS = [VerifyPrompt(name="a", token_ids=(1,)), VerifyPrompt(name="b", token_ids=(2,), text="two")]


class Cluster:
    """Answers each prompt with the given tokens, or raises."""

    def __init__(self, answers: dict[int, tuple[int, ...] | ClientError], finish_reason: FinishReason = "length"):
        self.answers = answers
        self.finish_reason: FinishReason = finish_reason

    def tokenize(self, text: str) -> tuple[int, ...]:
        return (2,)

    def complete(self, prompt: tuple[int, ...], sampling: Sampling) -> Completion:
        answer = self.answers[prompt[0]]
        if isinstance(answer, ClientError):
            raise answer
        return Completion(
            request_id="r",
            text="",
            token_ids=answer,
            logprobs=(),
            finish_reason=self.finish_reason,
            usage=Usage(num_prompt_tokens=1, num_output_tokens=len(answer), num_cached_tokens=0),
            route=("prefill-0", "decode-0"),
            timings=None,
            kv=KvTransfer(bytes=1, transport="tcp", overlap=1.0),
        )


class Texts:
    def decode(self, token_ids: tuple[int, ...]) -> str:
        return "-".join(map(str, token_ids))


def compared(cluster: Cluster, reason: FinishReason = "length") -> Comparison:
    expected = [
        ReferenceAnswer(token_ids=(10, 11, 12), margins=(1.0, 0.5, 0.25), finish_reason=reason),
        ReferenceAnswer(token_ids=(20, 21, 22), margins=(1.0, 0.5, 0.25), finish_reason=reason),
    ]
    comparison = Comparison(cast(Client, cluster), cast(Reference, Texts()), PROMPTS, expected, 3, False)
    comparison.run("together")
    comparison.run("alone")
    return comparison


def test_equal_answers() -> None:
    comparison = compared(Cluster({1: (10, 11, 12), 2: (20, 21, 22)}))
    assert comparison.differences == []
    assert comparison.num_tokens == 12
    assert comparison.transports == {"tcp"}


def test_the_first_token_that_differs() -> None:
    comparison = compared(Cluster({1: (10, 11, 12), 2: (20, 99, 22)}))
    first, second = comparison.differences
    assert first == Difference(
        prompt="b",
        mode="together",
        index=1,
        expected_token=21,
        got_token=99,
        expected_text="20-21-22",
        got_text="20-99-22",
        margin=0.5,
        route=("prefill-0", "decode-0"),
    )
    assert second.mode == "alone"


def test_an_answer_that_ends_early_differs() -> None:
    (first, _) = compared(Cluster({1: (10, 11), 2: (20, 21, 22)})).differences
    assert (first.index, first.expected_token, first.got_token) == (2, 12, None)


def test_a_stopped_answer_need_not_deliver_its_last_token() -> None:
    assert compared(Cluster({1: (10, 11), 2: (20, 21)}, "stop"), "stop").differences == []
    assert compared(Cluster({1: (10, 11, 12), 2: (20, 21, 22)}, "stop"), "stop").differences == []


def test_a_failed_request_differs() -> None:
    (first, _) = compared(Cluster({1: (10, 11, 12), 2: ServerFailed("broken", code="internal")})).differences
    assert (first.prompt, first.index, first.error) == ("b", -1, "internal: broken")


def test_prompts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="give a prompt of 1 to 3 tokens"):
        check_prompts([VerifyPrompt(name="a", token_ids=(1, 2, 3, 4))], 10, 3)
    with pytest.raises(ConfigError, match="give token ids from 0 to 9"):
        check_prompts([VerifyPrompt(name="a", token_ids=(10,))], 10, 3)


def report(*differences: Difference) -> VerifyReport:
    return VerifyReport(
        model="m", dtype="float32", num_prompts=2, num_tokens=12, transports=("tcp",), differences=differences
    )


def verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: Callable[[Topology], VerifyReport], *options: str
) -> Result:
    """What `anabranch verify` says of a topology."""
    monkeypatch.setattr(Verifier, "verify", lambda _, topology: found(topology))
    monkeypatch.setattr(launch.verify, "interrupt_on_signals", lambda: None)
    topology = tmp_path / "topology.yaml"
    topology.write_text("pools: {prefill: {}, decode: {}}")
    return CliRunner().invoke(app, ["verify", str(topology), *options])


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("equal", [True, False])
def test_the_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool, equal: bool) -> None:
    found = report() if equal else report(DIFFERENCE)
    result = verdict(tmp_path, monkeypatch, lambda _: found, *(["--json"] if as_json else []))
    assert result.exit_code == (0 if equal else 1)
    if as_json:
        parsed = json.loads(result.stdout)
        assert parsed["ok"] is equal
        assert [d["index"] for d in parsed["differences"]] == ([] if equal else [1])
    elif equal:
        assert "equal: 2 prompts, together and alone, 12 tokens" in result.stdout
    else:
        assert "different: 1 answers; the first" in result.stdout
        assert "expected  21" in result.stdout
        assert "got       99" in result.stdout


def test_the_verdict_of_each_mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(topology: Topology) -> VerifyReport:
        assert topology.pools.decode is not None
        return report(DIFFERENCE) if topology.pools.decode.cp == 3 else report()

    meshes = ("--mesh", "2x1:1x1", "--mesh", "1x2:1x3")
    told = verdict(tmp_path, monkeypatch, found, *meshes)
    assert told.exit_code == 1
    assert "2x1:1x1 equal" in told.stdout
    assert "1x2:1x3 different" in told.stdout
    parsed = json.loads(verdict(tmp_path, monkeypatch, found, *meshes, "--json").stdout)
    assert parsed["ok"] is False
    assert {text: each["ok"] for text, each in parsed["meshes"].items()} == {"2x1:1x1": True, "1x2:1x3": False}
    assert verdict(tmp_path, monkeypatch, found, "--mesh", "2x1").exit_code == 2
