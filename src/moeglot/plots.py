"""What is drawn, as inline SVG: bytes of the experts by layer and encoding, what the numbers of each layer say, how much of a change survived."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape

from moeglot.checkpoint import Checkpoint
from moeglot.evidence import DECLARED, Weighed
from moeglot.sizes import size

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 900, 240, 70, 52, 40
COLOURS = ("#3b6fb6", "#c8642b", "#4b8b3b", "#8a5fb0", "#b08a2b", "#3b9a9a")
WRONG = "#b3261e"
MOST_LABELS = 16
"""Layers that are named under a plot; of more, every other one or fewer."""
MOST_READINGS = 6


def plots(checkpoint: Checkpoint, deep: Weighed | None) -> Iterator[str]:
    """Every plot of `inspect`."""
    yield bytes_by_layer(checkpoint)
    for evidence in deep.evidence if deep else ():
        if by_layer := evidence.figures.get("by_layer"):
            yield correlations(f"{evidence.test} test of {evidence.what}: correlation by layer, as declared and for each wrong reading", by_layer)


# --- bytes -------------------------------------------------------------------------------------------------------------------------------


def bytes_by_layer(c: Checkpoint) -> str:
    """A bar a layer, a piece a stored tensor (of all experts), a colour an encoding."""
    held = {layer: [_piece(c, layer, n) for n in range(len(c.format.lines(layer)))] for layer in c.layers}
    names = list(dict.fromkeys(encoding for pieces in held.values() for _, encoding, _ in pieces))
    colours = {name: COLOURS[n % len(COLOURS)] for n, name in enumerate(names)}
    most = max(sum(nbytes for *_, nbytes in pieces) for pieces in held.values()) or 1
    totals = {name: sum(n for pieces in held.values() for _, encoding, n in pieces if encoding == name) for name in names}
    shapes = [*_frame("bytes of the experts by layer, a piece a stored tensor"), *_levels(most), *_labels(tuple(held))]
    step = (WIDTH - LEFT) / len(held)
    for n, (layer, pieces) in enumerate(held.items()):
        at = float(TOP + HEIGHT)
        for roles, encoding, nbytes in pieces:
            height = nbytes / most * HEIGHT
            at -= height
            told = f"layer {layer}, {roles}: {size(nbytes)} in {encoding}"
            shapes.append(_bar(LEFT + (n + 0.12) * step, at, 0.76 * step, height, colours[encoding], told))
    shapes += _legend((colours[name], f"{name}: {size(totals[name])}") for name in names)
    return _svg(shapes)


def _piece(c: Checkpoint, layer: int, n: int) -> tuple[str, str, int]:
    """(roles, encoding, bytes) of a stored tensor of all experts of a layer."""
    line = c.format.lines(layer)[n]
    experts = range(c.sizes["e"]) if line.per_expert else (0,)
    keys = [key for expert in experts for key in line.keys(layer, expert).values()]
    return " ".join(line.roles), c.encoding(line, layer).name, sum(c.source.entries[key].nbytes for key in keys if key in c.source.entries)


# --- evidence ----------------------------------------------------------------------------------------------------------------------------


def correlations(title: str, by_layer: Mapping[str, Mapping[int, float]]) -> str:
    """A line of points for each reading, the declared one filled; the other readings that come nearest to it."""
    declared = by_layer[DECLARED]
    others = sorted((name for name in by_layer if name != DECLARED), key=lambda name: -max(by_layer[name].values()))[:MOST_READINGS]
    low, high = min(-0.2, *(value for line in by_layer.values() for value in line.values())), 1.0

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * HEIGHT

    shapes = [*_frame(title), *_labels(tuple(declared))]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        shapes.append(_level(y(tick), f"{tick:g}", "#9aa3ad" if tick == 0 else "#e3e6ea"))
    step = (WIDTH - LEFT) / len(declared)
    for name in (*others, DECLARED):
        points = [(LEFT + (n + 0.5) * step, y(value)) for n, value in enumerate(by_layer[name].values())]
        colour = COLOURS[0] if name == DECLARED else WRONG
        path = " ".join(f"{x:.1f},{at:.1f}" for x, at in points)
        shapes.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5" opacity="{1 if name == DECLARED else 0.35}"/>')
        fill = colour if name == DECLARED else "#fff"
        for (x, at), (layer, value) in zip(points, by_layer[name].items(), strict=True):
            told = f"<title>layer {layer}, {escape(name)}: {value:.3f}</title>"
            shapes.append(f'<circle cx="{x:.1f}" cy="{at:.1f}" r="4" fill="{fill}" stroke="{colour}" stroke-width="1.5">{told}</circle>')
    shapes += _legend([(COLOURS[0], DECLARED), (WRONG, f"{len(others)} wrong readings that no shape refutes; each point has its name")])
    return _svg(shapes)


# --- merges ------------------------------------------------------------------------------------------------------------------------------


def shares(title: str, by_role: Mapping[str, Mapping[int, float]], threshold: float) -> str:
    """A line of points for each role: the share of its change that was recovered in each layer, and the least that passes.

    The first is drawn widest and the last narrowest, so that those that lie on each other all show.
    """
    layers = sorted({layer for of in by_role.values() for layer in of})
    high = max(1.0, *(value for of in by_role.values() for value in of.values()))
    low = min(0.0, *(value for of in by_role.values() for value in of.values()))

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * HEIGHT

    shapes = [*_frame(title), *_labels(layers), *(_level(y(tick), f"{tick:.0%}", "#e3e6ea") for tick in (0.0, 0.25, 0.5, 0.75, 1.0))]
    shapes.append(f'<path d="M{LEFT} {y(threshold):.1f}H{WIDTH}" stroke="{WRONG}" stroke-dasharray="5 4"/>')
    step = (WIDTH - LEFT) / len(layers)
    for n, (role, of) in enumerate(by_role.items()):
        colour, more = COLOURS[n % len(COLOURS)], len(by_role) - 1 - n
        points = [(LEFT + (layers.index(layer) + 0.5) * step, y(value), layer, value) for layer, value in of.items()]
        path = " ".join(f"{x:.1f},{at:.1f}" for x, at, *_ in points)
        shapes.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{1.5 + 3 * more}"/>')
        for x, at, layer, value in points:
            told = f"<title>layer {layer}, {escape(role)}: {value:.1%}</title>"
            shapes.append(f'<circle cx="{x:.1f}" cy="{at:.1f}" r="{4 + 2 * more}" fill="{colour}">{told}</circle>')
    shapes += _legend([*((COLOURS[n % len(COLOURS)], role) for n, role in enumerate(by_role)), (WRONG, f"{threshold:.0%}, the least that passes")])
    return _svg(shapes)


# --- drawing -----------------------------------------------------------------------------------------------------------------------------


def _svg(shapes: Iterable[str]) -> str:
    look = 'role="img" font-family="system-ui,sans-serif" style="max-width:100%;margin-top:1rem"'
    return f'<svg viewBox="0 0 {WIDTH} {TOP + HEIGHT + BOTTOM}" {look}>{"".join(shapes)}</svg>'


def _frame(title: str) -> Iterator[str]:
    yield f'<text x="{LEFT}" y="18" font-size="14">{escape(title)}</text>'


def _levels(most: int) -> Iterator[str]:
    for part in range(5):
        yield _level(TOP + HEIGHT * (1 - part / 4), size(most * part / 4), "#e3e6ea")


def _level(y: float, label: str, colour: str) -> str:
    text = f'<text x="{LEFT - 6}" y="{y + 4:.1f}" font-size="11" text-anchor="end" fill="#667">{label}</text>'
    return f'<path d="M{LEFT} {y:.1f}H{WIDTH}" stroke="{colour}"/>{text}'


def _labels(layers: Sequence[int]) -> Iterator[str]:
    step, every = (WIDTH - LEFT) / len(layers), -(-len(layers) // MOST_LABELS)
    for n, layer in enumerate(layers):
        if n % every == 0:
            yield f'<text x="{LEFT + (n + 0.5) * step:.1f}" y="{TOP + HEIGHT + 16}" font-size="11" text-anchor="middle" fill="#667">{layer}</text>'
    yield f'<text x="{LEFT}" y="{TOP + HEIGHT + 34}" font-size="11" fill="#667">layer</text>'


def _bar(x: float, y: float, width: float, height: float, colour: str, told: str) -> str:
    look = f'fill="{colour}" stroke="#fff" stroke-width="0.6"'
    return f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" {look}><title>{escape(told)}</title></rect>'


def _legend(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    x = float(LEFT)
    for colour, label in rows:
        yield f'<rect x="{x:.0f}" y="30" width="10" height="10" fill="{colour}"/>'
        yield f'<text x="{x + 15:.0f}" y="39" font-size="12" fill="#334">{escape(label)}</text>'
        x += 40 + 6.5 * len(label)
