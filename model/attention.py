"""Deformable attention of DAT and DAT++, for inference.

Feature maps are channels-last tokens `(B, H, W, C)`. Positions are `(y, x)` in the coordinates
of `grid_sample` with `align_corners=True`: -1 and +1 are the centres of the first and the last
cell. They stay in float32 whatever the dtype of the features.

The projections are folded (see `checkpoint.py`): queries come out scaled by `head_dim ** -0.5`;
keys have no bias, which softmax cannot see; the bias of the values is part of `proj`.
"""

from collections.abc import Iterator
from math import prod
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from model import geometry
from model.attention_weights import (
    Asked,
    AttentionWeights,
    bias_of_queries,
    most_attended_cells,
    per_group,
)
from model.config import DatConfig
from model.fused import Stream, convolve, linear, linear_add
from model.head_attention import attend, stores_logits
from model.kernels import HALF, usable

# Above so many logits of one image, attention goes through the queries in bands of rows, each of
# so many logits of the batch: their whole matrix would take gigabytes on the maps of a detector.
BANDED_FROM = 1 << 23
BAND = 1 << 21

# From so many cells of a map on, the bias of DAT++ is cut from its table in slices. On less than
# that, the many small steps cost more than reading the table for every query and key.
SLICED_FROM = 1024


# Cells; the packed table has a border of one.
MOST_OFF_TABLE = 0.8


class Attended(NamedTuple):
    """What an attention layer returns.

    Attributes:
        stream: `(B, H, W, C)`, with what it adds to the residual.
        sampling_locations: `(B, G, Hk, Wk, 2)`, (y, x), or `None` from local attention.
        weights: where they were asked for.
    """

    stream: Stream
    sampling_locations: Tensor | None
    weights: AttentionWeights | None = None


class Attending(NamedTuple):
    """What the queries gathered, `(B, H, W, C)`, and what it was made of.

    Attributes:
        attended: before the output projection.
        queries: `(B, heads, HW, head_dim)`.
        keys: `(B, heads, Ns, head_dim)`.
        sampling_locations: `(B, G, Hk, Wk, 2)`, (y, x).
    """

    attended: Tensor
    queries: Tensor
    keys: Tensor
    sampling_locations: Tensor


