"""DAT and DAT++ vision transformers with deformable attention, for inference.

from model import create_model
logits = create_model("dat_tiny_224")(images)
"""

from model.config import VARIANTS, DatConfig
from model.dat import DAT, Explained, create_model

__all__ = ["DAT", "VARIANTS", "DatConfig", "Explained", "create_model"]
