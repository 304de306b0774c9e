"""`anabranch generate`: one prompt, its answer as it comes, and where the time went."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Annotated

import typer
from rich.console import Console

from anabranch_client import (
    ChatMessage,
    Client,
    Completion,
    ContextExceeded,
    Finished,
    Prompt,
    Sampling,
    Tokens,
    Unavailable,
)
from anabranch_client.convert import Gather
from launch.cluster_record import running_clusters
from launch.numbers import MAX_INT, seconds, within
from launch.report import EXIT_USAGE, fail, reported
from launch.show import breakdown_table, err
from launch.terminal_text import visible

DEFAULT_MAX_TOKENS = 256
# The gateway takes messages of 4 MiB unless it is told otherwise.
MAX_STDIN_BYTES = 64 << 20


@reported
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; `-` reads it from standard input.")] = None,
    prompt_ids: Annotated[
        str | None, typer.Option(metavar="IDS", help="Token ids instead of text, such as 1,2,3.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message; implies --chat.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            callback=within(1, MAX_INT),
            help=f"Most tokens to generate; default: {DEFAULT_MAX_TOKENS}, or what the context has room for.",
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(metavar="T", callback=within(0, 100), help="0 is greedy.")] = 0.0,
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="P", callback=within(0, 1, or_least=False), help="Keep the likeliest tokens that reach P."
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(metavar="K", callback=within(0, MAX_INT), help="Keep the K likeliest tokens; 0: all.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="S", callback=within(0, MAX_INT), help="Makes sampling repeat.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Ends the answer; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end-of-sequence token.")] = False,
    cache_salt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Share cached prompts with requests of this salt alone.")
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", envvar="ANABRANCH_ENDPOINT", help="The gateway; default: a running `up`."),
    ] = None,
    timeout: Annotated[
        float, typer.Option(metavar="S", callback=seconds(), help="Deadline of the whole answer, seconds.")
    ] = 600.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
) -> None:
    """Ask the running cluster, and print the answer as it comes.

    The answer goes to standard output.
    The breakdown (route, prefill, KV stream, tokens/s) goes to standard error.

    \b
    Examples:
      anabranch generate "The capital of France is" --max-tokens 8
      anabranch generate --chat "Why is the sky blue?"
      anabranch generate --prompt-ids 504,3575,282 --ignore-eos --max-tokens 32 --json
      git diff | anabranch generate --chat - --system "Summarise this change in one line." """
    content = _prompt(prompt, prompt_ids, chat, system)
    sampling = Sampling(
        max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    with Client(endpoint or find_endpoint()) as client:

        def answer(sampling: Sampling) -> None:
            if as_json:
                completion = client.complete(content, sampling, cache_salt=cache_salt, timeout_s=timeout)
                print(json.dumps(completion_json(completion)))
            else:
                stream_answer(client, content, sampling, timeout, cache_salt=cache_salt)

        try:
            try:
                answer(sampling)
            except ContextExceeded:
                if max_tokens is not None:
                    raise
                # There is room for fewer than the default, so that no limit means no more than those.
                answer(dataclasses.replace(sampling, max_tokens=None))
        except Unavailable as error:
            if error.code == "unavailable":  # gRPC's own word: nobody was there to give one of ours
                fail(f"no cluster answers at {client.endpoint}; start one with `anabranch up`, or mend --endpoint")
            raise


def find_endpoint() -> str:
    """The latest cluster that `anabranch up` started here; ends the command where there is none."""
    clusters = running_clusters()
    if not clusters:
        fail("no cluster is running here; start one with `anabranch up`, or name one with --endpoint HOST:PORT")
    return clusters[0].grpc


def stream_answer(
    client: Client,
    prompt: Prompt,
    sampling: Sampling,
    timeout_s: float,
    console: Console = err,
    *,
    cache_salt: str | None = None,
) -> Completion:
    """Write the answer's text to stdout as it comes, then the breakdown to `console`.

    A terminal gets control characters in print, so that it obeys none; a file or pipe gets the text as it is.
    """
    gather = Gather()
    shown = visible if sys.stdout.isatty() else str
    with client.generate(prompt, sampling, cache_salt=cache_salt, timeout_s=timeout_s) as stream:
        for event in stream:
            gather.add(event)
            if isinstance(event, Tokens):
                sys.stdout.write(shown(event.text))
                sys.stdout.flush()
            elif isinstance(event, Finished):
                sys.stdout.write("\n")
                sys.stdout.flush()
    completion = gather.completion()
    console.print()
    console.print(breakdown_table(completion))
    return completion


def completion_json(completion: Completion) -> dict[str, object]:
    """The object that `--json` prints."""
    return {
        "request_id": completion.request_id,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "usage": dataclasses.asdict(completion.usage),
        "timings": dataclasses.asdict(completion.timings) if completion.timings is not None else None,
        "route": list(completion.route),
        "num_recoveries": completion.num_recoveries,
        "routes": [dataclasses.asdict(route) for route in completion.routes],
        "kv": dataclasses.asdict(completion.kv) if completion.kv is not None else None,
        "ffn": dataclasses.asdict(completion.ffn) if completion.ffn is not None else None,
    }


def _prompt(text: str | None, ids: str | None, chat: bool, system: str | None) -> Prompt:
    if (text is None) == (ids is None):
        fail("give either a PROMPT or --prompt-ids; see `anabranch generate --help`", EXIT_USAGE)
    if ids is not None:
        if chat or system is not None:
            fail("--chat and --system need a text prompt; leave out --prompt-ids", EXIT_USAGE)
        try:
            return [int(part) for part in ids.replace(" ", "").split(",") if part]
        except ValueError:
            fail(f"--prompt-ids: {ids[:80]!r}: give whole numbers separated by commas, such as 1,2,3", EXIT_USAGE)
    assert text is not None
    if text == "-":
        text = _standard_input()
    if not chat and system is None:
        return text
    turns = [ChatMessage("system", system)] if system is not None else []
    return [*turns, ChatMessage("user", text)]


def _standard_input() -> str:
    """The prompt that is piped in, byte for byte."""
    try:
        data = sys.stdin.buffer.read(MAX_STDIN_BYTES + 1)
    except OSError as error:
        fail(f"standard input cannot be read ({error.strerror}); pipe the prompt in, or give it as PROMPT")
    if len(data) > MAX_STDIN_BYTES:
        fail(f"standard input has more than {MAX_STDIN_BYTES} bytes; give a shorter prompt", EXIT_USAGE)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        fail(f"standard input is not UTF-8 text (byte {error.start}); convert it, for instance with iconv", EXIT_USAGE)
