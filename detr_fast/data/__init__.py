"""COCO categories, image and target transforms, data sets."""
