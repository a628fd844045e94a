"""What is drawn of a checkpoint, a report and a merge: bytes and evidence by layer, errors beside their limit, how much of a change survived."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import log10
from typing import Any

from moeglot.checkpoints.checkpoint import Checkpoint
from moeglot.checkpoints.evidence import DECLARED, Weighed
from moeglot.checks import Check
from moeglot.reports.svg import BLUE, COLOURS, GREY, LEGEND, PALE, RED, Area, legend
from moeglot.sizes import size
from moeglot.survival import percent
from moeglot.verification.forward import LIMIT

MOST_READINGS = 6
TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
LEAST, MOST = -9, 1
"""Powers of ten from which errors are drawn, and up to which."""


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
    area = Area(0, most, len(held), LEGEND)
    shapes = [*area.quarters(size(most * part) for part in TICKS), *area.names([str(layer) for layer in held], "layer")]
    for n, (layer, pieces) in enumerate(held.items()):
        at = 0
        for roles, encoding, nbytes in pieces:
            shapes.append(area.bar(n, at, at + nbytes, colours[encoding], f"layer {layer}, {roles}: {size(nbytes)} in {encoding}"))
            at += nbytes
    shapes += legend((colours[name], f"{name}: {size(totals[name])}") for name in names)
    return area.svg("bytes of the experts by layer, a piece a stored tensor", shapes)


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
    area = Area(min(-0.2, *(value for line in by_layer.values() for value in line.values())), 1, len(declared), LEGEND)
    shapes = [*area.names([str(layer) for layer in declared], "layer"), *(area.level(tick, f"{tick:g}", PALE if tick else GREY) for tick in TICKS)]
    for name in (*others, DECLARED):
        colour, is_declared = BLUE if name == DECLARED else RED, name == DECLARED
        shapes.append(area.line([(n + 0.5, value) for n, value in enumerate(by_layer[name].values())], colour, opacity=1 if is_declared else 0.35))
        for n, (layer, value) in enumerate(by_layer[name].items()):
            shapes.append(area.point(n + 0.5, value, colour, f"layer {layer}, {name}: {value:.3f}", filled=is_declared))
    shapes += legend([(BLUE, DECLARED), (RED, f"{len(others)} wrong readings that no shape refutes; each point has its name")])
    return area.svg(title, shapes)


# --- merges ------------------------------------------------------------------------------------------------------------------------------


def shares(title: str, by_role: Mapping[str, Mapping[int, float]], threshold: float) -> str:
    """A line of points for each role: the share of its change that was recovered in each layer, and the least that passes.

    The first is drawn widest and the last narrowest, so that those that lie on each other all show.
    """
    layers = sorted({layer for of in by_role.values() for layer in of})
    every = [value for of in by_role.values() for value in of.values()]
    area = Area(min(0.0, *every), max(1.0, *every), len(layers), LEGEND)
    shapes = [*area.names([str(layer) for layer in layers], "layer"), *(area.level(tick, f"{tick:.0%}") for tick in TICKS), area.limit(threshold)]
    for n, (role, of) in enumerate(by_role.items()):
        colour, more = COLOURS[n % len(COLOURS)], len(by_role) - 1 - n
        points = [(layers.index(layer) + 0.5, value, f"layer {layer}, {role}: {percent(value)}") for layer, value in of.items()]
        shapes.append(area.line([(at, value) for at, value, _ in points], colour, 1.5 + 3 * more))
        shapes += [area.point(at, value, colour, told, 4 + 2 * more) for at, value, told in points]
    shapes += legend([*((COLOURS[n % len(COLOURS)], role) for n, role in enumerate(by_role)), (RED, f"{threshold:.0%}, the least that passes")])
    return area.svg(title, shapes)


# --- reports -----------------------------------------------------------------------------------------------------------------------------


def of_checks(checks: Iterable[Check]) -> Iterator[str]:
    """For each check with figures by layer: a bar a layer, relative error on a log scale, with the limit and the wrong readings as lines."""
    checks = list(checks)
    wrong: dict[str, float] = next((c.figures["wrong_readings"] for c in checks if "wrong_readings" in c.figures), {})
    mildest = min(wrong.items(), key=lambda item: item[1], default=None)
    for check in checks:
        if check.layers:
            limits = {"limit": LIMIT, **({f"mildest wrong reading ({mildest[0]})": mildest[1]} if mildest else {})}
            yield errors(f"{check.level}: {check.what}, relative error by layer", check.layers, limits if check.level == "forward" else {})


def errors(title: str, values: Mapping[Any, float], limits: Mapping[str, float]) -> str:
    """Bars from 1e-9 to 10 on a log scale; zero is drawn as an empty place with its label."""
    area = Area(LEAST, MOST, max(1, len(values)))
    shapes = [area.level(power, f"1e{power}") for power in range(LEAST, MOST + 1, 2)]
    shapes += area.names([f"{name}{'' if value else ' (0)'}" for name, value in values.items()], "layer")
    for n, (name, value) in enumerate(values.items()):
        shapes.append(area.bar(n, LEAST, _power(value), BLUE, f"{name}: {value:.2g}"))
    shapes += area.limits({name: _power(value) for name, value in limits.items()}, {name: f"{name}: {value:.1g}" for name, value in limits.items()})
    return area.svg(title, shapes)


def _power(value: float) -> float:
    return min(max(log10(value), LEAST), MOST) if value > 0 else LEAST
