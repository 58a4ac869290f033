"""The fixed public name of detr/position.py."""

from detr_fast.detr.position import PositionEmbeddingSine

__all__ = ["PositionEmbeddingSine"]
