"""transformers' DETR classes: same calls, same outputs, computed by detr_fast's models."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from detr_fast.checkpoint import Checkpoint, CheckpointError, build_model, dialects, read_checkpoint, save_model
from detr_fast.detr.detector import DETR
from detr_fast.detr.nested import NestedTensor
from detr_fast.detr.segmentation import DETRsegm

Model = TypeVar("Model", bound="DetrPreTrainedModel")


class ModelOutput(Mapping[str, Any]):
    """Fields that are not None, by attribute, by key, and by position as in the tuple they make."""

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        value = getattr(self, key) if key in self.__dict__ else None
        if value is None:
            raise KeyError(key)
        return value

    def __iter__(self) -> Iterator[str]:
        return (name for name, value in self.__dict__.items() if value is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclasses.dataclass(eq=False)
class DetrObjectDetectionOutput(ModelOutput):
    """The output of `DetrForObjectDetection`: transformers' fields in transformers' order.

    Attributes:
        logits: [B,Q,num_labels+1], the last class being no-object.
        pred_boxes: [B,Q,4], (cx, cy, w, h) in [0,1] of the image without its padding.
        auxiliary_outputs: such logits and pred_boxes of all decoder layers but the last, if `detr.aux_loss` is set.
        last_hidden_state: [B,Q,d], normalised output of the decoder.
        encoder_last_hidden_state: [B,h*w,d]; what stands on padding is unspecified.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    auxiliary_outputs: list[dict[str, Tensor]] | None = None
    last_hidden_state: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None


@dataclasses.dataclass(eq=False)
class DetrSegmentationOutput(ModelOutput):
    """The output of `DetrForSegmentation`: `DetrObjectDetectionOutput`'s fields and pred_masks.

    Attributes:
        pred_masks: logits [B,Q,h,w] at stride 4.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    pred_masks: Tensor | None = None
    auxiliary_outputs: list[dict[str, Tensor]] | None = None
    last_hidden_state: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None


class TransformersConfig(SimpleNamespace):
    """Settings under transformers' names: d_model, num_queries, id2label and so on; informative."""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class DetrPreTrainedModel(nn.Module):
    """The base of the two models.

    Args:
        detr: a detr_fast model, which this one holds and calls.
    """

    masks: ClassVar[bool]
    output: ClassVar[type[Any]]

    def __init__(self, detr: DETR | DETRsegm):
        super().__init__()
        accepted = DETRsegm if self.masks else DETR
        if not isinstance(detr, accepted):
            raise TypeError(f"detr must be a detr_fast {accepted.__name__}, got {type(detr).__name__}")
        self.detr = detr
        settings = dialects.transformers_config(detr.config, detr.categories)
        self.config = TransformersConfig(
            **settings, num_labels=detr.config.num_classes, hidden_size=detr.config.hidden_dim
        )

    @classmethod
    def from_pretrained(
        cls: type[Model],
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        num_labels: int | None = None,
        id2label: dict[int, str] | None = None,
        label2id: dict[str, int] | None = None,
        ignore_mismatched_sizes: bool = False,
    ) -> Model:
        """A model in evaluation mode.

        Args:
            name_or_path, revision: as for `detr_fast.checkpoint.read_checkpoint`, which reads every dialect.
            dtype, torch_dtype: of the weights, a torch.dtype, its name, or "auto" for the file's; float32 by default.
            num_labels, id2label, label2id: another set of classes; the last two must agree with the others given.
            ignore_mismatched_sizes: start with a random class head where the number of classes differs.

        Raises:
            CheckpointError: as `read_checkpoint`, or DetrForSegmentation is asked of weights without a mask head.
            ValueError: classes that contradict each other, or of another number without ignore_mismatched_sizes.
        """
        checkpoint = read_checkpoint(name_or_path, revision)
        if cls.masks and not checkpoint.config.masks:
            raise CheckpointError(f"{checkpoint.source}: no mask head in it; DetrForObjectDetection loads it")
        if num_labels is not None or id2label is not None or label2id is not None:
            checkpoint = _with_classes(checkpoint, num_labels, id2label, label2id, ignore_mismatched_sizes)
        if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
            raise ValueError(f"dtype and torch_dtype must agree, got {dtype} and {torch_dtype}")
        detr = build_model(checkpoint, dtype=_dtype(dtype or torch_dtype, checkpoint), masks=cls.masks)
        return cls(detr).eval()

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes a folder that transformers loads; see `detr_fast.checkpoint.save_model`."""
        save_model(self.detr, save_directory, dialect="transformers")

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        *,
        labels: list[dict[str, Tensor]] | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Detects objects, and segments them if the model does.

        Args:
            pixel_values: normalised images, floating point [B,3,H,W].
            pixel_mask: [B,H,W], 1 on the image, 0 on padding; None where nothing is padded.
            return_dict: False for a tuple.

        Returns: `DetrObjectDetectionOutput` or `DetrSegmentationOutput`.

        Raises:
            TypeError, ValueError: inputs of another type or shape.
        """
        samples = _samples(pixel_values, pixel_mask)
        if labels is not None:
            raise ValueError("labels must be None: losses are not computed here")
        encoded = self.detr.encode(samples)
        output = self.output(
            **_fields(self.detr.predict(encoded)),
            last_hidden_state=encoded["hs"][-1],
            encoder_last_hidden_state=encoded["memory"].flatten(2).transpose(1, 2),
        )
        return output.to_tuple() if return_dict is False else output