class Projected(NamedTuple):
    """Queries, keys and values `(B, heads, N, head_dim)` with the bias `(B, heads, HW, Ns)`."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    bias: Tensor
    sampling_locations: Tensor


def grid_positions(rows: Tensor, columns: Tensor) -> Tensor:
    """`(H, W, 2)` of (y, x) from the positions of the rows `(H,)` and the columns `(W,)`."""
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)


def sample_features(tokens: Tensor, locations: Tensor) -> Tensor:
    """Read a feature map at learned positions, bilinearly and with zeros outside.

    The same as `grid_sample(..., mode="bilinear", padding_mode="zeros", align_corners=True)`
    of each group.

    Args:
        tokens: `(B, H, W, C)`.
        locations: `(B, G, Hk, Wk, 2)`, (y, x); group `g` reads channels `[g*C/G, (g+1)*C/G)`.

    Returns:
        `(B, Hk * Wk, C)`, in float32 or wider.
    """
    B, H, W, C = tokens.shape
    G = locations.shape[1]
    # `grid_sample` reads (x, y): in a map that lies on its side, those are our (y, x). Of a
    # single image it is a view of the tokens.
    maps = tokens.to(locations.dtype).permute(0, 3, 2, 1).reshape(B * G, C // G, W, H)
    sampled = F.grid_sample(maps, locations.flatten(0, 1), align_corners=True)
    return sampled.view(B, C, -1).transpose(1, 2).contiguous()


def relative_position_bias(
    table: Tensor, query_rows: Tensor, query_columns: Tensor, locations: Tensor
) -> Tensor:
    """Continuous relative position bias: the table read at halved displacements.

    The displacement of query `i` from key `n` is `(query_i - location_n) / 2`, with the
    location of the group that owns the head; outside the table the bias is zero.

    Args:
        table: `(heads, TH, TW)`.
        query_rows: `(H,)`, positions of the rows of queries.
        query_columns: `(W,)`.
        locations: `(B, G, Hk, Wk, 2)`, (y, x).

    Returns:
        `(B, heads, H * W, Hk * Wk)`.
    """
    B, G, Hk, Wk, _ = locations.shape
    heads, TH, TW = table.shape
    H, W, Ns = len(query_rows), len(query_columns), Hk * Wk
    # A table on its side is read at (y, x), as in `sample_features`. The queries, repeated for
    # every key, depend on nothing and leave one subtraction of long rows to do.
    queries = grid_positions(query_rows, query_columns).mul(0.5).view(H * W, 1, 2)
    repeated = queries.expand(-1, Ns, -1).reshape(1, H * W, Ns * 2)
    displacements = repeated.sub(locations.reshape(B * G, 1, Ns * 2), alpha=0.5)
    on_side = table.to(locations.dtype).transpose(1, 2).view(1, G, heads // G, TW, TH)
    bias = F.grid_sample(
        on_side.expand(B, -1, -1, -1, -1).reshape(B * G, heads // G, TW, TH),
        displacements.view(B * G, H * W, Ns, 2),
        align_corners=True,
    )
    return bias.view(B, heads, H * W, Ns)


def relative_position_bias_in_bands(
    table: Tensor, query_rows: Tensor, query_columns: Tensor, locations: Tensor, rows: int
) -> Iterator[Tensor]:
    """`relative_position_bias` of so many rows of queries after the other.

    Between two bands only the vertical displacements change. Every row is a batch entry of its
    own: on the CPU, `grid_sample` has one thread for each.

    Yields:
        `(B, rows, heads, W, Hk * Wk)`, the last with the rows that are left.
    """
    B, G, Hk, Wk, _ = locations.shape
    heads, TH, TW = table.shape
    W, Ns = len(query_columns), Hk * Wk
    y, x = (locations.reshape(B, 1, G, 1, Ns, 2) * 0.5).unbind(-1)
    displacement_xy = locations.new_empty(B, rows, G, W, Ns, 2)
    displacement_xy[..., 0] = query_columns.view(1, 1, 1, W, 1) * 0.5 - x
    tables = table.to(locations.dtype).view(1, G, heads // G, TH, TW)
    tables = tables.expand(B * rows, -1, -1, -1, -1).flatten(0, 1)
    for band in query_rows.split(rows):
        part = displacement_xy[:, : len(band)]
        part[..., 1] = band.view(1, -1, 1, 1, 1) * 0.5 - y
        grid = part.flatten(0, 2)
        bias = F.grid_sample(tables[: len(grid)], grid, align_corners=True)
        yield bias.view(B, len(band), heads, W, Ns)


def relative_position_bias_by_slices(
    table: Tensor, size: tuple[int, int], locations: Tensor
) -> Tensor:
    """`relative_position_bias` for DAT++ at the size for which its table was made.

    There one step between queries is one step in the table, so the queries of a key share the
    fractional part: the bias of a key is one `(H + 1, W + 1)` slice of the table, interpolated
    once along each axis.

    Args:
        table: `(heads, 2 * H - 1, 2 * W - 1)`.
        size: `(H, W)` of the map of queries.
        locations: `(B, G, Hk, Wk, 2)`, (y, x), inside [-1, 1].

    Returns:
        `(B, heads, H * W, Hk * Wk)`.
    """
    B, G, Hk, Wk, _ = locations.shape
    heads = table.shape[0]
    (H, W), Ns = size, Hk * Wk
    y, x = locations.reshape(B, G, Ns, 2).unbind(-1)
    # Row of the table for query row 0; rounding must not push it below the table.
    row = ((1 - y) * ((H - 1) / 2)).clamp(0, H - 1)
    column = ((1 - x) * ((W - 1) / 2)).clamp(0, W - 1)
    first_row, first_column = row.nan_to_num().floor(), column.nan_to_num().floor()
    # The extra row and column are read with weight 0 alone.
    padded = F.pad(table.to(locations.dtype), (0, 1, 0, 1))
    slices = padded.unfold(1, H + 1, 1).unfold(2, W + 1, 1)  # (heads, H, W, H + 1, W + 1)
    group = torch.arange(G, device=table.device).view(1, G, 1)
    taken = slices.unflatten(0, (G, heads // G))[
        group, :, first_row.long(), first_column.long()
    ]  # (B, G, Ns, heads / G, H + 1, W + 1)
    taken = torch.lerp(taken[..., :-1, :], taken[..., 1:, :], _per_slice(row - first_row))
    taken = torch.lerp(taken[..., :-1], taken[..., 1:], _per_slice(column - first_column))
    return (
        taken.reshape(B, G, Ns, heads // G, H * W)
        .permute(0, 1, 3, 4, 2)
        .reshape(B, heads, H * W, Ns)
    )


def _per_slice(weight: Tensor) -> Tensor:
    return weight[..., None, None, None]


def _rounded(positions: NDArray[np.float64]) -> Tensor:
    """Positions computed in float64, in the default type of torch and on its default device."""
    return torch.tensor(positions, dtype=torch.get_default_dtype())


def _of_each_row(tensor: Tensor, rows: int) -> Tensor:
    """Repeat each entry `(B, ...)` for so many rows of queries, to `(B * rows, ...)`."""
    return tensor.unsqueeze(1).expand(-1, rows, *tensor.shape[1:]).flatten(0, 1)


class DeformableAttention(nn.Module):
    """Deformable multi-head attention of DAT (arXiv:2201.00520, section 3.2).

    Queries ask keys and values that are sampled at learned positions: the reference points of
    a regular grid, each moved by an offset that a small network reads off the queries. The
    positions of a group are shared by all queries of its heads.

    Attributes:
        limited: whether an offset has a limit, `reach`.
        reference_points: `(Hk, Wk, 2)`, (y, x), float32.
    """

    limited: ClassVar[bool] = True
    reference_points: Tensor
    query_rows: Tensor
    query_columns: Tensor
    reach: Tensor

    def __init__(self, config: DatConfig, stage: int) -> None:
        super().__init__()
        spec = config.stages[stage]
        self._packed: tuple[Tensor, Tensor, int | None] | None = None
        self.heads, self.offset_groups = spec.heads, spec.offset_groups
        self.offset_stride = spec.offset_stride
        self.offset_range_factor = config.offset_range_factor
        channels = spec.dim // spec.offset_groups
        self.q = nn.Linear(spec.dim, spec.dim)
        self.kv = nn.Linear(spec.dim, 2 * spec.dim, bias=False)
        self.proj = nn.Linear(spec.dim, spec.dim)
        kernel = spec.offset_kernel
        self.offset_conv = nn.Conv2d(
            channels, channels, kernel, spec.offset_stride, kernel // 2, groups=channels
        )
        self.offset_norm = nn.LayerNorm(channels)
        self.offset_proj = nn.Linear(channels, 2, bias=False)
        table_height, table_width = config.map_size(stage, (config.table_size, config.table_size))
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros(spec.heads, 2 * table_height - 1, 2 * table_width - 1)
        )
        self.fit(config.map_size(stage))

    def fit(self, size: tuple[int, int]) -> None:
        """Make the geometry for a map of `(H, W)` cells."""
        self.size = size
        # Odd kernels with half their size as padding: Hk = ceil(H / stride).
        key_size = [-(-side // self.offset_stride) for side in size]
        self.register_buffer(
            "reference_points",
            grid_positions(*map(self.reference_axis, key_size)),
            persistent=False,
        )
        self.register_buffer(
            "reach", self.offset_range_factor / torch.tensor(key_size), persistent=False
        )
        for name, side in zip(("query_rows", "query_columns"), size, strict=True):
            self.register_buffer(name, self.query_axis(side), persistent=False)

    @staticmethod
    def reference_axis(size: int) -> Tensor:
        """Positions `(size,)` of the reference points along one axis: inside (-1, 1), symmetric."""
        return _rounded(geometry.reference_axis("dat", size))

    @staticmethod
    def query_axis(size: int) -> Tensor:
        """Positions `(size,)` of the queries along one axis, as the bias sees them."""
        return _rounded(geometry.query_axis("dat", size))

    def move(self, offsets: Tensor) -> Tensor:
        """Sampling locations from raw offsets, both `(B, G, Hk, Wk, 2)`.

        A point moves at most `offset_range_factor` half cells of the key grid, and may leave the
        map.
        """
        return torch.addcmul(self.reference_points, offsets.tanh(), self.reach)

    def bias(self, locations: Tensor) -> Tensor:
        """Bias `(B, heads, HW, Ns)` of keys at the locations `(B, G, Hk, Wk, 2)`."""
        return relative_position_bias(
            self.relative_position_bias_table, self.query_rows, self.query_columns, locations
        )

    def project(self, tokens: Tensor) -> Projected:
        """All that attention needs, from the normed tokens `(B, H, W, C)`."""
        queries, keys, values, locations = self._sampled(tokens)
        bias = self.bias(locations).to(tokens.dtype)
        return Projected(queries, keys, values, bias, locations)

    def _sampled(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values `(B, heads, N, head_dim)`, and where the keys are from."""
        B, H, W, C = tokens.shape
        q = linear(self.q, tokens)
        locations = self.move(self._offsets(q))
        sampled = sample_features(tokens, locations).to(tokens.dtype)
        per_head = linear(self.kv, sampled).view(B, -1, 2, self.heads, C // self.heads)
        keys, values = per_head.unbind(2)
        queries = q.view(B, H * W, self.heads, -1)
        return queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), locations

    def forward(self, tokens: Tensor, residual: Tensor, asked: Asked | None = None) -> Attended:
        """Attend from the normed tokens `(B, H, W, C)` and add to the residual.

        What is asked for changes nothing of the rest.
        """
        H, _ = self.size
        logits_of_row = self._logits_of_row()
        if usable(tokens):
            attending = self._attend_by_kernels(tokens)
        elif H * logits_of_row > BANDED_FROM:
            rows = max(1, BAND // (len(tokens) * logits_of_row))
            attending = self._attend_in_bands(tokens, rows)
        else:
            queries, keys, values, bias, locations = self.project(tokens)
            q, k, v = (part.transpose(1, 2) for part in (queries, keys, values))
            attended = attend(q, k, v, bias).reshape(tokens.shape)
            attending = Attending(attended, queries, keys, locations)
        weights = None if asked is None else self._weights(attending, asked)
        attended, locations = attending.attended, attending.sampling_locations
        del attending  # queries and keys are memory that what follows can have
        return Attended(linear_add(self.proj, attended, residual), locations, weights)

    def _logits_of_row(self) -> int:
        """Of one row of queries of one image."""
        return self.heads * self.size[1] * prod(self.reference_points.shape[:2])

    def _attend_by_kernels(self, tokens: Tensor) -> Attending:
        """What `forward` projects, without the bias and the attention matrix in memory."""
        from model.kernels.offsets import sample_keys  # noqa: PLC0415

        queries = self.q(tokens)
        sampled, locations = sample_keys(
            tokens,
            queries,
            self.offset_conv,
            self.offset_norm,
            self.offset_proj,
            self.reference_points,
            self.reach if self.limited else None,
        )
        queries, keys_values = queries.flatten(1, 2), self.kv(sampled)
        attended = self.attend_by_kernel(queries, keys_values, locations)
        keys, _ = keys_values.chunk(2, -1)
        return Attending(
            attended.view(tokens.shape), self._per_head(queries), self._per_head(keys), locations
        )

    def _per_head(self, vectors: Tensor) -> Tensor:
        """`(B, N, C)` as `(B, heads, N, head_dim)`."""
        return vectors.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attend_by_kernel(self, queries: Tensor, keys_values: Tensor, locations: Tensor) -> Tensor:
        """Attend to sampled keys, as `model.kernels.deformable_attention.attend`."""
        from model.kernels import deformable_attention, packed_attention  # noqa: PLC0415

        geometry = (self.query_rows, self.query_columns, locations)
        if queries.dtype in HALF:
            return packed_attention.attend(
                queries,
                keys_values,
                self.packed_table(),
                *geometry,
                clamped=self._leaves_table(),
                fits=not self.limited and self._table_fits(),
            )
        table = self.relative_position_bias_table
        return deformable_attention.attend(queries, keys_values, table, *geometry)

    def packed_table(self) -> Tensor:
        """The table as the kernel for half precision reads it, made when its weights are new."""
        from model.kernels.packed_attention import pack  # noqa: PLC0415

        table = self.relative_position_bias_table
        # A table of inference mode counts no versions.
        version = None if table.is_inference() else table._version
        if self._packed is not None:
            packed, made_of, made_at = self._packed
            same = made_of.data_ptr() == table.data_ptr()
            if same and version is not None and version == made_at:
                return packed
        packed = pack(table.detach())
        # The old table is kept, so that no new one is at its address.
        self._packed = (packed, table.detach(), version)
        return packed

    def _table_fits(self) -> bool:
        """Whether the table is of the size of the map."""
        H, W = self.size
        return self.relative_position_bias_table.shape[1:] == (2 * H - 1, 2 * W - 1)

    def _leaves_table(self) -> bool:
        """Whether a key can lie so far out that a displacement is over a cell off the table."""
        farthest = (self.offset_range_factor - 1) * self.offset_stride - 1
        return self.limited and farthest / 2 > MOST_OFF_TABLE

    def _attend_in_bands(self, tokens: Tensor, rows: int) -> Attending:
        """What `forward` projects, so many rows of queries at a time."""
        queries, keys, values, locations = self._sampled(tokens)
        biases = relative_position_bias_in_bands(
            self.relative_position_bias_table, self.query_rows, self.query_columns, locations, rows
        )
        attended = []
        if stores_logits(tokens):
            k, v = (part.contiguous().transpose(1, 2) for part in (keys, values))
            by_row = queries.unflatten(2, self.size).permute(0, 2, 3, 1, 4)
            for band, bias in zip(by_row.split(rows, 1), biases, strict=True):
                part = attend(band.flatten(1, 2), k, v, bias.transpose(1, 2))
                attended.append(part.reshape(len(tokens), -1, tokens.shape[-1]))
        else:
            by_row = queries.unflatten(2, self.size).transpose(1, 2)  # (B, H, heads, W, head_dim)
            for band, bias in zip(by_row.split(rows, 1), biases, strict=True):
                k, v = (_of_each_row(tensor, band.shape[1]) for tensor in (keys, values))
                mask = bias.flatten(0, 1).to(tokens.dtype)
                part = F.scaled_dot_product_attention(band.flatten(0, 1), k, v, mask, scale=1.0)
                attended.append(part.transpose(1, 2).reshape(len(tokens), -1, tokens.shape[-1]))
        return Attending(torch.cat(attended, 1).view(tokens.shape), queries, keys, locations)

    def _weights(self, attending: Attending, asked: Asked) -> AttentionWeights:
        """What the queries that are asked for attend to."""
        _, queries, keys, locations = attending
        queries, keys = queries.to(locations.dtype), keys.to(locations.dtype)
        received = per_group(self._received(queries, keys, locations), self.offset_groups)
        chosen = most_attended_cells(received, locations, self.size, asked.within)
        rank = (-1 - asked.cells).clamp(0, chosen.shape[1] - 1)
        cells = torch.where(asked.cells < 0, chosen.gather(1, rank), asked.cells)
        grid = grid_positions(self.query_rows, self.query_columns).view(-1, 2)
        positions = grid.index_select(0, cells.flatten()).view(*cells.shape, 2)
        per_head = cells.view(len(cells), 1, -1, 1).expand(-1, self.heads, -1, keys.shape[3])
        taken = queries.gather(2, per_head)
        bias = bias_of_queries(self.relative_position_bias_table, positions, locations)
        weights = (taken @ keys.transpose(-1, -2) + bias).softmax(-1)
        return AttentionWeights(
            cells, per_group(weights, self.offset_groups).transpose(1, 2), received
        )

    def _received(self, queries: Tensor, keys: Tensor, locations: Tensor) -> Tensor:
        """The sum `(B, heads, Ns)` of the softmax over all queries."""
        B, logits_of_row = len(queries), self._logits_of_row()
        H, _ = self.size
        if B * H * logits_of_row <= BANDED_FROM:
            return (queries @ keys.transpose(-1, -2) + self.bias(locations)).softmax(-1).sum(2)
        rows = max(1, BAND // (B * logits_of_row))
        biases = relative_position_bias_in_bands(
            self.relative_position_bias_table, self.query_rows, self.query_columns, locations, rows
        )
        by_row = queries.unflatten(2, self.size).transpose(1, 2)  # (B, H, heads, W, head_dim)
        of_keys = keys.transpose(-1, -2).unsqueeze(1)
        received = torch.zeros_like(keys[..., 0])
        for band, bias in zip(by_row.split(rows, 1), biases, strict=True):
            received = received + (band @ of_keys + bias).softmax(-1).sum((1, 3))
        return received

    def attention_weights(self, tokens: Tensor) -> Tensor:
        """Softmax `(B, heads, HW, Ns)` of the forward pass over the same tokens."""
        queries, keys, _, bias, _ = self.project(tokens)
        return (queries @ keys.transpose(-1, -2) + bias).softmax(-1)

    def _offsets(self, q: Tensor) -> Tensor:
        """Raw offsets `(B, G, Hk, Wk, 2)`, (y, x), from the queries `(B, H, W, C)`."""
        G = self.offset_groups
        if self.offset_conv.groups == q.shape[-1]:
            mixed = convolve(self.offset_conv, q)
        else:
            # All groups share one network: its depthwise kernels repeat along the channels.
            maps = F.conv2d(
                q.permute(0, 3, 1, 2),
                self.offset_conv.weight.repeat(G, 1, 1, 1),
                self.offset_conv.bias.repeat(G) if self.offset_conv.bias is not None else None,
                stride=self.offset_stride,
                padding=self.offset_conv.padding,
                groups=q.shape[-1],
            )
            mixed = maps.permute(0, 2, 3, 1)
        per_group = mixed.unflatten(-1, (G, -1))  # (B, Hk, Wk, G, C / G)
        offsets = self.offset_proj(F.gelu(self.offset_norm(per_group)))
        return offsets.permute(0, 3, 1, 2, 4).to(self.reference_points.dtype)


class DeformableAttentionPP(DeformableAttention):
    """Deformable attention of DAT++ (arXiv:2309.01430): unbounded offsets, clamped positions."""

    limited = False

    @staticmethod
    def reference_axis(size: int) -> Tensor:
        """Positions `(size,)` of the reference points: the checkpoints' own grid.

        It lies half a cell towards the end of the axis, where it leaves [-1, 1].
        """
        return _rounded(geometry.reference_axis("dat_pp", size))

    @staticmethod
    def query_axis(size: int) -> Tensor:
        """Positions `(size,)` of the queries: the centres of the cells."""
        return _rounded(geometry.query_axis("dat_pp", size))

    def move(self, offsets: Tensor) -> Tensor:
        """Sampling locations inside [-1, 1] from raw offsets, both `(B, G, Hk, Wk, 2)`."""
        return (self.reference_points + offsets).clamp(-1, 1)

    def bias(self, locations: Tensor) -> Tensor:
        """Bias `(B, heads, HW, Ns)` of keys at the locations `(B, G, Hk, Wk, 2)`."""
        H, W = self.size
        fits = self._table_fits()
        # A runtime would store all slices of the table, as torch does not.
        if fits and H * W >= SLICED_FROM and not torch.compiler.is_exporting():
            return relative_position_bias_by_slices(
                self.relative_position_bias_table, self.size, locations
            )
        return super().bias(locations)
