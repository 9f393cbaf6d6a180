"""DAT and DAT++ written the straightforward way, as the model to be faster than.

Eager, channels-first, one operation after another in the order of the papers and in the style of
the official code (github.com/LeapLabTHU/DAT): every LayerNorm permutes to channels-last and back,
projections are 1x1 convolutions, and the relative position bias samples its table once per
(query, key) pair. Parameter names are those of the official checkpoints. It shares no code with
the `model` package, so agreement between the two is evidence for both.

Neighborhood attention unfolds keys and values. The official code calls the NATTEN 0.14 extension
instead, whose later releases have no bias; a real kernel is faster than this, so read ratios on
DAT++ as ratios to plain PyTorch.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class BaselineConfig:
    """One published model; tuples have one entry per stage, `groups` 0 where nothing deforms."""

    plus_plus: bool
    dims: tuple[int, int, int, int]
    heads: tuple[int, int, int, int]
    groups: tuple[int, int, int, int]
    blocks: tuple[str, str, str, str]


CONFIGS = {
    "dat_tiny_224": BaselineConfig(
        plus_plus=False,
        dims=(96, 192, 384, 768),
        heads=(3, 6, 12, 24),
        groups=(0, 0, 3, 6),
        blocks=("LS", "LS", "LD" * 3, "LD"),
    ),
    "dat_pp_tiny_224": BaselineConfig(
        plus_plus=True,
        dims=(64, 128, 256, 512),
        heads=(2, 4, 8, 16),
        groups=(1, 2, 4, 8),
        blocks=("ND", "ND" * 2, "ND" * 9, "DD"),
    ),
}
IMAGE_SIZE, WINDOW = 224, 7


class ChannelLayerNorm(nn.Module):
    """LayerNorm over the channels of a `(B, C, H, W)` map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each position."""
        x = x.permute(0, 2, 3, 1).contiguous()
        return self.norm(x).permute(0, 3, 1, 2).contiguous()  # type: ignore[no-any-return]


class TokenMlp(nn.Module):
    """The MLP of DAT: two linear layers over flattened tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.chunk = nn.Sequential()
        self.chunk.add_module("linear1", nn.Linear(dim, 4 * dim))
        self.chunk.add_module("act", nn.GELU())
        self.chunk.add_module("linear2", nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to the same shape."""
        tokens = x.flatten(2).transpose(1, 2).contiguous()
        return self.chunk(tokens).transpose(1, 2).reshape_as(x)  # type: ignore[no-any-return]


class ConvMlp(nn.Module):
    """The MLP of DAT++: 1x1 convolutions around a residual depthwise 3x3."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Sequential(nn.Conv2d(dim, 4 * dim, 1))
        self.dwc = nn.Conv2d(4 * dim, 4 * dim, 3, padding=1, groups=4 * dim)
        self.linear2 = nn.Sequential(nn.Conv2d(4 * dim, dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to the same shape."""
        x = self.linear1(x)
        x = x + self.dwc(x)
        return self.linear2(F.gelu(x))  # type: ignore[no-any-return]


class WindowAttention(nn.Module):
    """Attention inside windows that tile the map, or that map rolled by half a window."""

    relative_position_index: Tensor
    attn_mask: Tensor

    def __init__(self, dim: int, heads: int, side: int, *, shifted: bool) -> None:
        super().__init__()
        self.heads, self.shift = heads, (WINDOW + 1) // 2 if shifted else 0
        self.proj_qkv = nn.Linear(dim, 3 * dim)
        self.proj_out = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * WINDOW - 1) ** 2, heads))
        y, x = torch.meshgrid(torch.arange(WINDOW), torch.arange(WINDOW), indexing="ij")
        y, x = y.flatten(), x.flatten()
        dy, dx = y[:, None] - y, x[:, None] - x
        index = (dy + WINDOW - 1) * (2 * WINDOW - 1) + dx + WINDOW - 1
        self.register_buffer("relative_position_index", index)
        if shifted:
            band = torch.zeros(side, dtype=torch.long)
            band[-WINDOW:] = 1
            band[-self.shift :] = 2
            region = 3 * band[:, None] + band
            region = region.reshape(side // WINDOW, WINDOW, -1, WINDOW).transpose(1, 2)
            region = region.reshape(-1, WINDOW**2)
            mask = torch.where(region[:, :, None] == region[:, None, :], 0.0, -100.0)
            self.register_buffer("attn_mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over a `(B, C, H, W)` map."""
        batch, channels, height, width = x.shape
        rows, columns, length = height // WINDOW, width // WINDOW, WINDOW**2
        x = torch.roll(x, (-self.shift, -self.shift), dims=(2, 3)) if self.shift else x
        x = x.reshape(batch, channels, rows, WINDOW, columns, WINDOW).permute(0, 2, 4, 3, 5, 1)
        q, k, v = (
            part.reshape(-1, length, self.heads, channels // self.heads).transpose(1, 2)
            for part in self.proj_qkv(x.reshape(-1, length, channels)).chunk(3, dim=-1)
        )
        scores = torch.einsum("bhmc,bhnc->bhmn", q * q.shape[-1] ** -0.5, k)
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        scores = scores + bias.reshape(length, length, self.heads).permute(2, 0, 1)
        if self.shift:
            per_window = scores.reshape(batch, rows * columns, self.heads, length, length)
            scores = (per_window + self.attn_mask[None, :, None]).reshape_as(scores)
        x = torch.einsum("bhmn,bhnc->bhmc", scores.softmax(dim=-1), v)
        x = self.proj_out(x.transpose(1, 2).reshape(-1, length, channels))
        x = x.reshape(batch, rows, columns, WINDOW, WINDOW, channels).permute(0, 5, 1, 3, 2, 4)
        x = x.reshape(batch, channels, height, width)
        return torch.roll(x, (self.shift, self.shift), dims=(2, 3)) if self.shift else x


class NeighborhoodAttention(nn.Module):
    """Attention to the 7x7 neighborhood, moved inwards at the borders; keys are unfolded."""

    kernel = 7

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rpb = nn.Parameter(torch.zeros(heads, 2 * self.kernel - 1, 2 * self.kernel - 1))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over a `(B, C, H, W)` map."""
        batch, _, height, width = x.shape
        x = x.permute(0, 2, 3, 1)
        qkv = self.qkv(x).reshape(batch, height, width, 3, self.heads, -1)
        q, k, v = qkv.permute(3, 0, 4, 1, 2, 5)
        y, x_ = (self._neighbors(length, x.device) for length in (height, width))
        # Heads before positions: the fastest of the unfoldings tried.
        k, v = (t[:, :, y[:, None, :, None], x_[None, :, None, :]].flatten(4, 5) for t in (k, v))
        scores = torch.einsum("bhyxc,bhyxnc->bhyxn", q * q.shape[-1] ** -0.5, k)
        scores = scores + self._bias(y, x_)
        x = torch.einsum("bhyxn,bhyxnc->byxhc", scores.softmax(dim=-1), v).flatten(3)
        return self.proj(x).permute(0, 3, 1, 2).contiguous()  # type: ignore[no-any-return]

    def _neighbors(self, length: int, device: torch.device) -> Tensor:
        """Indices of the neighbors of each position of an axis, `(length, kernel)`."""
        position = torch.arange(length, device=device)
        start = (position - self.kernel // 2).clamp(0, length - self.kernel)
        return start[:, None] + torch.arange(self.kernel, device=device)

    def _bias(self, y: Tensor, x: Tensor) -> Tensor:
        """Bias of every (query, neighbor) pair, `(heads, H, W, kernel * kernel)`."""
        dy, dx = (n - torch.arange(len(n), device=n.device)[:, None] for n in (y, x))
        center = self.kernel - 1
        bias = self.rpb[:, dy[:, None, :, None] + center, dx[None, :, None, :] + center]
        return bias.flatten(3)


class DeformableAttention(nn.Module):
    """Deformable attention of DAT (arXiv:2201.00520) and of DAT++ (arXiv:2309.01430).

    In DAT offsets are limited, in DAT++ they are not, but sampling is clamped to the map. All
    coordinates are (y, x) in [-1, 1].
    """

    def __init__(self, config: BaselineConfig, stage: int) -> None:
        super().__init__()
        dim, self.heads, self.groups = config.dims[stage], config.heads[stage], config.groups[stage]
        self.plus_plus = config.plus_plus
        group_dim, side = dim // self.groups, IMAGE_SIZE // (4 << stage)
        kernel, stride = (9, 7, 5, 3)[stage], (8, 4, 2, 1)[stage] if self.plus_plus else 1
        self.conv_offset = nn.Sequential(
            nn.Conv2d(group_dim, group_dim, kernel, stride, kernel // 2, groups=group_dim),
            ChannelLayerNorm(group_dim),
            nn.GELU(),
            nn.Conv2d(group_dim, 2, 1, bias=False),
        )
        self.proj_q = nn.Conv2d(dim, dim, 1)
        self.proj_k = nn.Conv2d(dim, dim, 1)
        self.proj_v = nn.Conv2d(dim, dim, 1)
        self.proj_out = nn.Conv2d(dim, dim, 1)
        self.rpe_table = nn.Parameter(torch.zeros(self.heads, 2 * side - 1, 2 * side - 1))

    def locate(self, offsets: Tensor) -> Tensor:
        """Sampling locations `(B * G, Hk, Wk, 2)` of raw offsets of the same shape."""
        size = offsets.shape[1:3]
        if self.plus_plus:
            # The checkpoint's grid: it reaches beyond +1 and is clamped there.
            grid = _grid(*(_centers(n, offsets) / (n - 1) * 2 - 1 for n in size))
            return (grid + offsets).clamp(-1.0, 1.0)
        reach = 2.0 / torch.tensor(size, dtype=offsets.dtype, device=offsets.device)
        return _cell_centers(size, offsets) + offsets.tanh() * reach

    def query_grid(self, x: Tensor) -> Tensor:
        """Positions of the queries of a `(B, C, H, W)` map, `(H, W, 2)`."""
        size = x.shape[2:]
        if self.plus_plus:
            return _grid(*(torch.linspace(-1, 1, n, dtype=x.dtype, device=x.device) for n in size))
        return _cell_centers(size, x)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the layer-normalised map `(B, C, H, W)`."""
        batch, channels, height, width = x.shape
        group_count = batch * self.groups
        q = self.proj_q(x)
        # Under autocast too, positions keep the precision of the LayerNorm before.
        offsets = self.conv_offset(q.reshape(group_count, -1, height, width)).to(x.dtype)
        locations = self.locate(offsets.permute(0, 2, 3, 1).contiguous())
        sampled = F.grid_sample(
            x.reshape(group_count, -1, height, width), locations[..., (1, 0)], align_corners=True
        ).reshape(batch, channels, 1, -1)

        q = q.reshape(batch * self.heads, -1, height * width)
        k = self.proj_k(sampled).reshape(batch * self.heads, q.shape[1], -1)
        v = self.proj_v(sampled).reshape_as(k)
        scores = torch.einsum("bcm,bcn->bmn", q, k) * q.shape[1] ** -0.5
        scores = scores + self._position_bias(x, locations)
        out = torch.einsum("bmn,bcn->bcm", scores.softmax(dim=-1), v)
        return self.proj_out(out.reshape(batch, channels, height, width))  # type: ignore[no-any-return]

    def _position_bias(self, x: Tensor, locations: Tensor) -> Tensor:
        """The table sampled at every query-to-key displacement, `(B * heads, HW, Ns)`."""
        batch, _, height, width = x.shape
        group_count = batch * self.groups
        queries = self.query_grid(x).expand(group_count, -1, -1, -1).reshape(group_count, -1, 1, 2)
        displacement = (queries - locations.reshape(group_count, 1, -1, 2)) * 0.5
        table = self.rpe_table.expand(batch, -1, -1, -1)
        bias = F.grid_sample(
            table.reshape(group_count, self.heads // self.groups, *table.shape[2:]),
            displacement[..., (1, 0)],
            align_corners=True,
        )
        return bias.reshape(batch * self.heads, height * width, -1)


def _cell_centers(size: torch.Size, like: Tensor) -> Tensor:
    return _grid(*(_centers(n, like) / n * 2 - 1 for n in size))


def _centers(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=like.dtype, device=like.device) + 0.5


def _grid(y: Tensor, x: Tensor) -> Tensor:
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)


class Stage(nn.Module):
    """Blocks of one resolution; only DAT++ has local perception units."""

    def __init__(self, config: BaselineConfig, index: int) -> None:
        super().__init__()
        dim, kinds = config.dims[index], config.blocks[index]
        self.layer_norms = nn.ModuleList(ChannelLayerNorm(dim) for _ in range(2 * len(kinds)))
        self.attns = nn.ModuleList(_attention(kind, config, index) for kind in kinds)
        mlp = ConvMlp if config.plus_plus else TokenMlp
        self.mlps = nn.ModuleList(mlp(dim) for _ in kinds)
        self.local_perception_units = nn.ModuleList(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim) for _ in kinds if config.plus_plus
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to the same shape."""
        for block, (attention, mlp) in enumerate(zip(self.attns, self.mlps, strict=True)):
            if self.local_perception_units:
                x = x + self.local_perception_units[block](x)
            x = x + attention(self.layer_norms[2 * block](x))
            x = x + mlp(self.layer_norms[2 * block + 1](x))
        return x


def _attention(kind: str, config: BaselineConfig, stage: int) -> nn.Module:
    dim, heads = config.dims[stage], config.heads[stage]
    if kind == "D":
        return DeformableAttention(config, stage)
    if kind == "N":
        return NeighborhoodAttention(dim, heads)
    return WindowAttention(dim, heads, IMAGE_SIZE // (4 << stage), shifted=kind == "S")


class Baseline(nn.Module):
    """A DAT or DAT++ classifier: `(B, 3, H, W)` normalised images to `(B, 1000)` logits."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        dims = config.dims
        if config.plus_plus:
            self.patch_proj = nn.Sequential(
                nn.Conv2d(3, dims[0] // 2, 3, 2, 1),
                ChannelLayerNorm(dims[0] // 2),
                nn.GELU(),
                nn.Conv2d(dims[0] // 2, dims[0], 3, 2, 1),
                ChannelLayerNorm(dims[0]),
            )
        else:
            self.patch_proj = nn.Sequential(nn.Conv2d(3, dims[0], 4, 4), ChannelLayerNorm(dims[0]))
        kernel, padding = (3, 1) if config.plus_plus else (2, 0)
        self.stages = nn.ModuleList(Stage(config, index) for index in range(4))
        self.down_projs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(dim, out, kernel, 2, padding, bias=False), ChannelLayerNorm(out)
            )
            for dim, out in pairwise(dims)
        )
        self.cls_norm = ChannelLayerNorm(dims[-1])
        self.cls_head = nn.Linear(dims[-1], 1000)

    def forward(self, images: Tensor) -> Tensor:
        """Classify images."""
        x = self.patch_proj(images)
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index < len(self.down_projs):
                x = self.down_projs[index](x)
        x = F.adaptive_avg_pool2d(self.cls_norm(x), 1).flatten(1)
        return self.cls_head(x)  # type: ignore[no-any-return]


def create_baseline(name: str) -> Baseline:
    """Build the baseline of a published model, in evaluation mode, with untrained weights."""
    return Baseline(CONFIGS[name]).eval()
