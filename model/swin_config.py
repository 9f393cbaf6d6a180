"""What a Swin classifier is made of, and where its windows lie.

Swin: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV
2021, arXiv:2103.14030. The DAT paper compares its attention with that of Swin (figure 7). Sizes,
padding and shifts are those of the implementation in transformers (`model.swin`).

Nothing here needs torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from model.config import LARGEST_SIZE, sides

# Names of variants: a checkpoint of transformers, and the demo model of this repository.
SWINS = ("swin", "swin_nano")
_MOST_STAGES, _MOST_BLOCKS, _MOST_CHANNELS = 8, 100, 16384


@dataclass(frozen=True)
class Windows:
    """The windows of one block, which cover its map from the first cell on.

    A map that is no multiple of the window is padded at the right and at the bottom. The cells of
    the padding are keys like the others: the network does not mask them.

    Attributes:
        map_size: `(H, W)`, cells.
        side: of a window, cells.
        shift: by how many cells the windows of a shifted block begin later; 0 in the others.
    """

    map_size: tuple[int, int]
    side: int
    shift: int

    @property
    def padded_size(self) -> tuple[int, int]:
        """`(H, W)` with the padding, cells."""
        height, width = (ceil(cells / self.side) * self.side for cells in self.map_size)
        return height, width

    def seen_from(self, row: int, column: int) -> tuple[int, int, int, int]:
        """The keys of a query: `(top, left, bottom, right)` in cells, the last two excluded.

        The shift wraps windows around the map; a mask keeps apart what does not lie together, so
        that a query at the border sees a part of a window.
        """
        (top, bottom), (left, right) = (
            self._span(index, cells)
            for index, cells in zip((row, column), self.padded_size, strict=True)
        )
        return top, left, bottom, right

    def _span(self, index: int, cells: int) -> tuple[int, int]:
        if index < self.shift:
            return 0, self.shift
        start = index - (index - self.shift) % self.side
        return start, min(start + self.side, cells)


@dataclass(frozen=True)
class SwinConfig:
    """One Swin classifier.

    Attributes:
        name: the variant's name, one of `SWINS`.
        dim: channels of the first stage; each stage has twice those of the one before.
        depths: blocks of each stage.
        heads: attention heads of each stage.
        window: side of a window, cells.
        patch: side of the patch that a cell of the first stage is made of, pixels.
        mlp_ratio: hidden channels of an MLP as a multiple of its channels.
        qkv_bias: whether queries, keys and values have a bias.
        norm_eps: of the layer norms of the blocks.
        image_size: `(H, W)` of the input, pixels; given as one number, a square.
        num_classes: outputs of the head.
        crop: whether an image is resized to 256/224 of the input and cropped, as for the published
            DAT, or straight to the input, as transformers does for Swin.
    """

    name: str
    dim: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int = 7
    patch: int = 4
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    norm_eps: float = 1e-5
    image_size: tuple[int, int] = (224, 224)
    num_classes: int = 1000
    crop: bool = False

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            ValueError: they contradict each other, or are those of a damaged file.
        """
        stages = len(self.depths)
        if not 1 <= stages <= _MOST_STAGES or len(self.heads) != stages:
            raise ValueError(
                f"{self.name}: a Swin has 1 to {_MOST_STAGES} stages, each with its blocks and "
                f"heads; got depths {list(self.depths)} and heads {list(self.heads)}"
            )
        if not all(1 <= depth <= _MOST_BLOCKS for depth in self.depths):
            raise ValueError(
                f"{self.name}: a stage has 1 to {_MOST_BLOCKS} blocks; got {list(self.depths)}"
            )
        channels = [self.channels(stage) for stage in range(stages)]
        if not 1 <= self.dim <= channels[-1] <= _MOST_CHANNELS or any(
            heads < 1 or of_stage % heads
            for heads, of_stage in zip(self.heads, channels, strict=True)
        ):
            raise ValueError(
                f"{self.name}: heads share the channels of their stage, at most {_MOST_CHANNELS}; "
                f"got {list(self.heads)} for {channels}"
            )
        if not 0 < self.mlp_ratio <= 16 or not self.norm_eps > 0 or self.num_classes < 1:
            raise ValueError(
                f"{self.name}: got mlp_ratio {self.mlp_ratio}, layer_norm_eps {self.norm_eps} and "
                f"{self.num_classes} classes"
            )
        if not (2 <= self.window <= LARGEST_SIZE and 1 <= self.patch <= LARGEST_SIZE):
            raise ValueError(
                f"{self.name}: got windows of {self.window} cells and patches of {self.patch} "
                "pixels a side"
            )
        object.__setattr__(self, "image_size", sides(self.image_size))
        height, width = self.image_size
        if not all(1 <= side <= LARGEST_SIZE for side in self.image_size):
            raise ValueError(
                f"{self.name}: sizes are from 1 to {LARGEST_SIZE} pixels; got {height}x{width}"
            )
        least = min(self.map_size(stages - 1))
        if least < self.window:
            raise ValueError(
                f"{self.name}: at {height}x{width} pixels a map has a side of {least} cells, less "
                f"than a window of {self.window}; give an image_size of at least "
                f"{(self.window - 1) * (self.patch << (stages - 1)) + 1} pixels a side"
            )

    def channels(self, stage: int) -> int:
        """Of a stage."""
        return self.dim << stage

    def map_size(self, stage: int, image_size: tuple[int, int] | None = None) -> tuple[int, int]:
        """`(H, W)` of the feature map of a stage, cells."""
        cell = self.patch << stage
        height, width = image_size or self.image_size
        return ceil(height / cell), ceil(width / cell)

    def cell_geometry(self, stage: int) -> tuple[float, float]:
        """Where the cells of a stage lie in the input: `(stride, first)` in pixels.

        They tile it: the centre of cell `i` is at `first + stride * i`, with the origin at the
        edge of the first pixel.
        """
        stride = float(self.patch << stage)
        return stride, stride / 2

    def windows(self, stage: int, block: int) -> Windows:
        """Those of a block: shifted by half a window in every second one of a stage.

        A map with a side of one window has no shift.
        """
        size = self.map_size(stage)
        shifted = block % 2 == 1 and min(size) > self.window
        return Windows(size, self.window, self.window // 2 if shifted else 0)

    @classmethod
    def of_json(cls, stored: Mapping[str, Any]) -> "SwinConfig":
        """From the fields that a file of this repository keeps.

        Raises:
            ValueError: they are not those of a Swin.
        """
        tuples = {
            name: _numbers(name, stored.get(name)) for name in ("depths", "heads", "image_size")
        }
        try:
            return cls(**{**stored, **tuples})
        except TypeError as fault:
            raise ValueError(f"not the configuration of a Swin: {fault}") from fault

    @classmethod
    def of_transformers(cls, stored: Mapping[str, Any], num_classes: int) -> "SwinConfig":
        """From the `config.json` that transformers writes beside the weights.

        Args:
            stored: its content.
            num_classes: outputs of the head that the weights have.

        Raises:
            ValueError: it is of another model, or of a Swin that is not served.
        """
        if stored.get("model_type") != "swin":
            raise ValueError(f"is of a {stored.get('model_type')!r}, expected a 'swin'")
        for name, expected in {
            "num_channels": 3,
            "use_absolute_embeddings": False,
            "hidden_act": "gelu",
        }.items():
            if stored.get(name, expected) != expected:
                raise ValueError(
                    f"has {name} {stored[name]!r}; a Swin is served with {expected!r} alone"
                )
        size = stored.get("image_size", 224)

        def number(name: str, default: int) -> int:
            return _number(name, stored.get(name, default))

        return cls(
            "swin",
            dim=number("embed_dim", 96),
            depths=_numbers("depths", stored.get("depths", (2, 2, 6, 2))),
            heads=_numbers("num_heads", stored.get("num_heads", (3, 6, 12, 24))),
            window=number("window_size", 7),
            patch=number("patch_size", 4),
            mlp_ratio=float(stored.get("mlp_ratio", 4.0)),
            qkv_bias=bool(stored.get("qkv_bias", True)),
            norm_eps=float(stored.get("layer_norm_eps", 1e-5)),
            image_size=_size(_numbers("image_size", (size, size) if _is_number(size) else size)),
            num_classes=num_classes,
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(name: str, value: Any) -> int:
    if not _is_number(value):
        raise ValueError(f"has {name} {value!r:.50}, expected a whole number")
    return int(value)


def _numbers(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or not all(map(_is_number, value)):
        raise ValueError(f"has {name} {value!r:.50}, expected a list of whole numbers")
    return tuple(value)


def _size(sides: tuple[int, ...]) -> tuple[int, int]:
    if len(sides) != 2:
        raise ValueError(f"has image_size {list(sides)}, expected a side, or height and width")
    return sides[0], sides[1]
