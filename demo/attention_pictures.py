"""Draws the pictures of `docs/attention.md`: `python -m demo.attention_pictures`.

All of them show the demo models. The one beside a Swin needs the extra `swin`; `--only offsets` and
the like draws some of them.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from demo.canvas import jpeg
from demo.evaluate import bundled_model
from demo.scenes import scene
from demo.views import view
from model import DAT
from model.attention import DeformableAttention
from model.attention_weights import AttentionWeights
from model.checkpoint import read
from model.geometry import MOST_QUERIES
from model.normalise import Normalise
from model.swin import load_swin
from model.transforms import Preprocessing

# Servers ship them with the page.
FOLDER = Path(__file__).parent.parent / "service/playground/page/docs/pictures"
SWIN = Path(__file__).parent / "swin_nano.safetensors"
SEED, SCENE = 4, 10  # a star
LAYER, LAST = 4, 6  # 2.2 and 3.1, among the deformable layers
# Panels are drawn at twice their size, and reduced for smooth lines.
SIDE, TWICE = 300, 2
GAP, CAPTION = 14, 34
KEYS = 8

# Of Okabe and Ito, which people with colour-vision deficiency tell apart.
GROUPS = ((230, 159, 0), (86, 180, 233))
QUERY = (213, 94, 0)
INK, PAPER, MARGIN = (20, 20, 24), (250, 250, 250), (205, 205, 210)
BESIDE = 20  # pixels around a picture, for points outside of it

Points = NDArray[np.float64]  # `(..., 2)`, (x, y), pixels of the model's input


class Demo:
    """The demo model and the scene that all pictures show.

    Attributes:
        model: in evaluation mode.
        images: `(1, 3, H, W)`, normalised.
        picture: what the model sees, at the size that panels are drawn at.
        centre_xy: of the object, pixels of the model's input.
        radius: of the object, likewise.
    """

    def __init__(self) -> None:
        self.model: DAT = bundled_model()
        config = self.model.config
        preprocessing = Preprocessing.of(config)
        whole, crop = preprocessing.resize_to[0], config.image_size[0]
        enlarged = SIDE * TWICE / crop
        rendered = scene(SEED, SCENE, whole * 2, whole * 2)
        seen = view(rendered, jpeg(rendered.pixels, 92), config)
        self.images: Tensor = Normalise()(torch.from_numpy(seen.pixels[None]))
        start = preprocessing.crop_offset[0] * 2
        cut = Image.fromarray(rendered.pixels).crop(
            (start, start, start + crop * 2, start + crop * 2)
        )
        self.picture = cut.resize((SIDE * TWICE,) * 2, Image.Resampling.BICUBIC)
        self.enlarged = enlarged
        self.centre_xy = np.array(rendered.centre_xy) / 2 - preprocessing.crop_offset[0]
        self.radius = rendered.radius / 2

    def panel(self, shade: float = 0.0, margin: int = 0) -> "Panel":
        """The picture to draw on, `shade` of it white, in a margin of so many pixels."""
        white = Image.new("RGB", self.picture.size, PAPER)
        shaded = Image.blend(self.picture, white, shade)
        if not margin:
            return Panel(shaded, self.enlarged)
        framed = Image.new("RGB", (shaded.width + 2 * margin * TWICE,) * 2, MARGIN)
        framed.paste(shaded, (margin * TWICE,) * 2)
        return Panel(framed, self.enlarged, margin * TWICE)

    def pixels(self, layer: int, locations: Tensor) -> Points:
        """Points `(..., 2)` from normalised (y, x) of a deformable layer."""
        stage, _, _ = self.model.deformable_layers[layer]
        stride, first = self.model.config.cell_geometry(stage)
        last_cell = self.model.config.map_size(stage)[0] - 1
        cells = (locations.flip(-1).double().numpy() + 1) / 2 * last_cell
        found: Points = first + stride * cells
        return found

    def cell(self, layer: int, point_xy: Points) -> tuple[int, Points]:
        """The cell of a layer nearest to a point, along the rows, and its centre."""
        stage, _, _ = self.model.deformable_layers[layer]
        stride, first = self.model.config.cell_geometry(stage)
        columns = self.model.config.map_size(stage)[1]
        column, row = np.clip(np.round((point_xy - first) / stride), 0, columns - 1).astype(int)
        return int(row) * columns + int(column), first + stride * np.array([column, row])

    def attention(self, layer: int, *cells: int) -> tuple[Points, AttentionWeights]:
        """The sampling locations `(G, Ns, 2)` of a layer, and what queries attend to."""
        asked = torch.tensor([[[*cells, *[0] * (MOST_QUERIES - len(cells))]]])
        with torch.inference_mode():
            explained = self.model.forward_explained(self.images, (layer,), asked)
        return self.points(layer, explained.sampling_locations), explained.attention[0]

    def points(self, layer: int, locations: Sequence[Tensor]) -> Points:
        """The sampling locations `(G, Ns, 2)` of a layer."""
        return self.pixels(layer, locations[layer][0].flatten(1, 2))

    def references(self, layer: int) -> Points:
        """The reference points `(Ns, 2)` of a layer."""
        attention = self.model.deformable_layers[layer].attention
        return self.pixels(layer, attention.reference_points.flatten(0, 1))


class Panel:
    """A picture to draw on, in pixels of the model's input.

    Args:
        picture: is drawn on.
        enlarged: pixels of the picture for each of the input.
        margin: around the input, pixels of the picture.
    """

    def __init__(self, picture: Image.Image, enlarged: float, margin: int = 0) -> None:
        self.picture = picture
        self._margin = margin
        self._draw = ImageDraw.Draw(picture)
        self._enlarged = enlarged

    def _place(self, point_xy: Points) -> tuple[float, float]:
        x, y = point_xy * self._enlarged + self._margin
        return float(x), float(y)

    def dot(
        self, point_xy: Points, radius: float, colour: tuple[int, int, int], edge: int = 2
    ) -> None:
        """A disc with a dark edge; the radius is in pixels of the final picture."""
        self._draw.circle(
            self._place(point_xy), radius * TWICE, fill=colour, outline=INK, width=edge * TWICE
        )

    def line(
        self, start_xy: Points, stop_xy: Points, width: float, colour: tuple[int, int, int]
    ) -> None:
        """A line with a dark edge; the width is in pixels of the final picture."""
        ends = [*self._place(start_xy), *self._place(stop_xy)]
        self._draw.line(ends, INK, round((width + 2) * TWICE))
        self._draw.line(ends, colour, max(1, round(width * TWICE)))

    def box(self, corners_xy: Points, width: float, colour: tuple[int, int, int]) -> None:
        """A frame between two corners."""
        first, last = map(self._place, corners_xy)
        self._draw.rectangle([first, last], outline=colour, width=round(width * TWICE))

    def query(self, centre_xy: Points) -> None:
        """The mark of a query: a square."""
        x, y = self._place(centre_xy)
        reach = 7 * TWICE
        self._draw.rectangle(
            [x - reach, y - reach, x + reach, y + reach], fill=QUERY, outline=INK, width=2 * TWICE
        )


def offsets(demo: Demo) -> Image.Image:
    """Reference points, the offsets of a group, and the sampling locations of both."""
    starts = demo.references(LAYER)
    locations, _ = demo.attention(LAYER)
    grid, moves, moved = (demo.panel(margin=BESIDE) for _ in range(3))
    for start in starts:
        grid.dot(start, 5, PAPER)
    for start, stop in zip(starts, locations[0], strict=True):
        moves.line(start, stop, 2, GROUPS[0])
        moves.dot(start, 4, PAPER)
        moves.dot(stop, 6, GROUPS[0])
    for of_group, colour in zip(locations, GROUPS, strict=True):
        for stop in of_group:
            moved.dot(stop, 6, colour)
    captions = ("reference points", "offsets of group 1", "sampling locations of both groups")
    return sheet([grid, moves, moved], captions)


def queries(demo: Demo) -> Image.Image:
    """Two queries with their keys, and what every point receives."""
    corner = np.array([0.12, 0.88]) * demo.model.config.image_size[0]
    places = [demo.cell(LAYER, where) for where in (demo.centre_xy, corner)]
    points, weights = demo.attention(LAYER, *(cell for cell, _ in places))
    panels = []
    for index, (_, centre) in enumerate(places):
        panel = demo.panel(0.25)
        of_keys = weights.weights[0, index].numpy()  # (G, Ns)
        for group, of_group in enumerate(points):
            for point in of_group:
                panel.dot(point, 3, PAPER, 1)
            best = np.argsort(-of_keys[group])[: KEYS // 2]
            for key in best:
                share = of_keys[group, key] / of_keys.max()
                panel.line(centre, of_group[key], 1 + 5 * share, GROUPS[group])
            for key in best:
                panel.dot(of_group[key], 5, GROUPS[group])
        panel.query(centre)
        panels.append(panel)
    received = weights.received[0].numpy()
    circles = demo.panel(0.25)
    for of_group, sizes, colour in zip(points, received, GROUPS, strict=True):
        for point, size in zip(of_group, sizes, strict=True):
            circles.dot(point, 2 + 16 * np.sqrt(size / received.max()), colour)
    captions = ("a query on the object", "a query beside it", "attention received")
    return sheet([*panels, circles], captions)


def bias(demo: Demo) -> Image.Image:
    """The tables of relative positions of one layer."""
    attention = demo.model.deformable_layers[LAYER].attention
    assert isinstance(attention, DeformableAttention)
    tables = attention.relative_position_bias_table.detach().double().numpy()
    most = np.abs(tables).max()
    cool, warm = np.array([0, 90, 181]), np.array([230, 130, 0])
    panels = []
    for table in tables:
        share = (table / most)[..., None]
        colours = 255 + np.where(share > 0, share * (warm - 255), -share * (cool - 255))
        small = Image.fromarray(colours.round().astype(np.uint8))
        picture = small.resize((SIDE * TWICE * 3 // 4,) * 2, Image.Resampling.NEAREST)
        panel = Panel(picture, picture.width / len(table))
        middle = np.full(2, len(table) / 2)
        panel.box(np.stack([middle - 0.5, middle + 0.5]), 2, INK)
        panels.append(panel)
    captions = [f"head {head}" for head in range(1, len(panels) + 1)]
    return sheet(panels, captions)


def swin(demo: Demo) -> Image.Image:
    """One query in DAT, and in a Swin."""
    model = load_swin(read(SWIN))
    stage = demo.model.deformable_layers[LAYER].stage
    place = demo.centre_xy + np.array([0.55, 0.1]) * demo.radius
    cell, centre = demo.cell(LAYER, place)
    points, attention = demo.attention(LAYER, cell)
    ours = demo.panel(0.25)
    of_keys = attention.weights[0, 0].numpy()
    for group, of_group in enumerate(points):
        for key in np.argsort(of_keys[group]):
            share = of_keys[group, key] / of_keys.max()
            ours.line(centre, of_group[key], 1 + 5 * share, GROUPS[group])
        for point in of_group:
            ours.dot(point, 5, GROUPS[group])
    ours.query(centre)

    stride, first = model.config.cell_geometry(stage)
    windows = model.config.windows(stage, model.config.depths[stage] - 1)
    columns = windows.map_size[1]
    column, row = (place // stride).astype(int)
    asked = torch.full((1, 1, MOST_QUERIES), int(row * columns + column))
    with torch.inference_mode():
        (weights,) = model.forward_explained(demo.images, (stage,), asked).attention
    of_cells = weights.weights[0, 0].sum(0).view(windows.padded_size).numpy()
    top, left, bottom, right = windows.seen_from(int(row), int(column))
    share = of_cells / of_cells.max()
    light = np.kron(share, np.ones((int(stride),) * 2))
    mask = Image.fromarray((40 + 215 * light).round().astype(np.uint8))
    picture = demo.picture.copy()
    dark = Image.new("RGB", picture.size, INK)
    picture.paste(dark, mask=mask.resize(picture.size, Image.Resampling.NEAREST).point(_inverse))
    theirs = Panel(picture, demo.enlarged)
    theirs.box(np.array([(left, top), (right, bottom)]) * stride, 3, PAPER)
    theirs.query(first + stride * np.array([column, row]))
    return sheet([ours, theirs], ("DAT, the points of its 16 keys", "Swin, the cells of a window"))


def _inverse(level: int) -> int:
    return (255 - level) * 3 // 4


def receptive(demo: Demo) -> Image.Image:
    """A point of the last layer, and the pixels on which what it reads depends."""
    attention = demo.model.deformable_layers[LAST].attention
    read_by: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda _, given: read_by.append(given[0]))
    images = demo.images.clone().requires_grad_()
    locations = demo.model.forward_explained(images).sampling_locations
    hook.remove()
    points = demo.points(LAST, [one.detach() for one in locations])
    key = int(np.linalg.norm(points[0] - demo.centre_xy, axis=-1).argmin())
    at = locations[LAST][0, 0].flatten(0, 1)[key].detach().flip(-1).view(1, 1, 1, 2)
    features = F.grid_sample(read_by[0].permute(0, 3, 1, 2), at, align_corners=True)
    features.square().sum().backward()
    assert images.grad is not None
    depends = images.grad[0].abs().sum(0).numpy()
    shown = np.clip(depends / np.quantile(depends, 0.995), 0, 1) ** 0.5
    place, heat = demo.panel(), Image.fromarray((255 * shown).round().astype(np.uint8))
    place.dot(points[0, key], 7, GROUPS[0])
    heated = Panel(
        heat.convert("RGB").resize(demo.picture.size, Image.Resampling.BICUBIC), demo.enlarged
    )
    heated.dot(points[0, key], 7, GROUPS[0])
    return sheet([place, heated], ("a sampling location", "the pixels that it depends on"))


def sheet(panels: Sequence[Panel], captions: Sequence[str]) -> Image.Image:
    """Panels side by side, each with its caption below."""
    pictures = [panel.picture.reduce(TWICE) for panel in panels]
    width = sum(picture.width for picture in pictures) + GAP * (len(pictures) + 1)
    height = pictures[0].height + 2 * GAP + CAPTION
    whole = Image.new("RGB", (width, height), PAPER)
    draw, font, left = ImageDraw.Draw(whole), ImageFont.load_default(16), GAP
    for picture, caption in zip(pictures, captions, strict=True):
        whole.paste(picture, (left, GAP))
        middle = left + picture.width / 2
        draw.text((middle, GAP + picture.height + CAPTION / 2 + 4), caption, INK, font, "mm")
        left += picture.width + GAP
    # Of many shades of the scene, and the few pixels of a dot in its own colour.
    return whole.quantize(200, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)


def bilinear() -> str:
    """Four cells around a sampling location, with their shares."""
    x, y, cell, start = 0.7, 0.35, 120, 70
    shares = {(i, j): (x if i else 1 - x) * (y if j else 1 - y) for i in (0, 1) for j in (0, 1)}
    drawn = []
    for (i, j), share in shares.items():
        left, top = start - cell // 2 + i * cell, start - cell // 2 + j * cell
        drawn.append(
            f'<rect x="{left}" y="{top}" width="{cell}" height="{cell}" fill="#e69f00" '
            f'fill-opacity="{share:.2f}" stroke="#141418"/>'
        )
        middle_x, middle_y = start + i * cell, start + j * cell
        drawn.append(f'<circle cx="{middle_x}" cy="{middle_y}" r="4" fill="#141418"/>')
        drawn.append(
            f'<text x="{middle_x - 8}" y="{middle_y - 12}" text-anchor="end">{share:.3f}</text>'
        )
    at_x, at_y = start + x * cell, start + y * cell
    drawn.append(
        f'<path d="M{start} {at_y}H{start + cell}M{at_x} {start}V{start + cell}" stroke="#141418" '
        'stroke-dasharray="4 4" fill="none"/>'
    )
    drawn.append(
        f'<circle cx="{at_x}" cy="{at_y}" r="8" fill="#56b4e9" stroke="#141418" stroke-width="2"/>'
    )
    side = 2 * cell + 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{side}" height="{side}" '
        f'viewBox="0 0 {side} {side}" font-family="sans-serif" font-size="14">\n'
        "<title>The shares of four cells in what is read at a sampling location</title>\n"
        f'<rect width="{side}" height="{side}" fill="#fafafa"/>\n' + "\n".join(drawn) + "\n</svg>\n"
    )


DRAWN: dict[str, Callable[[Demo], Image.Image]] = {
    draw.__name__: draw for draw in (offsets, queries, bias, swin, receptive)
}


def main() -> None:
    """Draw all pictures, or some of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=[*DRAWN, "bilinear"])
    parser.add_argument("--out", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    wanted = arguments.only or [*DRAWN, "bilinear"]
    arguments.out.mkdir(parents=True, exist_ok=True)
    demo = Demo()
    for name in wanted:
        if name == "bilinear":
            (arguments.out / "bilinear.svg").write_text(bilinear(), "utf-8")
        else:
            DRAWN[name](demo).save(arguments.out / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
