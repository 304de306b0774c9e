"""Part `link` of `benchmarks.afd`: where splitting loses, over batch, context, experts and the way between the halves.

One attention and one FFN process on a core each, two lanes, against two processes with whole layers on a core each and
half of the batch: that is the most that splitting could reach there. Models are random, of SmolLM2-135M's layers, 12 of
them, with a small vocabulary: dense, and with 8 experts of a third of the features, of which each token chooses 2. The
ways are shared memory, and TCP through `shaped_link`, which takes CPU time of the same cores.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.afd_lanes import OF_COLOCATED, whole_s
from benchmarks.afd_process import Side, kv_bytes
from benchmarks.chart import Series, line_chart
from benchmarks.report import Figure
from benchmarks.shaped_link import Shape, shaped

NUM_LAYERS, VOCAB = 12, 4096
LANES = 2
SHM = "shm"
# By their names, with what latency stands for them in the picture, in microseconds.
LINKS = (
    Shape(name="50us_25Gbit", latency_s=50e-6, bytes_per_s=25e9 / 8),
    Shape(name="500us_10Gbit", latency_s=500e-6, bytes_per_s=10e9 / 8),
    Shape(name="5ms_1Gbit", latency_s=5e-3, bytes_per_s=1e9 / 8),
)
SHM_US = 8.0
COLOURS = ("#0969da", "#cf222e", "#1a7f37", "#8250df", "#bf8700", "#57606a")


def link_figures(dtype: str, cores: Sequence[int], *, quick: bool) -> tuple[list[Figure], str]:
    """The table's figures, and a picture of its shortest context."""
    steps = 3 if quick else 6
    batches, contexts, experts = ((4, 64), (128,), (1,)) if quick else ((4, 16, 64), (64, 512), (1, 8))
    figures: list[Figure] = []
    lines: dict[tuple[int, int], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in experts:
            model = str(save_model(Path(folder) / str(count), count))
            cells = list(itertools.product(batches, contexts))
            whole = _whole(model, dtype, cores, cells, steps)
            for name, latency_us, split in _split(model, dtype, cores, cells, steps):
                for (batch, context), step_s in split.items():
                    figure = Figure(
                        key=f"e{count}_b{batch}_c{context}_{name}",
                        value=batch / step_s,
                        unit="tokens/s",
                        reference=batch / whole[batch, context],
                        reference_name="whole",
                        target=OF_COLOCATED,
                    )
                    figures.append(figure)
                    if context == contexts[0]:
                        lines.setdefault((count, batch), []).append((latency_us, figure.ratio or 0.0))
    return figures, _picture(lines, contexts[0])


def _whole(
    model: str, dtype: str, cores: Sequence[int], cells: Sequence[tuple[int, int]], steps: int
) -> dict[tuple[int, int], float]:
    """Seconds of a step of two processes with whole layers."""
    pool_bytes = max(kv_bytes(-(-batch // 2), context, dtype, num_layers=NUM_LAYERS) for batch, context in cells)
    with (
        Side("whole", model=model, cores=cores[:1], dtype=dtype, kv_bytes=pool_bytes) as first,
        Side("whole", model=model, cores=cores[1:], dtype=dtype, kv_bytes=pool_bytes) as second,
    ):
        return {
            (batch, context): whole_s([first, second], batch=batch, context=context, steps=steps)
            for batch, context in cells
        }


def _split(
    model: str, dtype: str, cores: Sequence[int], cells: Sequence[tuple[int, int]], steps: int
) -> list[tuple[str, float, dict[tuple[int, int], float]]]:
    """For each way its name, what it is drawn at, and the seconds of a step."""
    pool_bytes = max(kv_bytes(batch, context, dtype, num_layers=NUM_LAYERS) for batch, context in cells)
    found: list[tuple[str, float, dict[tuple[int, int], float]]] = []
    with (
        Side("attn", model=model, cores=cores[:1], dtype=dtype, kv_bytes=pool_bytes) as attention,
        Side("ffn", model=model, cores=cores[1:], dtype=dtype) as ffn,
    ):
        for shape in (None, *LINKS):
            with ExitStack() as stack:
                node = ffn.ready
                if shape is not None:
                    address = stack.enter_context(shaped(node["addresses"]["tcp"], shape))
                    node = {**node, "addresses": {"tcp": address}}
                attention.link(node, lanes=LANES, transport="tcp" if shape else SHM)
                taken = {
                    (batch, context): attention.decode(
                        "remote", batch=batch, context=context, lanes=LANES, steps=steps
                    )["wall_s"]
                    / steps
                    for batch, context in cells
                }
                found.append((shape.name if shape else SHM, shape.latency_s * 1e6 if shape else SHM_US, taken))
    return found


def _picture(lines: dict[tuple[int, int], list[tuple[float, float]]], context: int) -> str:
    series = [
        Series(
            name=f"batch {batch}, {f'{count} experts' if count > 1 else 'dense'}",
            colour=COLOURS[place % len(COLOURS)],
            points=points,
            dashed=count > 1,
        )
        for place, ((count, batch), points) in enumerate(lines.items())
    ]
    ends = (SHM_US, LINKS[-1].latency_s * 1e6)
    series.append(Series(name="loses below", colour="#d0d7de", points=[(x, OF_COLOCATED) for x in ends], dashed=True))
    return line_chart(
        series,
        title=f"1 + 1 processes against 2 with whole layers, context {context}",
        x_label=f"latency one way in microseconds ({SHM_US:.0f}: shared memory)",
        y_label="tokens/s of whole layers",
    )


def save_model(folder: Path, num_experts: int) -> Path:
    """Write a random model of SmolLM2-135M's layers; with experts a Mixtral. Returns the folder."""
    import torch
    import transformers

    torch.manual_seed(1)
    common = {
        "vocab_size": VOCAB,
        "hidden_size": 576,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
    model: transformers.PreTrainedModel
    if num_experts == 1:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=1536, **common))
    else:
        config = transformers.MixtralConfig(
            intermediate_size=512, num_local_experts=num_experts, num_experts_per_tok=2, sliding_window=None, **common
        )
        model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(folder)
    return folder
