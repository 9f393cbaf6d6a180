"""Draw the results of `bench.growth` as one picture: `python -m bench.growth_chart`.

Colours are of a middle brightness, to be read on light and on dark pages.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import count, takewhile
from math import floor, log10
from pathlib import Path
from typing import NamedTuple

from bench.harness import options
from bench.machine import RESULTS
from bench.tables import Row

OUT = Path(__file__).parent.parent / "docs" / "growth.svg"
COLOURS = ("#3b82f6", "#e8590c")
TEXT, GRID = "#7d8590", "#7d859055"
WIDTH, HEIGHT = 860, 640
PANEL_WIDTH, PANEL_HEIGHT = 340, 215  # of the plot itself
LEFT, TOP = 70, 62
STEP_X, STEP_Y = 430, 305  # from one plot to the next
TICKS = 5  # about so many

Points = list[tuple[float, float]]


class Series(NamedTuple):
    """Points `(x, y)` with x ascending, and the ends of the straight lines between or past them."""

    points: Points
    line: Points


class Panel(NamedTuple):
    """One plot, both axes from 0, of what it takes from a result."""

    title: str
    x_label: str
    y_label: str
    of: Callable[[Row], Series]


def _batches(key: str, unit: float, line: str) -> Callable[[Row], Series]:
    def of(result: Row) -> Series:
        rows, fit = result["batch"]["rows"], result["batch"][line]
        ends = (fit["from_batch"], rows[-1]["batch"])
        return Series(
            [(row["batch"], row[key] / unit) for row in rows],
            [(x, (fit["of_a_batch"] + fit["of_an_image"] * x) / unit) for x in ends],
        )

    return of


def _joined(rows: str, x: str, x_unit: float, y: str, y_unit: float) -> Callable[[Row], Series]:
    def of(result: Row) -> Series:
        points = [(row[x] / x_unit, row[y] / y_unit) for row in result[rows]]
        return Series(points, points)

    return of


PANELS = (
    Panel("Time of a batch", "images in the batch", "ms", _batches("ms", 1, "time_line")),
    Panel(
        "Memory of a batch, beside the loaded model",
        "images in the batch",
        "MB",
        _batches("memory_bytes", 1e6, "memory_line"),
    ),
    Panel(
        "Time of one image at 224, 288, 384 and 448 pixels",
        "GFLOPs of the image",
        "ms",
        _joined("size", "flops", 1e9, "ms", 1),
    ),
    Panel(
        "Memory of loaded models",
        "models",
        "MB",
        _joined("models", "models", 1, "memory_bytes", 1e6),
    ),
)


def ticks(largest: float) -> list[float]:
    """Round numbers from 0 to the first that is not below the largest value."""
    rough = largest / TICKS
    power = 10 ** floor(log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 4, 5, 8, 10) if factor * power >= rough)
    below = list(takewhile(lambda tick: tick < largest, (index * step for index in count())))
    return [*below, len(below) * step]


def draw(results: Sequence[Row]) -> str:
    """The picture of some results, SVG."""
    machine = results[0]["machine"]
    where = machine["cpu"] if machine["gpu"] == "none" else machine["gpu"]
    caption = f"{where}, {machine['threads']} threads, torch {machine['torch']}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">',
        f'<g font-family="sans-serif" font-size="12" fill="{TEXT}">',
        "<title>Time and memory against batch, resolution and models loaded</title>",
        *_legend([result["model"] for result in results]),
        f'<text x="{WIDTH - 20}" y="22" text-anchor="end">{escape(caption)}</text>',
    ]
    for index, panel in enumerate(PANELS):
        x, y = LEFT + STEP_X * (index % 2), TOP + STEP_Y * (index // 2)
        parts += [f'<g transform="translate({x} {y})">', *_draw_panel(panel, results), "</g>"]
    return "\n".join([*parts, "</g>", "</svg>"]) + "\n"


def _legend(names: list[str]) -> Iterator[str]:
    for index, name in enumerate(names):
        x = LEFT + 150 * index
        yield _marker(index, x, 18)
        yield f'<text x="{x + 10}" y="22">{escape(name)}</text>'


def _draw_panel(panel: Panel, results: Sequence[Row]) -> Iterator[str]:
    all_series = [panel.of(result) for result in results]
    points = [point for series in all_series for point in series.points]
    x_ticks, y_ticks = (ticks(max(values)) for values in zip(*points, strict=True))

    def place(x: float, y: float) -> tuple[float, float]:
        right, up = x / x_ticks[-1], y / y_ticks[-1]
        return round(PANEL_WIDTH * right, 1), round(PANEL_HEIGHT * (1 - up), 1)

    yield f'<text y="-12" font-weight="bold">{escape(panel.title)}</text>'
    for tick in y_ticks:
        _, y = place(0, tick)
        yield f'<path d="M0 {y}H{PANEL_WIDTH}" stroke="{GRID}"/>'
        yield f'<text x="-7" y="{y + 4}" text-anchor="end">{tick:g}</text>'
    for tick in x_ticks:
        x, _ = place(tick, 0)
        yield f'<path d="M{x} {PANEL_HEIGHT}v5" stroke="{TEXT}"/>'
        yield f'<text x="{x}" y="{PANEL_HEIGHT + 19}" text-anchor="middle">{tick:g}</text>'
    middle = PANEL_WIDTH / 2
    yield f'<text x="{middle}" y="{PANEL_HEIGHT + 36}" text-anchor="middle">{panel.x_label}</text>'
    yield (
        f'<text transform="translate(-48 {PANEL_HEIGHT / 2}) rotate(-90)" '
        f'text-anchor="middle">{panel.y_label}</text>'
    )
    for index, series in enumerate(all_series):
        way = " ".join(f"{x},{y}" for x, y in (place(*point) for point in series.line))
        yield f'<polyline points="{way}" fill="none" stroke="{COLOURS[index]}" stroke-width="1.5"/>'
        for point in series.points:
            yield _marker(index, *place(*point))


def _marker(index: int, x: float, y: float) -> str:
    """A shape of its own for each series, for those who see no colours."""
    if index == 0:
        return f'<circle cx="{x}" cy="{y}" r="4" fill="{COLOURS[index]}"/>'
    return (
        f'<rect x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7" fill="{COLOURS[index]}"/>'
    )


def main() -> None:
    """Draw the results of one device and precision."""
    models = ["dat_tiny_224", "dat_pp_tiny_224"]
    chosen = options("bench.growth_chart", __doc__, models=models, device="cpu", dtype="float32")
    files = [f"growth-{name}-{chosen.device}-{chosen.dtype}.json" for name in chosen.models]
    OUT.write_text(draw([json.loads((RESULTS / file).read_text()) for file in files]))


if __name__ == "__main__":
    main()
