"""What networks return for a batch of 0 images, as layers of torch do."""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor
from torch.utils._pytree import tree_map_only

T = TypeVar("T")


def of_no_images(forward: Callable[..., T], *arguments: object) -> T:
    """What `forward` would return, all of whose tensors begin with the batch.

    Kernels and reshapes want an image. So they get one, and what comes of it is cut off.

    Args:
        forward: of a network.
        *arguments: its own; tensors are of 0 images.
    """
    of_one = (
        given.new_ones(1, *given.shape[1:]) if isinstance(given, Tensor) else given
        for given in arguments
    )
    return tree_map_only(Tensor, lambda tensor: tensor[:0], forward(*of_one))
