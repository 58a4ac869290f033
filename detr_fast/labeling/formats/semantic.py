"""Semantic maps: a grey PNG of category ids for each image, 0 where nothing is found."""

from __future__ import annotations

import numpy as np

from detr_fast.images import grey_png
from detr_fast.labeling.formats.format import Format, ImageLabels
from detr_fast.labeling.listing import png_name


class Semantic(Format):
    name = "semantic"
    folder = "semantic"

    def path(self, file: str) -> str:
        return f"{self.folder}/{png_name(file)}"

    def encode(self, labels: ImageLabels) -> bytes:
        """8 bits a pixel where they hold every category id of the model, else 16."""
        dtype = np.uint8 if labels.num_classes <= 256 else np.uint16
        classes = np.zeros(1 + int(labels.ids.max()), dtype)
        for info in labels.segments_info:
            classes[info["id"]] = info["category_id"]
        return grey_png(classes[labels.ids])


SEMANTIC = Semantic()
