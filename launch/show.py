"""What the commands print for people: the process table, the breakdown of an answer, errors in one line."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from anabranch_client import Completion
from launch.process_table import ProcessInfo
from launch.terminal_text import said

# People's words go to stderr, so that stdout holds the answer alone.
err = Console(stderr=True, highlight=False, emoji=False)
out = Console(highlight=False, emoji=False)


def bytes_text(num_bytes: float) -> str:
    """`1536` -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError


def seconds_text(seconds: float) -> str:
    """`0.01234` -> `12.3 ms`."""
    return f"{seconds:.2f} s" if seconds >= 1.0 else f"{seconds * 1e3:.1f} ms"


def process_table(processes: Sequence[ProcessInfo]) -> Table:
    """Processes of a cluster."""
    table = Table(title=None, box=None, header_style="bold", pad_edge=False)
    table.add_column("process")
    table.add_column("role")
    table.add_column("pid", justify="right")
    table.add_column("threads", justify="right")
    table.add_column("cores")
    table.add_column("state")
    for process in processes:
        table.add_row(
            said(process.name),
            said(process.role),
            str(process.pid),
            str(process.num_threads or ""),
            ",".join(map(str, process.cores)) or "any",
            "running" if process.alive else "[red]ended[/red]",
        )
    return table


def breakdown_table(completion: Completion) -> Table:
    """Where the time of one answer went."""
    usage, timings, kv, ffn = completion.usage, completion.timings, completion.kv, completion.ffn
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    table.add_row("route", said(" -> ".join(completion.route)))
    for number, route in enumerate(completion.routes[:-1]):
        brought = f"{route.num_tokens} token{'s' * (route.num_tokens != 1)}, then {route.left}"
        table.add_row("" if number else "before", said(f"{' -> '.join(route.workers)}: {brought}"))
    cached = f", {usage.num_cached_tokens} from the prefix cache" if usage.num_cached_tokens else ""
    table.add_row("tokens", f"{usage.num_prompt_tokens} in{cached}, {usage.num_output_tokens} out")
    if timings is not None:
        table.add_row("queue", seconds_text(timings.queue_s))
        num_new = usage.num_prompt_tokens - usage.num_cached_tokens
        rate = f" ({num_new / timings.prefill_s:.0f} tokens/s)" if timings.prefill_s > 0 else ""
        table.add_row("prefill", seconds_text(timings.prefill_s) + rate)
    if kv is not None:
        took = seconds_text(timings.kv_stream_s) if timings is not None else ""
        what = f"{bytes_text(kv.bytes)} over {kv.transport}, {kv.overlap:.0%} hidden by prefill"
        table.add_row("KV stream", said(f"{took}, {what}"))
    if timings is not None:
        table.add_row("first token", seconds_text(timings.ttft_s))
        if timings.tpot_s > 0:
            table.add_row("each token", f"{seconds_text(timings.tpot_s)} ({1 / timings.tpot_s:.1f} tokens/s)")
    if completion.num_recoveries:
        took = f", {seconds_text(timings.recovery_s)} until tokens came again" if timings is not None else ""
        table.add_row("recoveries", f"{completion.num_recoveries}{took}")
    if ffn is not None:
        waits = (("queue", ffn.queue_s), ("computing", ffn.compute_s), ("on the way", ffn.way_s))
        times = ", ".join(f"{seconds_text(seconds)} {what}" for what, seconds in waits)
        table.add_row("FFN workers", f"{times}; {ffn.rows_per_product:.1f} rows a product")
    if timings is not None:
        table.add_row("whole answer", seconds_text(timings.e2e_s))
    return table
