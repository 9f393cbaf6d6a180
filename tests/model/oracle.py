"""DAT and DAT++ once more, slowly: float64 numpy, one query at a time, no code of `model`.

Written from a description of the official code and under its names: the weights are an official
state dict, the numbers those of a `DatConfig`. Maps are `(H, W, C)` and hold one image. Points
are `(y, x)`, where -1 and +1 are the centres of the first and the last cell.
"""

from collections.abc import Callable, Iterable, Mapping
from math import ceil, erf, floor

import numpy as np
from numpy.typing import ArrayLike, NDArray

from model.config import DatConfig

Array = NDArray[np.float64]
Neighbour = tuple[int, int, Array]  # row and column of a key, its bias for every head


class Oracle:
    """A classifier with all the time in the world.

    Args:
        config: the numbers of the variant.
        state: its official state dict, without buffers.
    """

    def __init__(self, config: DatConfig, state: Mapping[str, ArrayLike]) -> None:
        self.config = config
        self.state = {key: np.asarray(tensor, np.float64) for key, tensor in state.items()}
        self.locations: list[Array] = []

    def classify(self, image: Array) -> tuple[Array, list[Array]]:
        """Logits `(num_classes,)` of a normalised image `(3, H, W)`.

        Also the sampling locations `(G, Hk, Wk, 2)` of every deformable layer, in order.
        """
        self.locations = []
        x = self.stem(image.transpose(1, 2, 0))
        for stage, spec in enumerate(self.config.stages):
            if stage:
                x = self.downsample(f"down_projs.{stage - 1}", x)
            for block, kind in enumerate(spec.blocks):
                x = self.block(stage, block, kind, x)
        return self.linear("cls_head", self.norm("cls_norm", x).mean((0, 1))), self.locations

    def stem(self, x: Array) -> Array:
        if self.config.family == "dat":
            return self.norm("patch_proj.1", self.convolve("patch_proj.0", x, 4, 0))
        x = gelu(self.norm("patch_proj.1", self.convolve("patch_proj.0", x, 2, 1)))
        return self.norm("patch_proj.4", self.convolve("patch_proj.3", x, 2, 1))

    def downsample(self, key: str, x: Array) -> Array:
        padding = 0 if self.config.family == "dat" else 1
        return self.norm(f"{key}.1", self.convolve(f"{key}.0", x, 2, padding))

    def block(self, stage: int, block: int, kind: str, x: Array) -> Array:
        key = f"stages.{stage}"
        if self.config.family == "dat_pp":
            x = x + self.convolve(f"{key}.local_perception_units.{block}", x, 1, 1)
        normed = self.norm(f"{key}.layer_norms.{2 * block}", x)
        x = x + self.attention(f"{key}.attns.{block}", stage, kind, normed)
        normed = self.norm(f"{key}.layer_norms.{2 * block + 1}", x)
        return x + self.mlp(f"{key}.mlps.{block}", normed)

    def mlp(self, key: str, x: Array) -> Array:
        if self.config.family == "dat":
            hidden = self.linear(f"{key}.chunk.linear1", x)
            return self.linear(f"{key}.chunk.linear2", gelu(hidden))
        hidden = self.linear(f"{key}.linear1.0", x)
        hidden = hidden + self.convolve(f"{key}.dwc", hidden, 1, 1)
        return self.linear(f"{key}.linear2.0", gelu(hidden))

    def attention(self, key: str, stage: int, kind: str, x: Array) -> Array:
        if kind == "D":
            return self.deformable(key, stage, x)
        if kind == "N":
            return self.neighbourhoods(key, stage, x)
        return self.windows(key, stage, x, ceil(self.config.window / 2) if kind == "S" else 0)

    def windows(self, key: str, stage: int, x: Array, shift: int) -> Array:
        """Attention inside the windows of a map rolled by `-shift`."""
        window, (H, W, _) = self.config.window, x.shape
        table = self.state[f"{key}.relative_position_bias_table"]

        def region(row: int, column: int) -> tuple[int, int]:
            return (
                (row >= H - window) + (row >= H - shift),
                (column >= W - window) + (column >= W - shift),
            )

        def neighbours(row: int, column: int) -> Iterable[Neighbour]:
            top, left = row - row % window, column - column % window
            for key_row in range(top, top + window):
                for key_column in range(left, left + window):
                    dy, dx = row - key_row + window - 1, column - key_column + window - 1
                    bias = table[dy * (2 * window - 1) + dx]
                    if shift and region(key_row, key_column) != region(row, column):
                        bias = bias - 100
                    yield key_row, key_column, bias

        rolled = np.roll(x, (-shift, -shift), (0, 1))
        attended = self.local(f"{key}.proj_qkv", stage, rolled, neighbours)
        return self.linear(f"{key}.proj_out", np.roll(attended, (shift, shift), (0, 1)))

    def neighbourhoods(self, key: str, stage: int, x: Array) -> Array:
        """Attention to the neighbourhood of each query, which moves inwards at a border."""
        window, (H, W, _) = self.config.window, x.shape
        bottom, right = max(window, H), max(window, W)
        padded = np.pad(x, ((0, bottom - H), (0, right - W), (0, 0)))
        table = self.state[f"{key}.rpb"]

        def neighbours(row: int, column: int) -> Iterable[Neighbour]:
            top = min(max(row - window // 2, 0), bottom - window)
            left = min(max(column - window // 2, 0), right - window)
            for key_row in range(top, top + window):
                for key_column in range(left, left + window):
                    dy, dx = key_row - row + window - 1, key_column - column + window - 1
                    yield key_row, key_column, table[:, dy, dx]

        attended = self.local(f"{key}.qkv", stage, padded, neighbours)
        return self.linear(f"{key}.proj", attended[:H, :W])

    def local(
        self, qkv: str, stage: int, x: Array, neighbours: Callable[[int, int], Iterable[Neighbour]]
    ) -> Array:
        """Attention of each query to the keys that `neighbours(row, column)` lists."""
        heads = self.config.stages[stage].heads
        q, k, v = (split(part, heads) for part in np.split(self.linear(qkv, x), 3, -1))
        attended = np.empty_like(x)
        for row, column in np.ndindex(x.shape[:2]):
            rows, columns, biases = map(list, zip(*neighbours(row, column), strict=True))
            attended[row, column] = attend(
                q[row, column], k[rows, columns], v[rows, columns], np.stack(biases)
            )
        return attended

    def deformable(self, key: str, stage: int, x: Array) -> Array:
        """Attention of all queries to keys at learned points."""
        spec = self.config.stages[stage]
        H, W, _ = x.shape
        q = self.linear(f"{key}.proj_q", x)
        locations = [
            self.move(self.offsets(f"{key}.conv_offset", stage, part))
            for part in np.split(q, spec.offset_groups, -1)
        ]  # of each group (Hk, Wk, 2)
        self.locations.append(np.stack(locations))
        points = [location.reshape(-1, 2) for location in locations]
        sampled = read(x, points)  # (Ns, C)
        k = split(self.linear(f"{key}.proj_k", sampled), spec.heads)
        v = split(self.linear(f"{key}.proj_v", sampled), spec.heads)
        table = self.state[f"{key}.rpe_table"].transpose(1, 2, 0)
        queries = split(q, spec.heads)
        attended = np.empty_like(x)
        for row, column in np.ndindex(H, W):
            query = np.array((self.query(row, H), self.query(column, W)))
            bias = read(table, [(query - at) / 2 for at in points])  # (Ns, heads)
            attended[row, column] = attend(queries[row, column], k, v, bias)
        return self.linear(f"{key}.proj_out", attended)

    def offsets(self, key: str, stage: int, q: Array) -> Array:
        """Raw offsets `(Hk, Wk, 2)` from the queries of one group."""
        spec = self.config.stages[stage]
        mixed = self.convolve(f"{key}.0", q, spec.offset_stride, spec.offset_kernel // 2)
        return self.linear(f"{key}.3", gelu(self.norm(f"{key}.1", mixed)))

    def move(self, offsets: Array) -> Array:
        """Sampling locations from raw offsets, both `(Hk, Wk, 2)`."""
        locations = np.empty_like(offsets)
        for index in np.ndindex(offsets.shape):
            i, n, offset = index[index[2]], offsets.shape[index[2]], offsets[index]
            if self.config.family == "dat":
                reach = self.config.offset_range_factor / n
                locations[index] = 2 * (i + 0.5) / n - 1 + np.tanh(offset) * reach
            else:
                locations[index] = min(max(2 * (i + 0.5) / (n - 1) - 1 + offset, -1), 1)
        return locations

    def query(self, i: int, n: int) -> float:
        """Position of query `i` of `n` along an axis, as the bias sees it."""
        return 2 * (i + 0.5) / n - 1 if self.config.family == "dat" else 2 * i / (n - 1) - 1

    def linear(self, key: str, x: Array) -> Array:
        """A linear layer or a 1x1 convolution."""
        weight = self.state[f"{key}.weight"]
        return x @ weight.reshape(len(weight), -1).T + self.state.get(f"{key}.bias", 0)

    def convolve(self, key: str, x: Array, stride: int, padding: int) -> Array:
        """A convolution: dense, or depthwise where the kernel has one input channel."""
        weight = self.state[f"{key}.weight"]
        size, depthwise = weight.shape[2], weight.shape[1] == 1
        padded = np.pad(x, ((padding, padding), (padding, padding), (0, 0)))
        rows, columns = ((side - size) // stride + 1 for side in padded.shape[:2])
        out = np.empty((rows, columns, len(weight)))
        for row, column in np.ndindex(rows, columns):
            top, left = row * stride, column * stride
            patch = padded[top : top + size, left : left + size]
            out[row, column] = (
                np.einsum("hwn,nhw->n", patch, weight[:, 0])
                if depthwise
                else np.einsum("hwc,nchw->n", patch, weight)
            )
        return out + self.state.get(f"{key}.bias", 0)

    def norm(self, key: str, x: Array) -> Array:
        centred: Array = x - x.mean(-1, keepdims=True)
        deviation: Array = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        weight, bias = self.state[f"{key}.norm.weight"], self.state[f"{key}.norm.bias"]
        return centred / deviation * weight + bias


def gelu(x: Array) -> Array:
    area: Array = np.vectorize(erf)(x / np.sqrt(2))
    return x * (1 + area) / 2


def split(x: Array, heads: int) -> Array:
    """`(..., C)` to `(..., heads, C / heads)`."""
    return x.reshape(*x.shape[:-1], heads, -1)


def attend(query: Array, keys: Array, values: Array, bias: Array) -> Array:
    """One query `(heads, d)` asks keys and values `(N, heads, d)`, with a bias `(N, heads)`.

    Returns:
        `(heads * d,)`.
    """
    scores = np.einsum("hd,nhd->nh", query, keys) * query.shape[-1] ** -0.5 + bias
    weights = np.exp(scores - scores.max(0))
    attended: Array = np.einsum("nh,nhd->hd", weights / weights.sum(0), values)
    return attended.ravel()


def read(maps: Array, points: list[Array]) -> Array:
    """Read each group of the channels `(H, W, C)` at its own points `(N, 2)`.

    Returns:
        `(N, C)`.
    """
    groups = zip(np.split(maps, len(points), -1), points, strict=True)
    return np.concatenate([bilinear(cells, at) for cells, at in groups], -1)


def bilinear(cells: Array, points: Array) -> Array:
    """Read `(H, W, C)` at points `(N, 2)`, with zeros outside.

    Every cell of the map takes part, by how much nearer than one cell the point is.

    Returns:
        `(N, C)`.
    """
    near_rows, near_columns = (
        np.maximum(0, 1 - np.abs((points[:, [axis]] + 1) * (side - 1) / 2 - np.arange(side)))
        for axis, side in enumerate(cells.shape[:2])
    )
    values: Array = np.einsum("nw,nwc->nc", near_columns, np.tensordot(near_rows, cells, 1))
    return values


def bicubic(table: Array, height: int, width: int) -> Array:
    """Resize `(TH, TW)` to `(height, width)` as `F.interpolate(mode="bicubic")` does by default.

    Cubic convolution with a = -0.75 between the centres of cells. Beyond the border its cells
    repeat, and nothing is smoothed where the table shrinks.
    """
    TH, TW = table.shape
    resized = np.zeros((height, width))
    for row, column in np.ndindex(height, width):
        y, x = (row + 0.5) * TH / height - 0.5, (column + 0.5) * TW / width - 0.5
        for cell_y in range(floor(y) - 1, floor(y) + 3):
            for cell_x in range(floor(x) - 1, floor(x) + 3):
                cell = table[min(max(cell_y, 0), TH - 1), min(max(cell_x, 0), TW - 1)]
                resized[row, column] += cubic(y - cell_y) * cubic(x - cell_x) * cell
    return resized


def cubic(distance: float) -> float:
    """The weight of a cell at a distance, for a = -0.75."""
    d = abs(distance)
    if d <= 1:
        return 1.25 * d**3 - 2.25 * d**2 + 1
    return -0.75 * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0
