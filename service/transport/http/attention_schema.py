"""How attention looks in the JSON of the HTTP interface."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from service.tasks.attention import AttendedLayer, AttendedQuery


class GroupKeyBody(BaseModel):
    """A key of an offset group, as one query sees it."""

    key: int = Field(description="Counted along the rows of the points.")
    weight: float = Field(description="Sum of the softmax over the heads of the group.")
    point: list[float] = Field(description="[x, y] of its point in the group.")


class KeyBody(BaseModel):
    """A key over all offset groups, as one query sees it."""

    key: int = Field(description="Counted along the rows of the points.")
    weight: float = Field(description="Sum of the softmax over all heads.")
    points: list[list[float]] = Field(description="[x, y] of its point in each group.")


class AttentionQueryBody(BaseModel):
    """What one query attends to."""

    row: int = Field(description="Of its cell in the map of the layer, from 0.")
    column: int
    centre: list[float] = Field(description="[x, y] of that cell.")
    groups: list[list[GroupKeyBody]] = Field(description="In each group the best keys, in order.")
    keys: list[KeyBody] = Field(description="The best over all groups, in order.")
    window: list[float] | None = Field(
        None, description="Of a Swin: [x1, y1, x2, y2] around the cells that the query sees."
    )


class AttentionLayerBody(BaseModel):
    """The attention in one layer; positions are as in the points, groups of a Swin its heads."""

    stage: int = Field(description="Stage, from 0.", examples=[3])
    block: int = Field(description="Block in its stage, from 0.", examples=[1])
    received: list[list[list[float]]] = Field(
        description="Offset groups, rows, columns: the sum of the weights that each point has for "
        "all queries of the map."
    )
    queries: list[AttentionQueryBody] = Field(
        description="In the order of the request, or the most attended first."
    )

    @classmethod
    def of(cls, layer: AttendedLayer) -> "AttentionLayerBody":
        """The attention in a layer as the core gives it."""
        return cls.model_construct(
            stage=layer.stage,
            block=layer.block,
            received=_weights(layer.received),
            queries=[_attended(query) for query in layer.queries],
        )


def _attended(query: AttendedQuery) -> AttentionQueryBody:
    of_groups = zip(
        query.group_keys.tolist(),
        _weights(query.group_weights),
        rounded_pixels(query.group_points),
        strict=True,
    )
    of_all = zip(
        query.keys.tolist(), _weights(query.weights), rounded_pixels(query.points), strict=True
    )
    row, column = query.cell
    window = query.window
    return AttentionQueryBody.model_construct(
        row=row,
        column=column,
        centre=rounded_pixels(np.array(query.centre, np.float32)),
        groups=[
            [
                GroupKeyBody.model_construct(key=key, weight=weight, point=point)
                for key, weight, point in zip(*group, strict=True)
            ]
            for group in of_groups
        ],
        keys=[
            KeyBody.model_construct(key=key, weight=weight, points=points)
            for key, weight, points in of_all
        ],
        window=None if window is None else rounded_pixels(np.array(window, np.float32)),
    )


def rounded_pixels(points: NDArray[np.float32]) -> list[Any]:
    """Points as nested lists, rounded to a hundredth of a pixel: no model is more precise."""
    nested: list[Any] = points.astype(np.float64).round(2).tolist()
    return nested


def _weights(weights: NDArray[np.float32]) -> Any:
    """Weights as nested lists, rounded to a millionth: float32 is no more exact."""
    return weights.astype(np.float64).round(6).tolist()
