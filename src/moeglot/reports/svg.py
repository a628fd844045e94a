"""How numbers are drawn as inline SVG: columns of bars or points over levels, a limit, a legend; and a page around it, without scripts or links."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, FOOT = 900, 70, 40
BLUE, RED, PALE, GREY = "#3b6fb6", "#b3261e", "#e3e6ea", "#9aa3ad"
COLOURS = (BLUE, "#c8642b", "#4b8b3b", "#8a5fb0", "#b08a2b", "#3b9a9a")
MOST_LABELS = 16
"""Columns that are named under a drawing; of more, every other one or fewer."""
LINE = 14.0
"""From one line of small text to the next."""
STYLE = "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#1d2430;background:#fff}h1{font-size:1.3rem}"


def page(title: str, *body: str) -> str:
    """A whole file of HTML; the body is HTML already."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}<h1>{escape(title)}</h1>{"".join(body)}</html>\n'


@dataclass(frozen=True)
class Area:
    """Where numbers from `low` to `high` are drawn, in columns beside each other, under a title and `top`."""

    low: float
    high: float
    columns: int
    top: int = 30
    height: int = 240

    def y(self, value: float) -> float:
        return self.top + (self.high - value) / (self.high - self.low) * self.height

    def x(self, column: float) -> float:
        return LEFT + column * (WIDTH - LEFT) / self.columns

    def svg(self, title: str, shapes: Iterable[str]) -> str:
        look = 'role="img" font-family="system-ui,sans-serif" style="max-width:100%;margin-top:1rem"'
        size = f"0 0 {WIDTH} {self.top + self.height + FOOT}"
        return f'<svg viewBox="{size}" {look}>{_text(LEFT, 18, title, 14, "#000")}{"".join(shapes)}</svg>'

    def level(self, value: float, label: str, colour: str = PALE) -> str:
        """A line across, named on the left."""
        return f'<path d="M{LEFT} {self.y(value):.1f}H{WIDTH}" stroke="{colour}"/>{_text(LEFT - 6, self.y(value) + 4, label, anchor="end")}'

    def quarters(self, labels: Iterable[str]) -> Iterator[str]:
        """Five levels from the lowest to the highest."""
        for part, label in enumerate(labels):
            yield self.level(self.low + (self.high - self.low) * part / 4, label)

    def limit(self, value: float) -> str:
        """A dashed line across."""
        return f'<path d="M{LEFT} {self.y(value):.1f}H{WIDTH}" stroke="{RED}" stroke-dasharray="5 4"/>'

    def limits(self, values: Mapping[str, float], told: Mapping[str, str]) -> Iterator[str]:
        """Dashed lines, each with its label above it, on the right; labels that would lie on each other go up."""
        placed: list[float] = []
        for name, value in sorted(values.items(), key=lambda item: item[1]):
            placed.append(min([self.y(value) - 4, *(other - LINE for other in placed)]))
            look = 'stroke="#fff" stroke-width="3" paint-order="stroke"'
            yield self.limit(value)
            yield _text(WIDTH, placed[-1], told[name], 12, RED, "end", look)

    def names(self, columns: Sequence[str], axis: str) -> Iterator[str]:
        """What the columns are called, under them, and under that what they are."""
        every, foot = -(-len(columns) // MOST_LABELS), self.top + self.height
        for n, name in enumerate(columns):
            if n % every == 0:
                yield _text(self.x(n + 0.5), foot + 16, name, anchor="middle")
        yield _text(LEFT, foot + 34, axis)

    def bar(self, column: int, start: float, stop: float, colour: str, told: str) -> str:
        """From one number up to another; `told`: what a pointer on it shows."""
        place = f'x="{self.x(column + 0.12):.2f}" y="{self.y(stop):.2f}" width="{self.x(0.76) - LEFT:.2f}" height="{self.y(start) - self.y(stop):.2f}"'
        return f'<rect {place} fill="{colour}" stroke="#fff" stroke-width="0.6"><title>{escape(told)}</title></rect>'

    def line(self, points: Iterable[tuple[float, float]], colour: str, width: float = 1.5, opacity: float = 1.0) -> str:
        """Through (column, number)."""
        path = " ".join(f"{self.x(column):.1f},{self.y(value):.1f}" for column, value in points)
        return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}" opacity="{opacity:g}"/>'

    def point(self, column: float, value: float, colour: str, told: str, radius: int = 4, filled: bool = True) -> str:
        look = f'fill="{colour if filled else "#fff"}" stroke="{colour}" stroke-width="1.5"'
        return f'<circle cx="{self.x(column):.1f}" cy="{self.y(value):.1f}" r="{radius}" {look}><title>{escape(told)}</title></circle>'


def legend(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    """(colour, what it means) beside each other, for an area that leaves room for them under its title."""
    x = float(LEFT)
    for colour, label in rows:
        yield f'<rect x="{x:.0f}" y="30" width="10" height="10" fill="{colour}"/>{_text(x + 15, 39, label, 12, "#334")}'
        x += 40 + 6.5 * len(label)


LEGEND = 52
"""`top` of an area with one."""


def _text(x: float, y: float, text: str, size: int = 11, colour: str = "#667", anchor: str = "start", look: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}" {look}>{escape(text)}</text>'
