"""Attention and FFN apart: what lanes hide, how it compares with whole layers on the same cores, and where it wins.

SmolLM2-135M on two cores, decode steps of one batch and context; all of it is measured in this run:

    A    a step's attention halves, embedding, LM head and sampling, on one core, with FFN answers given at once
    F    a step's FFN products, as the FFN process says
    2T   what is left of a step with one lane: the way there and back

With m lanes a step can take no less than max(m A(b/m), m F(b/m), A(b/m) + F(b/m) + 2T), all of them of b/m rows.
One attention and one FFN process on a core each cannot beat two processes with whole layers on a core each: the same
arithmetic, and rows that travel. What many attention processes share is the FFN's weights: each is read once for all
rows that wait for it.

Parts: lanes (at the context where A = F, and at others), shared (M attention processes and one FFN process), and link
(where splitting loses, over batch, context, experts and the way between the two).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from benchmarks.afd_lanes import lanes_figures
from benchmarks.afd_link import link_figures
from benchmarks.afd_shared import shared_figures
from benchmarks.report import Figure, option_parser, report

PARTS = ("lanes", "shared", "link")


def main() -> int:
    parser = option_parser("afd", __doc__)
    parser.add_argument("--only", choices=PARTS, action="append", metavar="PART", help=f"{', '.join(PARTS)}; again")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the picture of part link here")
    options = parser.parse_args()
    from anabranch.engine.device import resolve_device, resolve_dtype

    dtype = str(resolve_dtype("auto", resolve_device("cpu"))).removeprefix("torch.")
    cores = (sorted(os.sched_getaffinity(0)) * 2)[:2]
    figures: list[Figure] = []
    for part in options.only or PARTS:
        began_s = time.monotonic()
        if part == "lanes":
            figures += lanes_figures(dtype, cores, quick=options.quick)
        elif part == "shared":
            figures += shared_figures(dtype, cores, quick=options.quick)
        else:
            found, picture = link_figures(dtype, cores, quick=options.quick)
            figures += found
            if options.svg is not None:
                options.svg.write_text(picture)
        print(f"part {part}: {time.monotonic() - began_s:.0f} s", flush=True)
    return report("afd", figures, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
