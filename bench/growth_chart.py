"""Draw the results of `bench.growth` as one picture: `python -m bench.growth_chart`.

Colours are of a middle brightness, to be read on light and on dark pages.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import count, takewhile
from math import floor, log10
from pathlib import Path
from typing import Any

from bench.machine import RESULTS

OUT = Path(__file__).parent.parent / "docs" / "growth.svg"
COLOURS = ("#3b82f6", "#e8590c")
TEXT, GRID = "#7d8590", "#7d859055"
WIDTH, HEIGHT = 860, 640
PANEL_WIDTH, PANEL_HEIGHT = 340, 215  # of the plot itself
LEFT, TOP = 70, 62
STEP_X, STEP_Y = 430, 305  # from one plot to the next
TICKS = 5  # about so many


@dataclass(frozen=True)
class Series:
    """Points `(x, y)` with x ascending, and how straight lines through them may be drawn.

    Attributes:
        name: what the legend calls it.
        points: measured.
        line: two ends of the fitted line, or `None`, which joins the points.
    """

    name: str
    points: list[tuple[float, float]]
    line: tuple[tuple[float, float], tuple[float, float]] | None = None


@dataclass(frozen=True)
class Panel:
    """One plot, both axes from 0."""

    title: str
    x_label: str
    y_label: str
    series: list[Series]


def panels(results: Sequence[dict[str, Any]]) -> list[Panel]:
    """What is shown of the result files."""
    return [
        Panel(
            "Time of a batch",
            "images in the batch",
            "ms",
            [_batches(result, "ms", 1, "time_line") for result in results],
        ),
        Panel(
            "Memory of a batch, beside the loaded model",
            "images in the batch",
            "MB",
            [_batches(result, "memory_bytes", 1e6, "memory_line") for result in results],
        ),
        Panel(
            "Time of one image at 224, 288, 384 and 448 pixels",
            "GFLOPs of the image",
            "ms",
            [
                Series(result["model"], [(row["flops"] / 1e9, row["ms"]) for row in result["size"]])
                for result in results
            ],
        ),
        Panel(
            "Memory of loaded models",
            "models",
            "MB",
            [
                Series(
                    result["model"],
                    [(row["models"], row["memory_bytes"] / 1e6) for row in result["models"]],
                )
                for result in results
            ],
        ),
    ]


def _batches(result: dict[str, Any], key: str, unit: float, line: str) -> Series:
    rows, fit = result["batch"]["rows"], result["batch"][line]
    first, last = fit["from_batch"], rows[-1]["batch"]
    ends = [(x, (fit["of_a_batch"] + fit["of_an_image"] * x) / unit) for x in (first, last)]
    points = [(row["batch"], row[key] / unit) for row in rows]
    return Series(result["model"], points, (ends[0], ends[1]))


def ticks(largest: float) -> list[float]:
    """Round numbers from 0 to the first that is not below the largest value."""
    rough = largest / TICKS
    power = 10 ** floor(log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 4, 5, 8, 10) if factor * power >= rough)
    below = list(takewhile(lambda tick: tick < largest, (index * step for index in count())))
    return [*below, len(below) * step]


def draw(results: Sequence[dict[str, Any]]) -> str:
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
    for index, panel in enumerate(panels(results)):
        x, y = LEFT + STEP_X * (index % 2), TOP + STEP_Y * (index // 2)
        parts += [f'<g transform="translate({x} {y})">', *_draw_panel(panel), "</g>"]
    return "\n".join([*parts, "</g>", "</svg>"]) + "\n"


def _legend(names: list[str]) -> Iterator[str]:
    for index, name in enumerate(names):
        x = LEFT + 150 * index
        yield _marker(index, x, 18)
        yield f'<text x="{x + 10}" y="22">{escape(name)}</text>'


def _draw_panel(panel: Panel) -> Iterator[str]:
    points = [point for series in panel.series for point in series.points]
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
    for index, series in enumerate(panel.series):
        way = " ".join(
            f"{x},{y}" for x, y in (place(*point) for point in series.line or series.points)
        )
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
    parser = argparse.ArgumentParser(prog="python -m bench.growth_chart", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["dat_tiny_224", "dat_pp_tiny_224"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    arguments = parser.parse_args()
    files = [
        RESULTS / f"growth-{name}-{arguments.device}-{arguments.dtype}.json"
        for name in arguments.models
    ]
    OUT.write_text(draw([json.loads(file.read_text()) for file in files]))


if __name__ == "__main__":
    main()
