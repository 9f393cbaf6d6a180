"""A Swin classifier beside DAT: transformers computes it, and says what its windows attend to.

Swin is here to compare with: its network, its weights and its attention are those of
`SwinForImageClassification` of transformers, an optional extra, which is imported by the first
model that needs it. Nothing is ever looked for on a hub.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from model import checkpoint as checkpoints
from model.attention_weights import AttentionWeights
from model.checkpoint import Checkpoint, CheckpointError
from model.config import sides
from model.dat import Explained
from model.geometry import CHOSEN_QUERIES
from model.no_images import of_no_images
from model.official import Shapes, State
from model.swin_config import SWINS, SwinConfig, Windows

_FACT = "swin"  # under which our own files keep the configuration
_LARGEST_CONFIG = 1 << 20  # bytes
_DERIVED = "relative_position_index"  # older files keep it; it follows from the window
_PLACEHOLDER = "LABEL_"  # how transformers calls classes without a name


class SwinFile(NamedTuple):
    """What a checkpoint of a Swin holds.

    Attributes:
        config: what it is of.
        state: the weights, float32, under the names of the files of transformers.
        labels: names of the classes as JSON, if they are known.
    """

    config: SwinConfig
    state: dict[str, Tensor]
    labels: str | None

    @property
    def facts(self) -> dict[str, str]:
        """What our own file keeps beside the weights."""
        labels = {} if self.labels is None else {"labels": self.labels}
        return {"variant": self.config.name, _FACT: json.dumps(asdict(self.config)), **labels}


def is_swin(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is of a Swin classifier of transformers."""
    return any(key.startswith("swin.") for key in checkpoint.state)


