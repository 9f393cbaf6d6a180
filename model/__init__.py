"""DAT and DAT++ vision transformers with deformable attention, for inference.

from model import load_model
logits = load_model(Path("dat_tiny_in1k_224.pth"))(images)
"""

from model.config import VARIANTS, DatConfig
from model.dat import DAT, Explained, create_model, load_model

__all__ = ["DAT", "VARIANTS", "DatConfig", "Explained", "create_model", "load_model"]
