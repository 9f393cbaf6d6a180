"""What the queries of a deformable layer attend to.

Attention itself keeps no weights: its kernels never have them all. These are computed beside it,
from the queries, keys and sampling locations of the same forward pass, in the type of the
locations, for whoever asks.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.geometry import CHOSEN_QUERIES


class Asked(NamedTuple):
    """Whose attention is asked for, in one deformable layer.

    Attributes:
        cells: `(B, Q)`, int64, the cells of the queries, counted along the rows of the map. Minus
            one, minus two, ... stand for those that receive the most attention, the most first,
            at most `CHOSEN_QUERIES` of them.
        within: `(B, 2)`, int64, rows and columns of the map, from the first, among which these are
            chosen: what lies behind them is padding. `None` means that there is none.
    """

    cells: Tensor
    within: Tensor | None = None


class AttentionWeights(NamedTuple):
    """The attention of some queries of one deformable layer, and what its keys receive from all.

    A weight of an offset group is the sum of the softmax over the heads of the group.

    Attributes:
        cells: `(B, Q)`, int64, of the queries.
        weights: `(B, Q, G, Ns)`, of each key, `Ns = Hk * Wk` along the rows of the sampling points.
        received: `(B, G, Ns)`, the sum of the weights of all queries of the map.
    """

    cells: Tensor
    weights: Tensor
    received: Tensor


def bias_of_queries(table: Tensor, positions: Tensor, locations: Tensor) -> Tensor:
    """`model.attention.relative_position_bias` of queries anywhere.

    Args:
        table: `(heads, TH, TW)`.
        positions: `(B, Q, 2)`, (y, x), of the queries.
        locations: `(B, G, Hk, Wk, 2)`, (y, x).

    Returns:
        `(B, heads, Q, Hk * Wk)`.
    """
    B, G, Hk, Wk, _ = locations.shape
    heads, TH, TW = table.shape
    Q, Ns = positions.shape[1], Hk * Wk
    keys = locations.reshape(B, G, 1, Ns, 2)
    displacement_xy = ((positions.view(B, 1, Q, 1, 2) - keys) / 2).flip(-1)
    tables = table.to(locations.dtype).view(1, G, heads // G, TH, TW).expand(B, -1, -1, -1, -1)
    bias = F.grid_sample(
        tables.reshape(B * G, heads // G, TH, TW),
        displacement_xy.reshape(B * G, Q, Ns, 2),
        align_corners=True,
    )
    return bias.view(B, heads, Q, Ns)


def per_group(weights: Tensor, groups: int) -> Tensor:
    """Sum `(B, heads, ...)` over the heads of each offset group, to `(B, G, ...)`."""
    return weights.unflatten(1, (groups, -1)).sum(2)


def most_attended_cells(
    received: Tensor, locations: Tensor, size: tuple[int, int], within: Tensor | None
) -> Tensor:
    """The cells whose points receive the most attention, `(B, CHOSEN_QUERIES)`, the most first.

    A point counts for the cell nearest to it, in all groups alike.

    Args:
        received: `(B, G, Ns)`.
        locations: `(B, G, Hk, Wk, 2)`, (y, x).
        size: `(H, W)` of the map, at least `CHOSEN_QUERIES` cells.
        within: as in `Asked`; where that are fewer cells, others come last.
    """
    B = len(received)
    H, W = size
    row, column = (
        # A half is rounded up, and a point outside counts for the border.
        ((position + 1) * ((side - 1) / 2) + 0.5).floor().nan_to_num().clamp(0, side - 1).long()
        for position, side in zip(locations.unbind(-1), size, strict=True)
    )
    points = (row * W + column).reshape(B, -1)
    none = received.new_zeros(B, H * W)
    of_cells = torch.scatter_add(none, 1, points, received.reshape(B, -1))
    if within is not None:
        rows, columns = (torch.arange(side, device=received.device) for side in size)
        most_rows, most_columns = within.unsqueeze(-1).unbind(1)
        seen = (rows < most_rows).unsqueeze(2) & (columns < most_columns).unsqueeze(1)
        of_cells = torch.where(seen.view(B, -1), of_cells, -1.0)
    return of_cells.topk(CHOSEN_QUERIES).indices
