"""Weights in files: official `.pth` checkpoints and this repository's `.safetensors`.

Nothing in a file is executed. A state dict is compared with what the model expects, name by name
and shape by shape, before any of its values is used. Official names are in `official.py`.
"""

import hashlib
import json
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from io import BufferedReader
from math import isqrt
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch._weights_only_unpickler import _get_allowed_globals

from model import foreign_file
from model.config import VARIANTS, DatConfig
from model.official import (
    Shapes,
    State,
    fold,
    is_official,
    official_shapes,
    own_shapes,
    parameters,
    position_table,
    unwrapped,
)


class _Ignored:
    """Stands for an object that a training loop pickled and nobody here needs."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


# What training loops pickle beside the weights. Read as these two, nothing of theirs runs.
_INERT: list[Any] = [
    *(
        (OrderedDict, name)
        for name in (
            "yacs.config.CfgNode",
            "easydict.EasyDict",
            "addict.addict.Dict",
            "mmcv.utils.config.ConfigDict",
        )
    ),
    *(
        (type(name, (_Ignored,), {}), name)
        for name in (
            "argparse.Namespace",
            "numpy.core.multiarray.scalar",
            "numpy._core.multiarray.scalar",
            "numpy.dtype",
            "numpy.dtypes.Float32DType",
            "numpy.dtypes.Float64DType",
        )
    ),
]
_PRECISIONS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_TABLES = ("relative_position_bias_table", "rpe_table")
_FAULTS_SHOWN = 8
_LONGEST_MESSAGE = 2000
# Where timm, and what follows it, keeps the moving average of the weights.
_AVERAGED = ("state_dict_ema", "model_ema")


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message names the file, the key and the expectation.

    It is one line of printable characters, whatever the names in a file are, and has an end.
    """

    def __init__(self, message: str) -> None:
        super().__init__(
            "".join(
                char if char.isprintable() else char.encode("unicode_escape").decode()
                for char in message[:_LONGEST_MESSAGE]
            )
        )


