"""Turns any readable checkpoint into one file that holds all that is known of the model."""

from collections.abc import Sequence
from pathlib import Path

from model import checkpoint as checkpoints
from model.checkpoint import CheckpointError
from service.models.load import Loader, choose_loader
from service.settings.model import ModelChoice


def convert(chosen: ModelChoice, out: Path, loaders: Sequence[Loader]) -> dict[str, str]:
    """Write the folded weights of a model to a `.safetensors` file.

    Returns:
        What was written beside the weights: variant, classes, sizes of a classifier, names of the
        classes where they are known, whether the weights are a moving average, and where they came
        from.

    Raises:
        CheckpointError: the checkpoint or the label file cannot be used, or `out` cannot be
            written.
    """
    if chosen.checkpoint is None:
        raise CheckpointError("no checkpoint is given to convert")
    if out.suffix != ".safetensors":
        raise CheckpointError(f"{out}: the file to write must end in .safetensors")
    ema = chosen.weights == "ema"
    checkpoint = checkpoints.read(chosen.checkpoint, ema=ema)
    converted = choose_loader(loaders, checkpoint, chosen.variant).convert(chosen, checkpoint)
    metadata = {
        **converted.facts,
        **({"weights": "ema"} if ema else {}),
        "source": chosen.checkpoint.name,
        "source_sha256": checkpoints.sha256(chosen.checkpoint),
    }
    checkpoints.write(out, converted.state, metadata)
    return metadata