def read_swin(
    checkpoint: Checkpoint,
    variant: str | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> SwinFile:
    """Check a checkpoint, name by name and shape by shape.

    Its configuration stands in the file, if it is our own, and otherwise in the `config.json`
    beside it.

    Args:
        checkpoint: the weights.
        variant: what they are of; `None` means what the file says.
        image_size: `(H, W)` of the input or the side of a square, pixels, if not that of the
            configuration.

    Raises:
        CheckpointError: it cannot be used; the message names the file, the key and the
            expectation.
    """
    state = {key: tensor for key, tensor in checkpoint.state.items() if not key.endswith(_DERIVED)}
    classes = len(state["classifier.weight"]) if "classifier.weight" in state else 1
    labels = checkpoint.metadata.get("labels")
    try:
        if _FACT in checkpoint.metadata:
            config = SwinConfig.of_json(_object(checkpoint.metadata[_FACT]))
        else:
            stored = _config_beside(checkpoint.path)
            config = SwinConfig.of_transformers(stored, classes)
            labels = labels or _labels(stored, classes)
        if image_size is not None:
            config = replace(config, image_size=sides(image_size))
    except ValueError as fault:
        raise CheckpointError(f"{checkpoint.path}: {fault}") from fault
    if variant not in (None, config.name) or config.name not in SWINS:
        expected = variant or " or ".join(SWINS)
        raise CheckpointError(
            f"{checkpoint.path}: is of the variant {config.name}, expected {expected}"
        )
    try:
        checkpoints.verify(state, swin_shapes(config), config.name)
    except CheckpointError as fault:
        raise CheckpointError(f"{checkpoint.path}: {fault}") from fault
    return SwinFile(config, {key: value.float() for key, value in state.items()}, labels)


def _config_beside(path: Path) -> Mapping[str, Any]:
    """The `config.json` in the folder of a checkpoint.

    Raises:
        CheckpointError: it is missing or unreadable.
    """
    file = path.with_name("config.json")
    try:
        if file.stat().st_size > _LARGEST_CONFIG:
            raise CheckpointError(f"{file}: is larger than a configuration is")
        return _object(file.read_text("utf-8"))
    except FileNotFoundError as fault:
        raise CheckpointError(
            f"{path}: a Swin of transformers needs its config.json beside it, as save_pretrained "
            "writes it"
        ) from fault
    except (OSError, ValueError) as fault:
        raise CheckpointError(f"{file}: not the configuration of a model: {fault}") from fault


def _object(text: str) -> Mapping[str, Any]:
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("is no JSON object")  # noqa: TRY004  # a file is at fault, not a caller
    return content


def _labels(stored: Mapping[str, Any], classes: int) -> str | None:
    """The names that a `config.json` gives the classes, as our own files keep them."""
    named = stored.get("id2label")
    if not isinstance(named, dict):
        return None
    names = [named.get(str(index)) for index in range(classes)]
    if not all(isinstance(name, str) and not name.startswith(_PLACEHOLDER) for name in names):
        return None
    return json.dumps(names)


def swin_shapes(config: SwinConfig) -> Shapes:
    """The parameters of a checkpoint of transformers, by their names in its files."""
    return dict(_shapes(config))


def _shapes(config: SwinConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    embeddings, first = "swin.embeddings", config.dim
    projection = f"{embeddings}.patch_embeddings.projection"
    yield f"{projection}.weight", (first, 3, config.patch, config.patch)
    yield f"{projection}.bias", (first,)
    yield from _norm(f"{embeddings}.norm", first)
    last = len(config.depths) - 1
    for stage, (depth, heads) in enumerate(zip(config.depths, config.heads, strict=True)):
        C = config.channels(stage)
        for index in range(depth):
            block = f"swin.encoder.layers.{stage}.blocks.{index}"
            yield from _norm(f"{block}.layernorm_before", C)
            attention = f"{block}.attention.self"
            table = f"{attention}.relative_position_bias_table"
            yield table, ((2 * config.window - 1) ** 2, heads)
            for part in ("query", "key", "value"):
                yield from _linear(f"{attention}.{part}", C, C, bias=config.qkv_bias)
            yield from _linear(f"{block}.attention.output.dense", C, C)
            yield from _norm(f"{block}.layernorm_after", C)
            hidden = int(config.mlp_ratio * C)
            yield from _linear(f"{block}.intermediate.dense", C, hidden)
            yield from _linear(f"{block}.output.dense", hidden, C)
        if stage < last:
            downsample = f"swin.encoder.layers.{stage}.downsample"
            yield from _linear(f"{downsample}.reduction", 4 * C, 2 * C, bias=False)
            yield from _norm(f"{downsample}.norm", 4 * C)
    yield from _norm("swin.layernorm", config.channels(last))
    yield from _linear("classifier", config.channels(last), config.num_classes)


def _norm(name: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (channels,)
    yield f"{name}.bias", (channels,)


def _linear(
    name: str, before: int, after: int, *, bias: bool = True
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (after, before)
    if bias:
        yield f"{name}.bias", (after,)


def parameters(config: SwinConfig) -> int:
    """How many numbers a checkpoint has."""
    return sum(map(prod, swin_shapes(config).values()))


class Swin(nn.Module):
    """A Swin classifier that answers as `model.DAT` does, in evaluation mode.

    Its attention is that of the last block of each stage, which is what transformers gives.

    Args:
        config: what it is made of.
        network: `SwinForImageClassification` of transformers.
    """

    def __init__(self, config: SwinConfig, network: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.network: Any = network
        self.windows = nn.ModuleList(
            WindowIndex(config.windows(stage, depth - 1))
            for stage, depth in enumerate(config.depths)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of normalised images `(B, 3, H, W)`."""
        return self.forward_explained(images).logits

    def forward_explained(
        self, images: Tensor, layers: Sequence[int] = (), cells: Tensor | None = None
    ) -> Explained:
        """Logits of normalised images `(B, 3, H, W)`, and what queries attend to.

        A weight is that of one head, and each head is a group of its own. Keys are the cells of
        the padded map, along its rows; those that a query does not see have the weight 0.

        Args:
            images: of the size that the model was built for.
            layers: whose attention is asked for, by their stage.
            cells: `(B, len(layers), Q)`, int64, of whose queries, as in
                `model.attention_weights.Asked`.

        Raises:
            ValueError: the images are not of the size the model was built for.
        """
        if images.shape[1:] != (3, *self.config.image_size):
            raise ValueError(
                f"{self.config.name} was built for images (B, 3, {self.config.image_size[0]}, "
                f"{self.config.image_size[1]}); got {tuple(images.shape)}"
            )
        if not len(images):
            return of_no_images(self.forward_explained, images, layers, cells)
        output = self.network.swin(images, output_attentions=bool(layers))
        head = self.network.classifier
        logits = head(output.pooler_output.to(head.weight.dtype))
        if cells is None:
            return Explained(logits, ())
        # A copy, because a traced pass reads no part of an input.
        asked = zip(layers, cells.clone().unbind(1), strict=True)
        attention = (self.windows[stage](output.attentions[stage], of) for stage, of in asked)
        return Explained(logits, (), tuple(attention))

    def cast(self, dtype: torch.dtype) -> Self:
        """Cast the parameters for a forward pass in `dtype`, in place, but for the head."""
        self.network.swin.to(dtype)
        return self


class WindowIndex(nn.Module):
    """Where the windows of a block lie in its map, to lay out what they attend to.

    Attributes:
        order: `(windows, N)`, the cell of the padded map that each place of a window holds.
        place: `(PH * PW,)`, the place of each cell among those of all windows.
        inside: `(windows, N)`, whether the cell is none of the padding.
    """

    order: Tensor
    place: Tensor
    inside: Tensor

    def __init__(self, windows: Windows) -> None:
        super().__init__()
        self.map_size, self.padded_size = windows.map_size, windows.padded_size
        (H, W), (PH, PW), side = windows.map_size, windows.padded_size, windows.side
        cells = torch.arange(PH * PW).view(PH, PW).roll((-windows.shift, -windows.shift), (0, 1))
        cut = cells.view(PH // side, side, PW // side, side).transpose(1, 2)
        order = cut.reshape(-1, side**2)
        for name, value in {
            "order": order,
            "place": order.flatten().argsort(),
            "inside": (order // PW < H) & (order % PW < W),
        }.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, attention: Tensor, cells: Tensor) -> AttentionWeights:
        """What queries attend to, and what every key receives.

        Args:
            attention: `(B * windows, heads, N, N)`, queries and keys of each window.
            cells: `(B, Q)`, as in `model.attention_weights.Asked`.
        """
        (H, W), (PH, PW) = self.map_size, self.padded_size
        by_window = attention.float().unflatten(0, (-1, len(self.order)))
        B, _, heads, N, _ = by_window.shape
        # The queries of the padding are none of the map.
        given = (by_window * self.inside[:, None, :, None]).sum(3)  # (B, windows, heads, N)
        received = given.transpose(1, 2).flatten(2).index_select(2, self.place)
        of_cells = received.sum(1).view(B, PH, PW)[:, :H, :W].reshape(B, H * W)
        chosen = of_cells.topk(CHOSEN_QUERIES).indices
        rank = (-1 - cells).clamp(0, CHOSEN_QUERIES - 1)
        cells = torch.where(cells < 0, chosen.gather(1, rank), cells)
        places = self.place[cells // W * PW + cells % W]
        window, query = places // N, places % N
        image = torch.arange(B, device=cells.device).unsqueeze(1)
        of_queries = by_window.transpose(2, 3)[image, window, query]  # (B, Q, heads, N)
        keys = self.order[window].unsqueeze(2).expand(-1, -1, heads, -1)
        none = of_queries.new_zeros(*of_queries.shape[:3], PH * PW)
        return AttentionWeights(cells, none.scatter(3, keys, of_queries), received)


def create_swin(config: SwinConfig, state: State | None = None) -> Swin:
    """Build a Swin in evaluation mode.

    Args:
        config: what it is made of.
        state: the weights of `read_swin`; without it, the parameters are those of a network before
            its training.

    Raises:
        CheckpointError: transformers is not installed, or does not know these weights.
    """
    if find_spec("transformers") is None:
        raise CheckpointError(
            f"{config.name} is computed by transformers, which is not installed; "
            "pip install -c constraints.txt '.[swin]'"
        )
    import transformers  # noqa: PLC0415

    transformers.utils.logging.disable_progress_bar()  # a server has a log
    theirs = transformers.SwinConfig(
        image_size=config.image_size,
        patch_size=config.patch,
        embed_dim=config.dim,
        depths=list(config.depths),
        num_heads=list(config.heads),
        window_size=config.window,
        mlp_ratio=config.mlp_ratio,
        qkv_bias=config.qkv_bias,
        layer_norm_eps=config.norm_eps,
        num_labels=config.num_classes,
        drop_path_rate=0.0,
        # The one way that gives its weights, so that all requests are computed alike.
        attn_implementation="eager",
    )
    kind = transformers.SwinForImageClassification
    if state is None:
        return Swin(config, kind(theirs)).eval()
    # Its names in files are older than those of its modules.
    network, told = kind.from_pretrained(
        None, config=theirs, state_dict=dict(state), output_loading_info=True
    )
    if faults := {name: keys for name, keys in told.items() if keys}:
        raise CheckpointError(f"transformers {transformers.__version__} reports {faults}")
    return Swin(config, network).eval()


def load_swin(checkpoint: Checkpoint, image_size: int | tuple[int, int] | None = None) -> Swin:
    """The Swin of a checkpoint, in evaluation mode, with its weights.

    Args:
        checkpoint: what `model.checkpoint.read` made of a file.
        image_size: as in `read_swin`.

    Raises:
        CheckpointError: as there, or as in `create_swin`.
    """
    file = read_swin(checkpoint, image_size=image_size)
    return create_swin(file.config, file.state)
