"""The attention of Deformable DETR as a drop-in for that of DAT, to compare the two.

Zhu et al., "Deformable DETR", ICLR 2021, arXiv:2010.04159, equation 2 (one scale); layers and
their order as in github.com/fundamentalvision/Deformable-DETR (`MSDeformAttn`, commit 11169a6).
The paper of DAT (arXiv:2201.00520) compares the two in its appendix A.

Here every query has sampling points of its own, in each head, and reads from the query alone how
much each of them counts. DAT shares its points among the queries of a group, which is why it can
afford keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Attended, grid_positions
from model.config import DatConfig
from model.fused import linear, linear_add


class DeformableDetrAttention(nn.Module):
    """Weighted sums of values sampled around each query, for inference.

    In the terms of `model.attention` the heads are the groups, the queries the rows and the
    points of a query the columns of its grid of keys.

    Attributes:
        reference_points: `(H * W, points, 2)`, (y, x), float32: the cell of the query.
    """

    reference_points: Tensor
    query_rows: Tensor
    query_columns: Tensor

    def __init__(self, config: DatConfig, stage: int) -> None:
        super().__init__()
        spec = config.stages[stage]
        self.heads, self.points = spec.heads, spec.points
        self.offset_proj = nn.Linear(spec.dim, spec.heads * spec.points * 2)
        self.weight_proj = nn.Linear(spec.dim, spec.heads * spec.points)
        self.value_proj = nn.Linear(spec.dim, spec.dim)
        self.proj = nn.Linear(spec.dim, spec.dim)
        H, W = config.map_size(stage)
        rows, columns = (torch.arange(side, dtype=torch.get_default_dtype()) for side in (H, W))
        reference = grid_positions(normalised(rows, H), normalised(columns, W)).view(-1, 1, 2)
        for name, value in {
            "reference_points": reference.repeat(1, spec.points, 1),
            "query_rows": rows.repeat_interleave(W).view(-1, 1, 1),
            "query_columns": columns.repeat(H).view(-1, 1, 1),
        }.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, tokens: Tensor, residual: Tensor) -> Attended:
        """Attend from the normed tokens `(B, H, W, C)`.

        Sampling locations are `(B, heads, H * W, points, 2)`; they may lie outside of the map.
        """
        B, H, W, C = tokens.shape
        per_query = (B, H * W, self.heads, self.points)
        # In cells, x first as in the official layer; the sums have the type of the geometry.
        x, y = linear(self.offset_proj, tokens).view(*per_query, 2).unbind(-1)
        rows, columns = self.query_rows + y, self.query_columns + x
        weights = linear(self.weight_proj, tokens).view(per_query).softmax(-1, dtype=rows.dtype)
        attended = weighted_samples(linear(self.value_proj, tokens), rows, columns, weights)
        locations = torch.stack((normalised(rows, H), normalised(columns, W)), -1)
        merged = attended.to(tokens.dtype).view(B, H, W, C)
        return Attended(linear_add(self.proj, merged, residual), locations.transpose(1, 2))


def normalised(cells: Tensor, size: int) -> Tensor:
    """Positions along an axis of `size` cells, from cells to the coordinates of `model.attention`.

    An axis of one cell has no such scale; it takes that of two.
    """
    return cells * (2 / max(size - 1, 1)) - 1


def weighted_samples(values: Tensor, rows: Tensor, columns: Tensor, weights: Tensor) -> Tensor:
    """Sum a map over the points of each query, read bilinearly and with zeros outside.

    The four corners of all points of a query and head are one weighted gather: the sampled
    values themselves, `points` times the size of the map, are never stored.

    Args:
        values: `(B, H, W, C)`; head `h` reads channels `[h*C/heads, (h+1)*C/heads)`.
        rows: `(B, N, heads, points)`, in cells; NaN lies outside.
        columns: likewise.
        weights: likewise, what each point counts.

    Returns:
        `(B, N, C)`, in the type of the weights.
    """
    B, H, W, C = values.shape
    _, N, heads, points = weights.shape
    # Outside counts as zero because there are cells of zeros around the map, which the points
    # that lie farther away are moved to.
    padded = F.pad(values.to(weights.dtype), (0, 0, 1, 2, 1, 2))
    rows, columns = (
        cells.nan_to_num(-1).clamp(-1, side) + 1 for cells, side in ((rows, H), (columns, W))
    )
    corner_weights = _split(weights, rows.frac(), columns.frac())
    image, head = (torch.arange(n, dtype=torch.int32, device=values.device) for n in (B, heads))
    cell = (image.view(-1, 1, 1, 1) * (H + 3) + rows.int()) * (W + 3) + columns.int()
    first = cell * heads + head.view(-1, 1)
    right, below = heads, (W + 3) * heads
    corners = torch.stack((first, first + right, first + below, first + below + right), -1)
    return F.embedding_bag(
        corners.view(-1, 4 * points),
        padded.view(-1, C // heads),
        per_sample_weights=corner_weights.view(-1, 4 * points),
        mode="sum",
    ).view(B, N, C)


def _split(weights: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """What each point counts, `(...)`, shared among its four corners, `(..., 4)`."""
    lower = weights * down
    upper = weights - lower
    lower_right, upper_right = lower * right, upper * right
    return torch.stack((upper - upper_right, upper_right, lower - lower_right, lower_right), -1)
