"""Records what the upstream implementations return for the cases of tests/postprocess_cases.py.

    PYTHONPATH=tests:DETR python tests/golden/make_postprocess.py facebookresearch
    PYTHONPATH=tests:TRANSFORMERS python tests/golden/make_postprocess.py transformers

DETR is facebookresearch/detr's main branch (the code of the package python-detr 0.1.7), with panopticapi; TRANSFORMERS
is transformers 4.57.6. Both ran on torch 2.13. They write facebookresearch.npz and transformers-4.57.6.npz beside this
file: values only.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from postprocess_cases import CASES, is_thing


def panoptic_arrays(name: str, results: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    arrays = {}
    for i, result in enumerate(results):
        rgb = np.array(Image.open(io.BytesIO(result["png_string"]))).astype(np.int32)
        arrays[f"{name}/{i}/ids"] = (rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]).astype(np.uint8)
        arrays[f"{name}/{i}/segments"] = np.array(json.dumps(result["segments_info"]))
    return arrays


def per_query_arrays(results: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {f"{i}/{key}": value.numpy() for i, result in enumerate(results) for key, value in result.items()}


def facebookresearch() -> dict[str, np.ndarray]:
    from models.detr import PostProcess
    from models.segmentation import PostProcessPanoptic, PostProcessSegm

    panoptic = PostProcessPanoptic({label: is_thing(label) for label in range(250)}, threshold=0.85)
    arrays = {}
    for name, case in CASES.items():
        if name == "nothing":  # needs torchvision < 0.7, whose interpolate took empty tensors; torch's raises
            continue
        results = panoptic(case.facebookresearch, case.processed_sizes, case.target_sizes)
        arrays |= panoptic_arrays(f"panoptic/{name}", results)
    case = CASES["stuff"]
    arrays |= panoptic_arrays("panoptic-as-processed", panoptic(case.facebookresearch, case.processed_sizes))
    targets, processed = torch.tensor(case.target_sizes), torch.tensor(case.processed_sizes)
    results = PostProcess()(case.facebookresearch, targets)
    results = PostProcessSegm(0.5)(results, case.facebookresearch, targets, processed)
    return arrays | {f"segm/{key}": value for key, value in per_query_arrays(results).items()}


def transformers() -> dict[str, np.ndarray]:
    from transformers import DetrImageProcessor, __version__

    assert __version__ == "4.57.6", __version__
    processor = DetrImageProcessor()
    arrays = {}
    for name, case in CASES.items():
        results = processor.post_process_panoptic(case.transformers, case.processed_sizes, case.target_sizes)
        arrays |= panoptic_arrays(f"panoptic/{name}", results)
    case = CASES["stuff"]
    targets, processed = torch.tensor(case.target_sizes), torch.tensor(case.processed_sizes)
    results = processor.post_process(case.transformers, targets)
    results = processor.post_process_instance(results, case.transformers, targets, processed)
    arrays |= {f"segm/{key}": value for key, value in per_query_arrays(results).items()}
    results = processor.post_process_segmentation(case.transformers, case.target_sizes)
    return arrays | {f"segmentation/{key}": value for key, value in per_query_arrays(results).items()}


if __name__ == "__main__":
    makers = {"facebookresearch": (facebookresearch, "facebookresearch.npz")}
    makers["transformers"] = (transformers, "transformers-4.57.6.npz")
    make, file = makers[sys.argv[1]]
    np.savez_compressed(Path(__file__).with_name(file), **make())
