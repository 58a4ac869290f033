"""Losses of DETR's training."""