class DetrForObjectDetection(DetrPreTrainedModel):
    """transformers' class of this name. Weights with a mask head load too, without it."""

    masks = False
    output = DetrObjectDetectionOutput
    detr: DETR


class DetrForSegmentation(DetrPreTrainedModel):
    """transformers' class of this name."""

    masks = True
    output = DetrSegmentationOutput
    detr: DETRsegm


def _fields(out: dict[str, Any]) -> dict[str, Any]:
    """facebookresearch/detr's names to transformers'."""
    names = {"pred_logits": "logits", "pred_boxes": "pred_boxes", "pred_masks": "pred_masks"}
    fields: dict[str, Any] = {theirs: out[ours] for ours, theirs in names.items() if ours in out}
    if "aux_outputs" in out:
        fields["auxiliary_outputs"] = [_fields(layer) for layer in out["aux_outputs"]]
    return fields


def _samples(pixel_values: Any, pixel_mask: Any) -> NestedTensor:
    if not isinstance(pixel_values, Tensor):
        raise TypeError(f"pixel_values must be a Tensor [B,3,H,W], got {type(pixel_values).__name__}")
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or not pixel_values.is_floating_point():
        raise ValueError(
            "pixel_values must be normalised images, floating point [B,3,H,W], "
            f"got {pixel_values.dtype} {list(pixel_values.shape)}"
        )
    if pixel_mask is None:
        return NestedTensor(pixel_values)
    if not isinstance(pixel_mask, Tensor):
        raise TypeError(f"pixel_mask must be a Tensor [B,H,W] or None, got {type(pixel_mask).__name__}")
    batch, _, height, width = pixel_values.shape
    if pixel_mask.shape != (batch, height, width):
        raise ValueError(
            f"pixel_mask must be [B,H,W] like pixel_values, {[batch, height, width]}, got {list(pixel_mask.shape)}"
        )
    return NestedTensor(pixel_values, ~pixel_mask.to(torch.bool))


def _dtype(dtype: torch.dtype | str | None, checkpoint: Checkpoint) -> torch.dtype:
    if dtype is None:
        return torch.float32
    if dtype == "auto":
        return next(iter(checkpoint.state_dict.values())).dtype
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be a floating point torch.dtype, its name or 'auto', got {dtype!r}")
    return found


def _with_classes(
    checkpoint: Checkpoint,
    num_labels: int | None,
    id2label: dict[int, str] | None,
    label2id: dict[str, int] | None,
    ignore_mismatched_sizes: bool,
) -> Checkpoint:
    if id2label is None and label2id is not None:
        id2label = {index: name for name, index in label2id.items()}
    if id2label is not None:
        id2label = {int(index): name for index, name in id2label.items()}
        if sorted(id2label) != list(range(len(id2label))):
            raise ValueError(f"id2label must have the keys 0 to {len(id2label) - 1}, got {sorted(id2label)[:5]}...")
        if label2id is not None and {name: int(index) for name, index in label2id.items()} != {
            name: index for index, name in id2label.items()
        }:
            raise ValueError("label2id must be the inverse of id2label")
        if num_labels not in (None, len(id2label)):
            raise ValueError(f"num_labels must be the number of labels in id2label, {len(id2label)}, got {num_labels}")
        num_labels = len(id2label)
    state, config = dict(checkpoint.state_dict), checkpoint.config
    assert num_labels is not None
    if num_labels != config.num_classes:
        if not ignore_mismatched_sizes:
            raise ValueError(
                f"{checkpoint.source} has {config.num_classes} classes and {num_labels} are asked for: pass "
                "ignore_mismatched_sizes=True for a class head with random weights"
            )
        head = nn.Linear(config.hidden_dim, num_labels + 1)
        config = config.replace(num_classes=num_labels)
        for name, value in head.state_dict().items():
            state[f"{'detr.' if config.masks else ''}class_embed.{name}"] = value
    categories = checkpoint.categories if num_labels == checkpoint.config.num_classes else None
    if id2label is not None:
        categories = dialects.transformers_categories(id2label, config)
    return dataclasses.replace(checkpoint, config=config, state_dict=state, categories=categories)
