"""Metrics of detection and segmentation, and the evaluation of a model with them."""
