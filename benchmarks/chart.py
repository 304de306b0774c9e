"""A line chart with logarithmic axes as SVG text: what benchmarks draw for the documents."""

from __future__ import annotations

import math
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 50, 55


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line.

    Attributes:
        points: (x, y), both above 0, in order of x.
    """

    name: str
    colour: str
    points: list[tuple[float, float]]
    dashed: bool = False


def line_chart(series: list[Series], *, title: str, x_label: str, y_label: str) -> str:
    """Both axes count in powers of two."""
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points]
    x_range, y_range = _powers(xs), _powers(ys)

    def at(value: float, powers: range, start: float, stop: float) -> float:
        return start + (stop - start) * (math.log2(value) - powers[0]) / max(1, powers[-1] - powers[0])

    def x_at(x: float) -> float:
        return at(x, x_range, LEFT, WIDTH - RIGHT)

    def y_at(y: float) -> float:
        return at(y, y_range, HEIGHT - BOTTOM, TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12" fill="#24292f">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="24" font-size="15" font-weight="bold">{escape(title)}</text>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text x="16" y="{TOP - 8}">{escape(y_label)}</text>',
    ]
    for power in x_range:
        x = x_at(2.0**power)
        parts.append(f'<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#d8dee4"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_short(power)}</text>')
    for power in y_range:
        y = y_at(2.0**power)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#d8dee4"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_short(power)}</text>')
    for i, line in enumerate(series):
        dash = ' stroke-dasharray="6 5"' if line.dashed else ""
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="2"{dash}/>')
        x, y = WIDTH - RIGHT + 16, TOP + 12 + 24 * i
        parts.append(f'<path d="M{x} {y}h28" stroke="{line.colour}" stroke-width="2"{dash}/>')
        parts.append(f'<text x="{x + 36}" y="{y + 4}">{escape(line.name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _powers(values: list[float]) -> range:
    return range(math.floor(math.log2(min(values))), math.ceil(math.log2(max(values))) + 1)


def _short(power: int) -> str:
    return f"{2**power:,}" if power >= 0 else f"{2.0**power:g}"
