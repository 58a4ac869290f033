"""The formats of labels. A new one is a file here with an object, and its place in `FORMATS`."""

from detr_fast.labeling.formats.format import Format, ImageLabels, Writer
from detr_fast.labeling.formats.instances import INSTANCES
from detr_fast.labeling.formats.panoptic import PANOPTIC
from detr_fast.labeling.formats.semantic import SEMANTIC

FORMATS: dict[str, Format] = {format.name: format for format in (PANOPTIC, INSTANCES, SEMANTIC)}
RESULTS = tuple(name for format in FORMATS.values() for name in format.results)
FOLDERS = tuple(format.folder for format in FORMATS.values() if format.folder is not None)

__all__ = ["FOLDERS", "FORMATS", "PANOPTIC", "RESULTS", "Format", "ImageLabels", "Writer"]
