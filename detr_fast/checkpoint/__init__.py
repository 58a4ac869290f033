"""Files of every DETR dialect <-> models."""

from detr_fast.checkpoint.checkpoint import build_model, load_model, read_checkpoint, save_model
from detr_fast.checkpoint.conversion import Checkpoint, interpret
from detr_fast.checkpoint.errors import CheckpointError

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "build_model",
    "interpret",
    "load_model",
    "read_checkpoint",
    "save_model",
]
