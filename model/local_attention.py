"""Local attention: windows of DAT, neighbourhoods of DAT++.

Windows are those of Swin (arXiv:2103.14030), neighbourhoods those of NAT (arXiv:2204.07143) as
NATTEN 0.14.6 computes them.

Both work on channels-last tokens `(B, H, W, C)`, cut the map into tiles of queries by a fixed
index, and attend inside each tile with one additive bias that holds the relative position bias
and the mask. Queries come out of `qkv` scaled by `head_dim ** -0.5` (see `checkpoint.py`).

The bias depends on parameters only: in evaluation mode it is laid out once, when parameters are
loaded, the mode is set or the table was written to. In training mode, and where the table wants a
gradient, it is laid out in every call.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Attended
from model.config import DatConfig
from model.fused import linear, linear_add
from model.head_attention import attend
from model.kernels import usable

OUTSIDE_WINDOW = -100.0  # the checkpoints' own mask between regions of a shifted window
# From so many tiles of neighbourhoods on, those of a kind share their bias: it would take
# hundreds of megabytes on the maps of a detector.
SHARED_FROM = 65
# So that rows of a bias are read in pieces of 16 bytes and without a mask.
PADDED_KEYS = 64


class LocalAttention(nn.Module):
    """What windows and neighbourhoods share; subclasses lay out tiles and bias.

    Attributes:
        laid_out_bias: `(tiles or 1, heads, queries, keys)`, float32, or `None` in training mode;
            keys padded with -inf to a multiple of `PADDED_KEYS`.
        bias_index: `(tiles,)`, which of these each tile has.
        place: `(H * W,)`, where the answer for a cell is among the queries of all tiles.
    """

    laid_out_bias: Tensor | None
    bias_index: Tensor
    place: Tensor
    relative_position_bias_table: nn.Parameter

    def __init__(self, config: DatConfig, stage: int) -> None:
        super().__init__()
        spec = config.stages[stage]
        self.heads = spec.heads
        self.qkv = nn.Linear(spec.dim, 3 * spec.dim)
        self.proj = nn.Linear(spec.dim, spec.dim)
        self.register_buffer("laid_out_bias", None, persistent=False)
        self._laid_out_at: int | None = None
        self.register_load_state_dict_post_hook(_lay_out_again)

    def train(self, mode: bool = True) -> Self:
        """Set the mode and lay out the bias for it."""
        super().train(mode)
        self._lay_out(mode)
        return self

    def _lay_out(self, training: bool) -> None:
        with torch.inference_mode(mode=False), torch.no_grad():
            self.laid_out_bias = None if training else _padded(self.lay_out_bias())
        self._laid_out_at = _version(self.relative_position_bias_table)

    def bias(self) -> Tensor:
        """Bias and mask of every tile, as the weights are now; keys may be padded with -inf."""
        table = self.relative_position_bias_table
        if self.laid_out_bias is None or (torch.is_grad_enabled() and table.requires_grad):
            return self.lay_out_bias()
        if not torch.compiler.is_compiling() and self._laid_out_at != _version(table):
            # An optimizer or a moving average wrote to it. A compiler knows no versions.
            self._lay_out(training=False)
        return self.laid_out_bias

    def lay_out_bias(self) -> Tensor:
        """Bias and mask of every tile, `(tiles or 1, heads, queries, keys)`."""
        raise NotImplementedError

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend inside tiles.

        Args:
            queries: `(B, tiles, N, C)`.
            keys: `(B, tiles, M, C)`.
            values: `(B, tiles, M, C)`.

        Returns:
            `(B, tiles * N, C)`.
        """
        return self.attend_with(self.bias()[..., : keys.shape[2]], queries, keys, values)

    def attend_with(self, bias: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """`attend` with a given bias, one of all tiles or one for each."""
        B, tiles, _, C = queries.shape
        q, k, v = (
            part.reshape(B * tiles, -1, self.heads, C // self.heads)
            for part in (queries, keys, values)
        )
        return attend(q, k, v, bias).reshape(B, -1, C)

    def attend_by_index(self, qkv: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        """Attend inside tiles by the fused kernel, straight from the map and back to it.

        Args:
            qkv: `(B, H * W, 3 * C)`.
            query_index: `(tiles, N)`, cells of the map.
            key_index: `(tiles, M)`.

        Returns:
            `(B, H * W, C)`.
        """
        from model.kernels.local_attention import attend_in_tiles  # noqa: PLC0415

        return attend_in_tiles(
            qkv, self.bias(), self.bias_index, query_index, key_index, self.place
        )


def _version(table: Tensor) -> int | None:
    """Counts what was written to a tensor; one of inference mode does not count."""
    return None if table.is_inference() else table._version


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    """The tokens `(B, M, C)` at the index `(M,)` of `(B, N, C)`."""
    if len(tokens) == 1:
        # Torch shares among its threads only what is taken along the first axis.
        return tokens[0].index_select(0, index).unsqueeze(0)
    return tokens.index_select(1, index)


def _padded(bias: Tensor) -> Tensor:
    more = -bias.shape[-1] % PADDED_KEYS
    return F.pad(bias, (0, more), value=float("-inf")).contiguous()


def _lay_out_again(module: nn.Module, _: object) -> None:
    module.train(module.training)


class WindowAttention(LocalAttention):
    """Attention inside windows, shifted or not (`S`, `L` of DAT).

    The shift is `ceil(window / 2)`, one cell more than Swin's for odd windows.
    """

    order: Tensor
    relative_position_index: Tensor
    mask: Tensor

    def __init__(self, config: DatConfig, stage: int, *, shifted: bool) -> None:
        super().__init__(config, stage)
        H, W = config.map_size(stage)
        window = self.window = config.window
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * window - 1) ** 2, self.heads)
        )
        shift = (window + 1) // 2 if shifted else 0
        cells = torch.arange(H * W).view(H, W).roll((-shift, -shift), (0, 1))
        order = _windows(cells, window).flatten()
        windows = torch.arange(len(order) // window**2)
        y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        y, x = y.flatten(), x.flatten()
        dy, dx = (axis[:, None] - axis + window - 1 for axis in (y, x))  # query minus key
        for name, value in {
            "order": order,
            "place": order.argsort(),
            "bias_index": windows if shifted else torch.zeros_like(windows),
            "relative_position_index": dy * (2 * window - 1) + dx,
            "mask": _shift_mask(H, W, window, shift) if shifted else torch.zeros(1, 1, 1),
        }.items():
            self.register_buffer(name, value, persistent=False)

    def lay_out_bias(self) -> Tensor:
        """Bias and mask, `(windows or 1, heads, window ** 2, window ** 2)`."""
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        return bias + self.mask.unsqueeze(1)

    def forward(self, tokens: Tensor, residual: Tensor) -> Attended:
        """Attend from the normed tokens `(B, H, W, C)` and add to the residual."""
        B, _, _, C = tokens.shape
        if usable(tokens) and not self.training:
            windows = self.order.view(-1, self.window**2)
            attended = self.attend_by_index(self.qkv(tokens.flatten(1, 2)), windows, windows)
        else:
            in_windows = _take(tokens.flatten(1, 2), self.order)
            qkv = linear(self.qkv, in_windows).view(B, -1, self.window**2, 3 * C)
            attended = _take(self.attend(*qkv.split(C, -1)), self.place)
        return Attended(linear_add(self.proj, attended.view(tokens.shape), residual), None)


class NeighborhoodAttention(LocalAttention):
    """Attention of every query to the neighbourhood around it (`N` of DAT++).

    At a border the neighbourhood moves inwards, so every query has `window ** 2` real keys. A
    map with a side under `window` is padded with zero tokens first, which take part as keys.
    Queries are taken in square tiles, each with the union of its neighbourhoods as keys; an axis
    of at most two windows is one tile. Tiles whose neighbourhoods lie alike, as all do that
    touch no border, are of one kind.
    """

    query_index: Tensor
    key_index: Tensor
    table_index: Tensor
    mask: Tensor

    def __init__(self, config: DatConfig, stage: int) -> None:
        super().__init__(config, stage)
        window = self.window = config.window
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros(self.heads, 2 * window - 1, 2 * window - 1)
        )
        self.fit(config.map_size(stage))

    def fit(self, size: tuple[int, int]) -> None:
        """Make the geometry for a map of `(H, W)` cells."""
        window, self.size = self.window, size
        H, W = self.padded = max(size[0], window), max(size[1], window)
        rows, columns = _AxisTiles(H, window), _AxisTiles(W, window)
        kind = _cross(rows.kind * len(columns.inside), columns.kind, torch.add)
        inside = _cross(rows.inside, columns.inside, torch.logical_and)
        table_index = _cross(rows.displacement * (2 * window - 1), columns.displacement, torch.add)
        order = bias_index = torch.arange(len(kind))
        self.runs = [(slice(None), slice(None))]  # of tiles, with their biases
        if len(kind) >= SHARED_FROM:
            order = kind.argsort(stable=True)
            bias_index = kind[order]
            ends = kind.bincount().cumsum(0).tolist()
            self.runs = [
                (slice(start, end), slice(index, index + 1))
                for index, (start, end) in enumerate(pairwise([0, *ends]))
            ]
        else:
            inside, table_index = inside[kind], table_index[kind]
        tile = order.argsort()[rows.tile[:, None] * len(columns.queries) + columns.tile]
        slot = rows.slot[:, None] * columns.queries.shape[1] + columns.slot
        place = tile * rows.queries.shape[1] * columns.queries.shape[1] + slot
        for name, value in {
            "query_index": _cross(rows.queries * W, columns.queries, torch.add)[order],
            "key_index": _cross(rows.keys * W, columns.keys, torch.add)[order],
            "place": place[: size[0], : size[1]].flatten(),
            "bias_index": bias_index,
            "table_index": table_index.where(inside, 0),
            "mask": torch.zeros(inside.shape).masked_fill(~inside, -torch.inf),
        }.items():
            self.register_buffer(name, value, persistent=False)

    def lay_out_bias(self) -> Tensor:
        """Bias and mask, `(tiles or kinds, heads, queries, keys)`."""
        bias = self.relative_position_bias_table.flatten(1)[
            :, self.table_index
        ]  # (heads, tiles, queries, keys)
        return bias.transpose(0, 1) + self.mask.unsqueeze(1)

    def attend_with(self, bias: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """`attend`, kind by kind where tiles share their bias."""
        if len(self.runs) == 1:
            return super().attend_with(bias, queries, keys, values)
        attended = [
            super(NeighborhoodAttention, self).attend_with(
                bias[of_run], *(part[:, run] for part in (queries, keys, values))
            )
            for run, of_run in self.runs
        ]
        return torch.cat(attended, 1)

    def forward(self, tokens: Tensor, residual: Tensor) -> Attended:
        """Attend from the normed tokens `(B, H, W, C)` and add to the residual."""
        B, H, W, C = tokens.shape
        (PH, PW), tiles = self.padded, len(self.query_index)
        if usable(tokens) and not self.training and (PH, PW) == (H, W):
            qkv = self.qkv(tokens.flatten(1, 2))
            attended = self.attend_by_index(qkv, self.query_index, self.key_index)
            return Attended(linear_add(self.proj, attended.view(B, H, W, C), residual), None)
        if (PH, PW) != (H, W):
            tokens = F.pad(tokens, (0, 0, 0, PW - W, 0, PH - H))
        qkv = linear(self.qkv, tokens.flatten(1, 2))
        if tiles == 1:
            # It holds the whole map in its own order.
            attended = self.attend(*qkv.unsqueeze(1).split(C, -1))
        else:
            q, kv = qkv.split((C, 2 * C), -1)
            q = _take(q, self.query_index.flatten()).view(B, tiles, -1, C)
            kv = _take(kv, self.key_index.flatten()).view(B, tiles, -1, 2 * C)
            attended = self.attend(q, *kv.split(C, -1))
        if len(self.place) != attended.shape[1] or tiles > 1:
            attended = _take(attended, self.place)
        return Attended(linear_add(self.proj, attended.view(B, H, W, C), residual), None)


class _AxisTiles:
    """Tiles of queries along one axis, with the keys that their neighbourhoods reach.

    Attributes:
        queries: `(tiles, length)`, cells; the last tile overlaps the one before it where the
            axis is no multiple of their length.
        tile: `(size,)`, the tile that answers for a cell.
        slot: `(size,)`, its place among the queries of that tile.
        keys: `(tiles, reached)`, cells.
        kind: `(tiles,)`, equal for tiles whose neighbourhoods lie alike.
        displacement: `(kinds, length, reached)`, key minus query plus `window - 1`.
        inside: of the same shape, whether the key is in the neighbourhood of the query.
    """

    def __init__(self, size: int, window: int) -> None:
        reach, last = window // 2, size - window
        length = size if size <= 2 * window else window
        reached = min(length + window - 1, size)
        starts = [min(start, size - length) for start in range(0, size, length)]
        # From the first query of a tile: where its keys and the neighbourhoods of its queries
        # begin.
        alike = [
            (
                min(max(start - reach, 0), size - reached) - start,
                *(min(max(start + query - reach, 0), last) - start for query in range(length)),
            )
            for start in starts
        ]
        kinds = list(dict.fromkeys(alike))
        first = torch.tensor(starts)
        self.queries = first[:, None] + torch.arange(length)
        cells = torch.arange(size)
        self.tile = cells // length
        self.slot = cells - first[self.tile]
        first_key = (first - reach).clamp(0, size - reached)
        self.keys = first_key[:, None] + torch.arange(reached)
        self.kind = torch.tensor([kinds.index(tile) for tile in alike])
        begins = torch.tensor(kinds)
        key = begins[:, :1, None] + torch.arange(reached)  # (kinds, 1, reached)
        begin = begins[:, 1:, None]
        self.inside = (key >= begin) & (key < begin + window)
        self.displacement = key - torch.arange(length)[:, None] + window - 1


def _cross(rows: Tensor, columns: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combine `(t, n, ...)` of the rows with `(u, m, ...)` of the columns to `(t*u, n*m, ...)`."""
    shape = [a * b for a, b in zip(rows.shape, columns.shape, strict=True)]
    for axis in range(rows.ndim):
        rows, columns = rows.unsqueeze(2 * axis + 1), columns.unsqueeze(2 * axis)
    return combine(rows, columns).reshape(shape)


def _windows(cells: Tensor, window: int) -> Tensor:
    """`(H, W)` cut into `(windows, window ** 2)`."""
    H, W = cells.shape
    cut = cells.view(H // window, window, W // window, window)
    return cut.transpose(1, 2).reshape(-1, window**2)


def _shift_mask(H: int, W: int, window: int, shift: int) -> Tensor:
    """Mask `(windows, window ** 2, window ** 2)` between parts that the shift brought together."""
    row, column = (
        torch.bucketize(torch.arange(side), torch.tensor([side - window, side - shift]), right=True)
        for side in (H, W)
    )
    region = _windows(row[:, None] * 3 + column, window)
    return torch.where(region[:, :, None] == region[:, None], 0.0, OUTSIDE_WINDOW)
