"""Every operation at the shapes that DETR-R50 panoptic gives it, a file for each of `detr_fast.ops`."""

from bench.cases import REAL, Scale
from bench.operations import attention, dense, masks, merge, norm
from bench.operations.case import Case

FILES = (attention, norm, dense, masks, merge)


def on_gpu(scale: Scale = REAL) -> list[Case]:
    """The kernels, as a GPU runs the model with them."""
    return [case for file in FILES for case in file.on_gpu(scale)]


def on_cpu(scale: Scale = REAL) -> list[Case]:
    """The operations as a CPU runs the model with them: one image, float32, fast and defined."""
    return [case for file in FILES for case in file.on_cpu(scale)]
