"""`anabranch verify`: a topology and transformers on the same prompts, token by token."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from anabranch.config.load import load_topology
from anabranch.config.topology import Topology
from anabranch.errors import ConfigError
from anabranch.model.sources import resolve_model
from anabranch_client import Client, ClientError, Completion, Sampling
from launch.cluster import READY_TIMEOUT_S, LocalCluster
from launch.mesh_option import with_meshes
from launch.numbers import MAX_INT, seconds, within
from launch.prompts import VerifyPrompt, default_prompts, read_prompts
from launch.report import EXIT_FAILED, interrupt_on_signals, reported
from launch.show import err, out
from launch.terminal_text import said

if TYPE_CHECKING:
    from launch.reference import Reference, ReferenceAnswer

Mode = Literal["together", "alone"]
DEFAULT_MAX_TOKENS = 64
MAX_TOGETHER = 64
ANSWER_TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Where an answer first leaves the reference.

    Attributes:
        mode: whether the prompt ran together with the others, or alone.
        index: of the first token that differs; -1 where the request failed or the prompt's ids differ.
        expected_token, got_token: None: the answer ended there.
        margin: the reference's logit of its token minus the second best's; near 0 means a tie.
        error: what the cluster answered instead.
    """

    prompt: str
    mode: Mode
    index: int
    expected_token: int | None = None
    got_token: int | None = None
    expected_text: str = ""
    got_text: str = ""
    margin: float | None = None
    route: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was compared, and what differed, in the order found."""

    model: str
    dtype: str
    num_prompts: int
    num_tokens: int
    transports: tuple[str, ...]
    differences: tuple[Difference, ...]

    @property
    def ok(self) -> bool:
        return not self.differences


@reported
def verify(
    topology_file: Annotated[Path, typer.Argument(metavar="TOPOLOGY.yaml", help="The topology to verify.")],
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="One prompt a line: text, or JSON with `text` or `token_ids`."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            callback=within(1, MAX_INT),
            help=f"Tokens to compare for each prompt; default: {DEFAULT_MAX_TOKENS}, or half of a smaller context.",
        ),
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end-of-sequence token.")] = False,
    ready_timeout: Annotated[
        float, typer.Option(metavar="S", callback=seconds(), help="Wait for the cluster, seconds.")
    ] = READY_TIMEOUT_S,
    mesh: Annotated[
        list[str] | None,
        typer.Option(metavar="TPxCP:TPxCP", help="Meshes of the topology's pools in place of its own, in order."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Echo the logs of all processes.")] = False,
) -> None:
    """Check that a topology gives the same tokens as transformers, greedy.

    Starts the topology, runs all prompts at once and then one by one, and
    compares each answer with what transformers computes from the same weights.
    `dtype: auto` is verified in float32.
    `--mesh` may be given many times: the topology is verified with each in turn,
    against answers that transformers computes once.
    Of attn and ffn pools it says attnTPxCP+ffnN, N FFN workers; attnM*TPxCP
    for M attention workers, /L behind it for L lanes, and ffnNxTP for FFN
    workers of several ranks.
    Ends with exit code 1 and the first difference where there is one.

    \b
    Examples:
      anabranch verify cluster.yaml
      anabranch verify cluster.yaml --prompts prompts.txt --max-tokens 128 --json
      anabranch verify cluster.yaml --mesh 2x1:1x3 --mesh 1x2:4x1
      anabranch verify apart.yaml --mesh 2x1:attn2x1+ffn3 --mesh 1x1:attn2*1x2/4+ffn3x2"""
    topology = load_topology(topology_file)
    topologies = {text: with_meshes(topology, text) for text in mesh} if mesh else {"": topology}
    interrupt_on_signals()
    verifier = Verifier(
        prompts_file=prompts,
        max_tokens=max_tokens,
        ignore_eos=ignore_eos,
        ready_timeout_s=ready_timeout,
        verbose=verbose,
        say=lambda text: err.print(f"[dim]{said(text)}[/dim]"),
    )
    reports = {}
    for text, variant in topologies.items():
        reports[text] = verifier.verify(variant)
        if not as_json:
            if text:
                out.print(f"[bold]{said(text)}[/bold] ", end="")
            print_report(reports[text])
    ok = all(report.ok for report in reports.values())
    if as_json:
        by_mesh = {text: {"ok": report.ok, **asdict(report)} for text, report in reports.items()}
        print(json.dumps({"ok": ok, "meshes": by_mesh} if mesh else by_mesh[""]))
    if not ok:
        raise typer.Exit(EXIT_FAILED)


class Verifier:
    """Runs topologies of one model and the reference on the same prompts and compares.

    The reference computes each answer once, however many topologies are compared with it.
    """

    def __init__(
        self,
        *,
        prompts_file: Path | None = None,
        max_tokens: int | None = None,
        ignore_eos: bool = False,
        ready_timeout_s: float = READY_TIMEOUT_S,
        verbose: bool = False,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._prompts_file = prompts_file
        self._max_tokens = max_tokens
        self._ignore_eos = ignore_eos
        self._ready_timeout_s = ready_timeout_s
        self._verbose = verbose
        self._say = say
        self._reference: Reference | None = None
        self._answers: dict[tuple[tuple[int, ...], int], ReferenceAnswer] = {}

    def verify(self, topology: Topology) -> VerifyReport:
        """Start a topology and compare it.

        Raises:
            ConfigError: the prompts make no sense for the model.
            AnabranchError: the cluster could not be started.
        """
        if topology.dtype == "auto":
            topology = replace(topology, dtype="float32")
        say = self._say
        say(f"starting {topology.model} in {topology.dtype} ...")
        with LocalCluster(topology, ready_timeout_s=self._ready_timeout_s, verbose=self._verbose) as cluster:
            reference = self._load(topology)
            with Client(cluster.endpoint, timeout_s=ANSWER_TIMEOUT_S) as client:
                max_context = min(client.model().max_context, reference.max_context)
                max_tokens = self._max_tokens or min(DEFAULT_MAX_TOKENS, max(1, max_context // 2))
                chosen = self._choose(reference, max_context - max_tokens)
                expected = [self._answer(reference, prompt, max_tokens) for prompt in chosen]
                comparison = Comparison(client, reference, chosen, expected, max_tokens, self._ignore_eos)
                say("all at once ...")
                comparison.run("together")
                say("one by one ...")
                comparison.run("alone")
        return VerifyReport(
            model=topology.model,
            dtype=topology.dtype,
            num_prompts=len(chosen),
            num_tokens=comparison.num_tokens,
            transports=tuple(sorted(comparison.transports)),
            differences=tuple(comparison.differences),
        )

    def _load(self, topology: Topology) -> Reference:
        if self._reference is None:
            from launch.reference import Reference

            self._say("loading the reference into transformers ...")
            self._reference = Reference(resolve_model(topology.model), topology.dtype)
        return self._reference

    def _choose(self, reference: Reference, max_prompt_tokens: int) -> list[VerifyPrompt]:
        if max_prompt_tokens < 1:
            raise ConfigError(
                "--max-tokens", self._max_tokens, "leaves no room for a prompt in the context; give fewer"
            )
        chosen = (
            read_prompts(self._prompts_file, reference)
            if self._prompts_file is not None
            else default_prompts(reference, reference.vocab_size, max_prompt_tokens)
        )
        check_prompts(chosen, reference.vocab_size, max_prompt_tokens)
        return chosen

    def _answer(self, reference: Reference, prompt: VerifyPrompt, max_tokens: int) -> ReferenceAnswer:
        answer = self._answers.get((prompt.token_ids, max_tokens))
        if answer is None:
            answer = reference.generate(prompt.token_ids, max_tokens, ignore_eos=self._ignore_eos)
            self._answers[prompt.token_ids, max_tokens] = answer
            self._say(f"  reference, {prompt.name}: {len(prompt.token_ids)} + {len(answer.token_ids)} tokens")
        return answer


class Comparison:
    """Sends prompts and keeps what differs."""

    def __init__(
        self,
        client: Client,
        reference: Reference,
        prompts: Sequence[VerifyPrompt],
        expected: Sequence[ReferenceAnswer],
        max_tokens: int,
        ignore_eos: bool,
    ) -> None:
        self._client = client
        self._reference = reference
        self._prompts = prompts
        self._expected = expected
        self._sampling = Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=ignore_eos)
        self.differences: list[Difference] = []
        self.transports: set[str] = set()
        self.num_tokens = 0

    def run(self, mode: Mode) -> None:
        """Run all prompts, together or one after the other, and compare them."""
        with ThreadPoolExecutor(MAX_TOGETHER if mode == "together" else 1) as pool:
            answers = list(pool.map(self._ask, self._prompts))
        for prompt, expected, answer in zip(self._prompts, self._expected, answers, strict=True):
            difference = self._compare(prompt, expected, answer, mode)
            if difference is not None:
                self.differences.append(difference)

    def _ask(self, prompt: VerifyPrompt) -> Completion | ClientError:
        try:
            if prompt.text is not None:
                ids = self._client.tokenize(prompt.text)
                if ids != prompt.token_ids:
                    return ClientError(f"tokenizes to {ids[:8]}..., not {prompt.token_ids[:8]}...", code="tokenizer")
            return self._client.complete(prompt.token_ids, self._sampling)
        except ClientError as error:
            return error

    def _compare(
        self, prompt: VerifyPrompt, expected: ReferenceAnswer, answer: Completion | ClientError, mode: Mode
    ) -> Difference | None:
        if isinstance(answer, ClientError):
            return Difference(prompt=prompt.name, mode=mode, index=-1, error=f"{answer.code}: {answer}")
        if answer.kv is not None:
            self.transports.add(answer.kv.transport)
        want = expected.token_ids
        got = answer.token_ids
        if expected.finish_reason == "stop" and answer.finish_reason == "stop" and got == want[:-1]:
            want = want[:-1]  # the end-of-sequence token need not be delivered
        self.num_tokens += len(want)
        index = first_difference(want, got)
        if index is None:
            return None
        return Difference(
            prompt=prompt.name,
            mode=mode,
            index=index,
            expected_token=want[index] if index < len(want) else None,
            got_token=got[index] if index < len(got) else None,
            expected_text=self._reference.decode(want),
            got_text=self._reference.decode(got),
            margin=expected.margins[index] if index < len(expected.margins) else None,
            route=answer.route,
        )


def first_difference(want: Sequence[int], got: Sequence[int]) -> int | None:
    """The first index at which two sequences differ, their ends included; None where they are equal."""
    for index, (a, b) in enumerate(zip(want, got, strict=False)):
        if a != b:
            return index
    return None if len(want) == len(got) else min(len(want), len(got))


def check_prompts(prompts: Sequence[VerifyPrompt], vocab_size: int, max_prompt_tokens: int) -> None:
    """Refuse prompts that the reference cannot compute. Raises ConfigError."""
    for prompt in prompts:
        if not 1 <= len(prompt.token_ids) <= max_prompt_tokens:
            raise ConfigError(
                f"--prompts {prompt.name}", len(prompt.token_ids), f"give a prompt of 1 to {max_prompt_tokens} tokens"
            )
        for token in prompt.token_ids:
            if not 0 <= token < vocab_size:
                raise ConfigError(f"--prompts {prompt.name}", token, f"give token ids from 0 to {vocab_size - 1}")


def print_report(report: VerifyReport) -> None:
    """The verdict for people: a line, or the first difference in full."""
    over = f", KV over {', '.join(report.transports)}" if report.transports else ""
    if report.ok:
        out.print(
            f"[bold green]equal[/bold green]: {report.num_prompts} prompts, together and alone, "
            f"{report.num_tokens} tokens as in transformers ({said(report.model)}, {report.dtype}{said(over)})"
        )
        return
    first = report.differences[0]
    out.print(
        f"[bold red]different[/bold red]: {len(report.differences)} answers; the first ({report.dtype}{said(over)}):"
    )
    out.print(f"  prompt    {said(first.prompt)}, run {first.mode}, route {said(' -> '.join(first.route)) or '?'}")
    if first.error:
        out.print(f"  error     {said(first.error)}", soft_wrap=True)
        return
    out.print(f"  index     {first.index}" + (f" (margin {first.margin:.2g})" if first.margin is not None else ""))
    out.print(f"  expected  {first.expected_token}")
    out.print(f"  got       {first.got_token}")
    out.print(f"  expected  {said(repr(first.expected_text))}", soft_wrap=True)
    out.print(f"  got       {said(repr(first.got_text))}", soft_wrap=True)
