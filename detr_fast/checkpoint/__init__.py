"""Files of every DETR dialect <-> models."""

from detr_fast.checkpoint.checkpoint import (
    Checkpoint,
    CheckpointError,
    build_model,
    interpret,
    load_model,
    read_checkpoint,
    save_model,
)

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "build_model",
    "interpret",
    "load_model",
    "read_checkpoint",
    "save_model",
]
