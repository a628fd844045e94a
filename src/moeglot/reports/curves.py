"""A loss curve as a picture: SVG in a page of its own, and PNG where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from moeglot.reports import svg


def drawn(title: str, losses: Sequence[float], levels: Mapping[str, float]) -> str:
    """`losses`: one a step, drawn as a line; `levels`: name -> a loss, drawn as a dashed line."""
    every = [*losses, *levels.values()]
    low, high = min(every), max(every)
    area = svg.Area(low, high if high > low else low + 1, max(1, len(losses) - 1), height=320)
    shapes = [*area.quarters(f"{low + (area.high - low) * part / 4:.3f}" for part in range(5)), area.line(enumerate(losses), svg.BLUE)]
    shapes += area.limits(levels, {name: f"{name}: {value:.3f}" for name, value in levels.items()})
    return area.svg(title, [*shapes, *area.names((), f"{len(losses)} steps")])


def page(path: Path, title: str, losses: Sequence[float], levels: Mapping[str, float], lines: Sequence[str]) -> None:
    """One HTML file; it replaces that of a run which goes on."""
    told = "".join(f"<li>{escape(line)}</li>" for line in lines)
    whole = svg.page(title, drawn("loss of each step, nats a token", losses, levels), f"<ul>{told}</ul>")
    path.write_text(whole, encoding="utf-8", errors="backslashreplace")  # a path may be no text


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
