"""The paper's figure, a file a box: position, backbone, transformer, detector, segmentation."""

from detr_fast.detr.detector import DETR, Samples
from detr_fast.detr.nested import NestedTensor, nested_tensor_from_tensor_list
from detr_fast.detr.segmentation import DETRsegm, build_detr

__all__ = ["DETR", "DETRsegm", "NestedTensor", "Samples", "build_detr", "nested_tensor_from_tensor_list"]
