"""How much of a device a batch takes."""

from typing import NamedTuple


class Share(NamedTuple):
    """What a batch takes of a device.

    Attributes:
        cores: of the device.
        images: that it has at most.
    """

    cores: int
    images: int
