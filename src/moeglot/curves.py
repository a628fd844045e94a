"""A loss curve as a picture: SVG in a page of its own, and PNG where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

WIDTH, HEIGHT, LEFT, TOP = 900, 320, 60, 30


def svg(title: str, losses: Sequence[float], levels: Mapping[str, float]) -> str:
    """`losses`: one a step, drawn as a line; `levels`: name -> a loss, drawn as a dashed line."""
    every = [*losses, *levels.values()]
    low, high = min(every), max(every)
    span = (high - low) or 1.0

    def y(value: float) -> float:
        return TOP + (high - value) / span * HEIGHT

    points = " ".join(f"{LEFT + n / max(1, len(losses) - 1) * (WIDTH - LEFT):.1f},{y(loss):.1f}" for n, loss in enumerate(losses))
    shapes = [f'<text x="{LEFT}" y="18" font-size="14">{escape(title)}</text>']
    for part in range(5):
        value = low + span * part / 4
        shapes.append(
            f'<path d="M{LEFT} {y(value):.1f}H{WIDTH}" stroke="#e3e6ea"/><text x="4" y="{y(value) + 4:.1f}" font-size="11" fill="#667">{value:.3f}</text>'
        )
    shapes.append(f'<polyline points="{points}" fill="none" stroke="#3b6fb6" stroke-width="1.5"/>')
    heights = _apart({name: y(value) - 4 for name, value in levels.items()})
    for name, value in levels.items():
        look = 'font-size="12" text-anchor="end" fill="#b3261e" stroke="#fff" stroke-width="3" paint-order="stroke"'
        shapes.append(f'<path d="M{LEFT} {y(value):.1f}H{WIDTH}" stroke="#b3261e" stroke-dasharray="5 4"/>')
        shapes.append(f'<text x="{WIDTH}" y="{heights[name]:.1f}" {look}>{escape(name)}: {value:.3f}</text>')
    shapes.append(f'<text x="{WIDTH}" y="{TOP + HEIGHT + 18}" font-size="11" text-anchor="end" fill="#667">{len(losses)} steps</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT + TOP + 26}" role="img" font-family="system-ui,sans-serif" style="max-width:100%">{"".join(shapes)}</svg>'


def _apart(heights: Mapping[str, float], least: float = 14) -> dict[str, float]:
    """Where labels stand that would else lie on each other: each at least a line above the one that is below it."""
    found: dict[str, float] = {}
    for name, at in sorted(heights.items(), key=lambda item: -item[1]):
        found[name] = min([at, *(other - least for other in found.values())])
    return found


def page(path: Path, title: str, losses: Sequence[float], levels: Mapping[str, float], lines: Sequence[str]) -> None:
    """One HTML file without scripts or links."""
    style = "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#1d2430;background:#fff}h1{font-size:1.3rem}"
    told = "".join(f"<li>{escape(line)}</li>" for line in lines)
    body = f"<h1>{escape(title)}</h1>{svg('loss of each step, nats a token', losses, levels)}<ul>{told}</ul>"
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{style}</style>{body}</html>\n', encoding="utf-8"
    )


def png(path: Path, title: str, losses: Sequence[float], levels: Mapping[str, float]) -> bool:
    """True if matplotlib is there and drew it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 4), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(range(1, len(losses) + 1), losses, linewidth=1)
    upper = max(levels, key=levels.__getitem__, default="")
    ground = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
    for name, value in levels.items():
        axes.axhline(value, linestyle="--", linewidth=1, color="#b3261e")
        look = {"fontsize": 8, "color": "#b3261e", "bbox": ground, "zorder": 4}  # above the curve
        axes.annotate(f"{name}: {value:.3f}", (len(losses), value), ha="right", va="bottom" if name == upper else "top", **look)
    axes.set_title(title, fontsize=10, parse_math=False)  # a path may have a $
    axes.set_xlabel("step")
    axes.set_ylabel("nats a token")
    figure.tight_layout()
    figure.savefig(path)
    return True
