"""The paper's figure, a file a box: position, backbone, transformer, detector, segmentation."""

from detr_fast.detr.detector import DETR, Samples, build_detr
from detr_fast.detr.nested import NestedTensor, nested_tensor_from_tensor_list
from detr_fast.detr.segmentation import DETRsegm

__all__ = ["DETR", "DETRsegm", "NestedTensor", "Samples", "build_detr", "nested_tensor_from_tensor_list"]