@dataclass(frozen=True)
class Checkpoint:
    """Weights as read from a file.

    Attributes:
        path: the file.
        state: the state dict, official or this repository's own.
        metadata: facts stored beside the weights of a `.safetensors`, by name.
        training: the configuration that the official training loop stores, or nothing.
        meta: what the training loop of the official detectors stores, or nothing.
    """

    path: Path
    state: dict[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def classes(self) -> int | None:
        """How many classes the head has, or `None` without a head."""
        head = self.state.get("cls_head.weight", self.state.get("head.weight"))
        return len(head) if head is not None and head.ndim == 2 else None


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Raises:
        CheckpointError: the file cannot be read.
    """
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _opened(path: Path) -> BufferedReader:
    try:
        mode = path.stat().st_mode
        if not S_ISREG(mode):
            raise CheckpointError(
                f"{path}: is {'a folder' if S_ISDIR(mode) else 'no regular file'}, expected a file"
            )
        return path.open("rb")
    except OSError as fault:
        raise CheckpointError(f"{path}: {(fault.strerror or str(fault)).lower()}") from fault


def read(path: str | Path, *, ema: bool = False) -> Checkpoint:
    """Read a `.safetensors` file or an official `.pth` without executing anything in it.

    Tensors are mapped from the file where its format allows: replace such a file by renaming
    another over it, never in place.

    Args:
        path: of the file.
        ema: read the moving average of the weights that a training loop kept beside them.

    Raises:
        CheckpointError: the file is missing, damaged, hostile, or holds no state dict, or no
            moving average of one.
    """
    path = Path(path)
    _opened(path).close()
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                metadata = dict(file.metadata() or {})
            # What was converted is one state dict, and says whether it is an average.
            ema = ema and metadata.get("weights") != "ema"
            return Checkpoint(path, _choose(path, state, ema=ema), metadata)
        with torch.serialization.safe_globals(_INERT), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what is refused with a better message
            # Files of torch before 1.6 are one pickle, which cannot be mapped.
            mapped = zipfile.is_zipfile(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except CheckpointError:
        raise
    except Exception as cause:
        # Both readers raise whatever their parsers meet in a damaged or hostile file.
        raise CheckpointError(f"{path}: not a readable checkpoint: {_reason(path, cause)}") from (
            cause
        )
    state = _choose(path, content, ema=ema)
    content = _dictionary(content)
    return Checkpoint(
        path,
        state,
        training=_dictionary(content.get("config")),
        meta=_dictionary(content.get("meta")),
    )


def _reason(path: Path, cause: Exception) -> str:
    """What is wrong with a file that a reader refused."""
    if (found := foreign_file.kind(path)) is not None:
        return f"it is {found}"
    if path.suffix == ".safetensors":
        return f"it is a safetensors file that is cut off or damaged ({cause})"
    allowed = {*_get_allowed_globals(), *(name for _, name in _INERT)}
    if refused := foreign_file.refused_names(path, allowed):
        return (
            "refused, and nothing of it executed: it holds more than tensors, "
            f"{foreign_file.listed(refused)}; save the state dict alone"
        )
    # torch puts advice for trusted files first: to run what the file says.
    advice, *refusal = str(cause).strip().split("\n\n")
    met = (refusal[0] if refusal else advice).strip().partition("\n")[0] or type(cause).__name__
    return f"it is damaged, or not written by torch.save with its own pickle protocol ({met})"


def _choose(path: Path, content: object, *, ema: bool) -> dict[str, Tensor]:
    """The weights in what a file holds: the ordinary ones, or their moving average.

    Raises:
        CheckpointError: there is no such state dict.
    """
    whole = _dictionary(content)
    # Under `model` in classifiers, under `state_dict` in detectors.
    ordinary = whole.get("model", whole.get("state_dict"))
    averaged = next((whole[key] for key in _AVERAGED if whole.get(key) is not None), None)
    if ema and averaged is not None:
        return _state_dict(path, averaged)
    if ordinary is None and averaged is not None:
        raise CheckpointError(f"{path}: holds EMA weights alone; choose them with weights = ema")
    state = _state_dict(path, content if ordinary is None else ordinary)
    # mmcv keeps averages as buffers beside the parameters.
    buffers = {f"ema_{key.replace('.', '_')}": key for key in state}
    parameters = {key: tensor for key, tensor in state.items() if key not in buffers}
    if not ema:
        return parameters
    averages = {key: state[buffer] for buffer, key in buffers.items() if buffer in state}
    if not averages:
        raise CheckpointError(
            f"{path}: holds no EMA weights, neither under {' or '.join(map(repr, _AVERAGED))} nor "
            "as keys that begin with 'ema_'"
        )
    return parameters | averages


def _state_dict(path: Path, stored: object) -> dict[str, Tensor]:
    state = _dictionary(stored)
    odd = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if state and not odd and all(isinstance(key, str) for key in state):
        return unwrapped(state)
    if {"state", "param_groups"} <= state.keys():
        found = "the state of an optimizer"
    elif odd and len(odd) < len(state):
        found = f"tensors and {odd[0]!r}, which is of type {_type_name(state[odd[0]])}"
    elif state:
        found = f"a dict with the keys {', '.join(map(repr, list(state)[:_FAULTS_SHOWN]))}"
    else:
        found = "an empty dict" if stored == {} else f"an object of type {_type_name(stored)}"
    raise CheckpointError(
        f"{path}: holds no state dict, bare or under the key 'model' or 'state_dict'; found {found}"
    )


def _type_name(value: object) -> str:
    return type(value).__name__


def _dictionary(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def write(path: Path, state: State, facts: dict[str, str]) -> None:
    """Write this repository's own state dict with facts about it to a `.safetensors` file.

    The file appears under its name only when it is whole.

    Raises:
        CheckpointError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        # Not save_file: only its owner may read what it writes, whatever the umask says.
        part.write_bytes(save({key: tensor.contiguous() for key, tensor in state.items()}, facts))
        part.replace(path)
    except OSError as fault:
        raise CheckpointError(f"{path}: cannot be written: {fault}") from fault


def configure(
    checkpoint: Checkpoint,
    variant: str | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> DatConfig:
    """What model the weights are loaded into.

    Args:
        checkpoint: the weights.
        variant: what they are of; `None` finds it by names and shapes.
        image_size: `(H, W)` of the input or the side of a square, pixels; `None` means that of the
            checkpoint or of the variant. At another size a DAT (v1) keeps the window of the
            checkpoint if the size is a multiple of 32 windows and has one of 1/32 of the size if
            not; a DAT++ keeps the size of its tables.

    Raises:
        CheckpointError: the weights are of no variant, of another one, or of several between
            which the file does not decide; or the variant cannot take the size.
    """
    config = _variant(checkpoint, variant)
    try:
        if checkpoint.classes is not None:
            config = replace(config, num_classes=checkpoint.classes)
        stored = {
            name: json.loads(checkpoint.metadata[name])
            for name in ("image_size", "table_size", "window")
            if name in checkpoint.metadata
        }
        if stored:
            config = replace(config, **stored)
        if image_size is not None:
            config = _resized_config(config, image_size, checkpoint.state)
    except (ValueError, KeyError, TypeError) as fault:
        raise CheckpointError(f"{checkpoint.path}: {fault}") from fault
    return config


def _variant(checkpoint: Checkpoint, asked: str | None) -> DatConfig:
    if asked is not None and asked not in VARIANTS:
        raise CheckpointError(f"no variant {asked!r}; there are {', '.join(VARIANTS)}")
    stored = checkpoint.metadata.get("variant")
    if stored is not None and (stored not in VARIANTS or asked not in (None, stored)):
        raise CheckpointError(
            f"{checkpoint.path}: holds a {stored}, expected {asked or 'a variant'}"
        )
    name = asked or stored
    return VARIANTS[name] if name else _identify(checkpoint)


def _identify(checkpoint: Checkpoint) -> DatConfig:
    """The published variant with the names and shapes of a state dict."""
    given = shapes(parameters(checkpoint.state))
    expected = official_shapes if is_official(given) else own_shapes
    found = [
        config
        for config in VARIANTS.values()
        if given == expected(replace(config, num_classes=checkpoint.classes or 1))
    ]
    if len(found) > 1:
        # Two variants share their weights and differ in the size of the image.
        size = _dictionary(checkpoint.training.get("DATA")).get("IMG_SIZE")
        found = [config for config in found if config.image_size == (size, size)] or found
    if len(found) == 1:
        return found[0]
    if found:
        names = " or ".join(config.name for config in found)
        raise CheckpointError(f"{checkpoint.path}: may be {names}: name the variant")
    raise CheckpointError(
        f"{checkpoint.path}: fits no variant{_prefix_note(checkpoint.state)}; name one of "
        f"{', '.join(VARIANTS)} to see what differs"
    )


def _resized_config(
    config: DatConfig, image_size: int | tuple[int, int], state: State
) -> DatConfig:
    """Another size, with the window or the tables that the checkpoint has."""
    stage, block = config.first_block("L" if config.family == "dat" else "D")
    table = position_table(state, stage, block)
    if config.family == "dat" and table is not None and table.ndim == 2:
        return config.resized(image_size, window=(isqrt(len(table)) + 1) // 2)
    if config.family == "dat_pp" and table is not None and table.ndim == 3:
        return config.resized(image_size, table_size=(table.shape[1] + 1) // 2 * (4 << stage))
    return config.resized(image_size)


def resize_tables(state: State, expected: Shapes) -> dict[str, Tensor]:
    """Interpolate the position tables of another resolution to the expected shapes.

    As the official loader does: bicubic over each head's table, `align_corners=False`. Tables of
    windows are stored `(side ** 2, heads)`, those of deformable attention `(heads, TH, TW)`.
    All other tensors stay as they are.
    """
    return {
        key: _resized(tensor, expected[key])
        if key.endswith(_TABLES) and key in expected and tensor.ndim == len(expected[key])
        else tensor
        for key, tensor in state.items()
    }


def _resized(table: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(table.shape) == shape:
        return table
    if table.ndim == 3:
        return F.interpolate(table[None], shape[1:], mode="bicubic")[0]
    before, after = isqrt(len(table)), isqrt(shape[0])
    if before**2 != len(table):
        return table
    by_head = table.T.reshape(1, -1, before, before)
    resized = F.interpolate(by_head, (after, after), mode="bicubic")
    return resized.reshape(-1, after**2).T


def translate(state: State, config: DatConfig, own: State) -> dict[str, Tensor]:
    """What `own`, the state dict of a model, becomes when `state` is loaded into it.

    Args:
        state: official, or of the model's own names.
        config: of the model.
        own: names, shapes and types of the model.

    Raises:
        CheckpointError: keys are missing, unexpected or misshapen, or values are not finite
            numbers; the message names them.
    """
    given = parameters(state)
    official = is_official(given)
    verify(given, official_shapes(config) if official else shapes(own), config.name)
    if official:
        given = fold(given, config)
    return {key: tensor.to(own[key].dtype) for key, tensor in given.items()}


def verify(given: State, expected: Shapes, name: str) -> None:
    """Check that a state dict is one of the model `name`.

    Raises:
        CheckpointError: keys are missing, unexpected or misshapen, or values are not finite
            numbers; the message names them.
    """
    faults = list(_differences(given, expected)) or list(_not_finite(given))
    if faults:
        rest = len(faults) - _FAULTS_SHOWN
        shown = "; ".join(faults[:_FAULTS_SHOWN]) + (f"; and {rest} more" if rest > 0 else "")
        note = _prefix_note({key: given[key] for key in given if key not in expected})
        raise CheckpointError(f"not a checkpoint of {name}{note}: {shown}")


def shapes(state: State) -> Shapes:
    """The shape of every tensor."""
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def _differences(given: State, expected: Shapes) -> Iterator[str]:
    for key, shape in expected.items():
        if key not in given:
            yield f"missing {key} {shape}"
        elif tuple(given[key].shape) != shape:
            yield f"{key} has shape {tuple(given[key].shape)}, expected {shape}"
        elif given[key].layout != torch.strided or given[key].is_quantized:
            yield f"{key} is a sparse or quantized tensor, expected a plain one"
        elif given[key].is_meta:
            yield f"{key} is a tensor without values"
        elif given[key].dtype not in _PRECISIONS:
            yield f"{key} is of type {given[key].dtype}, expected floating point of 16 bits or more"
    yield from (f"unexpected {key}" for key in given if key not in expected)


def _not_finite(given: State) -> Iterator[str]:
    for key, tensor in given.items():
        # One pass without a copy, where isfinite takes three; both ends are NaN if any value is.
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            yield f"{key} holds values that are not finite numbers"


def _prefix_note(state: State) -> str:
    """Names a prefix before the names, as wrappers of training loops put it there."""
    for first in ("patch_proj.0.weight", "stem.0.conv.weight"):
        for key in state:
            if key.endswith(f".{first}"):
                return f" (its keys begin with {key.removesuffix(first)!r}, expected no prefix)"
    return ""
