"""What training, evaluation and labelling are measured beside: upstream's algorithms, written plainly."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detr_fast.boxes import box_cxcywh_to_xyxy, generalized_iou
from detr_fast.images import IMAGENET_MEAN, IMAGENET_STD
from detr_fast.postprocess import id_to_rgb
from detr_fast.resampling import resized_size
from detr_fast.training.criterion import Losses, Targets


def preprocess(image: Image.Image, size: int, max_size: int) -> Tensor:
    """float32 [3,h,w]: facebookresearch/detr's RandomResize, ToTensor and Normalize, as torchvision computes them."""
    resized = image.resize(resized_size(*image.size, size, max_size), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous().float().div(255)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std


def match(outputs: Mapping[str, Tensor], targets: Targets, weights: tuple[float, float, float]) -> list[Any]:
    """Matched (queries, objects) of each image: the costs of all predictions with all objects of the batch at once,
    of which each image's block is used (facebookresearch/detr, models/matcher.py)."""
    batch, queries = outputs["pred_logits"].shape[:2]
    prob, boxes = outputs["pred_logits"].flatten(0, 1).softmax(-1), outputs["pred_boxes"].flatten(0, 1)
    labels, objects = (torch.cat([target[key] for target in targets]) for key in ("labels", "boxes"))
    overlap = generalized_iou(box_cxcywh_to_xyxy(boxes)[:, None], box_cxcywh_to_xyxy(objects)[None])
    terms = (-prob[:, labels], torch.cdist(boxes, objects, p=1), -overlap)
    cost = sum(weight * term for weight, term in zip(weights, terms, strict=True)).view(batch, queries, -1).cpu()
    blocks = cost.split([len(target["labels"]) for target in targets], -1)
    return [linear_sum_assignment(block[image]) for image, block in enumerate(blocks)]


def mask_losses(masks: Tensor, targets: Tensor, count: int) -> Losses:
    """Focal and dice loss of logits [K,h,w] and masks [K,H,W], in the papers' terms (Lin et al. 2017; Milletari et al.
    2016)."""
    logits = F.interpolate(masks[:, None], size=targets.shape[-2:], mode="bilinear", align_corners=False)
    logits, targets = logits.flatten(1), targets.flatten(1).float()
    prob = logits.sigmoid()
    right = prob * targets + (1 - prob) * (1 - targets)
    balance = 0.25 * targets + 0.75 * (1 - targets)
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    focal = balance * (1 - right) ** 2 * entropy
    dice = 1 - (2 * (prob * targets).sum(1) + 1) / (prob.sum(1) + targets.sum(1) + 1)
    return {"loss_mask": focal.mean(1).sum() / count, "loss_dice": dice.sum() / count}


def panoptic_quality(pairs: Sequence[tuple[np.ndarray, np.ndarray]], categories: Mapping[int, int]) -> float:
    """Mean PQ over the categories (Kirillov et al. 2019, section 4), one mask at a time.

    Args:
        pairs: true and predicted ids [H,W], 0 = void.
        categories: of each id.
    """
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])  # IoU; TP + FP / 2 + FN / 2
    for truth, predicted in pairs:
        for found, others in ((truth, predicted), (predicted, truth)):
            for segment in np.unique(found[found != 0]):
                sums[categories[segment]][1] += 0.5
                if found is predicted and (found == segment)[others == 0].sum() > 0.5 * (found == segment).sum():
                    sums[categories[segment]][1] -= 0.5  # on void: neither right nor wrong
        for segment in np.unique(truth[truth != 0]):
            own = truth == segment
            for other in np.unique(predicted[own & (predicted != 0)]):
                theirs = predicted == other
                iou = (own & theirs).sum() / (own | (theirs & (truth != 0))).sum()
                if iou > 0.5 and categories[segment] == categories[other]:
                    sums[categories[segment]][0] += iou
    return float(np.mean([iou / count for iou, count in sums.values() if count]))


def png(ids: np.ndarray) -> bytes:
    """A panoptic PNG by Pillow."""
    with io.BytesIO() as file:
        Image.fromarray(id_to_rgb(ids)).save(file, format="PNG")
        return file.getvalue()


def run_lengths(ids: np.ndarray, wanted: Sequence[int]) -> list[str]:
    """COCO's run lengths of some segments by pycocotools."""
    return [coco_mask.encode(np.asfortranarray(ids == segment))["counts"].decode("ascii") for segment in wanted]


def label(predictor: Any, images: Path, out: Path) -> None:
    """Labels one image after the other: read, computed, merged and written before the next one is read."""
    (out / "panoptic").mkdir(parents=True)
    annotations, instances = [], []
    for number, path in enumerate(sorted(images.iterdir()), 1):
        result = predictor(path)
        (out / "panoptic" / f"{path.stem}.png").write_bytes(png(result.segmentation))
        annotations.append({"image_id": number, "segments_info": result.segments_info})
        counts = run_lengths(result.segmentation, [segment["id"] for segment in result.segments_info])
        instances += [{"image_id": number, "segmentation": {"counts": text}} for text in counts]
    (out / "panoptic.json").write_text(json.dumps(annotations))
    (out / "instances.json").write_text(json.dumps(instances))
