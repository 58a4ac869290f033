"""Every size of a DETR in one place."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

# depth of each stage and channel expansion of its blocks (He et al. 2016, table 1)
RESNETS: dict[str, tuple[tuple[int, int, int, int], int]] = {
    "resnet18": ((2, 2, 2, 2), 1),
    "resnet34": ((3, 4, 6, 3), 1),
    "resnet50": ((3, 4, 6, 3), 4),
    "resnet101": ((3, 4, 23, 3), 4),
}


@dataclass(frozen=True)
class DetrConfig:
    """The sizes of a DETR (Carion et al. 2020, section 4), facebookresearch/detr's names and defaults.

    Attributes:
        backbone: "resnet18", "resnet34", "resnet50" or "resnet101".
        backbone_width: channels of the backbone's stem; 64 is the published ResNet.
        dilation: dilate the last stage instead of striding it (the paper's DC5).
        hidden_dim: width of the transformer.
        nheads: attention heads; divides `hidden_dim`.
        enc_layers, dec_layers: depth of the encoder and of the decoder.
        dim_feedforward: width of the feed-forward blocks.
        dropout: probability, in training only.
        num_queries: object queries, the most objects one image can have.
        num_classes: classes without the no-object class; `pred_logits` has one more.
        masks: add the panoptic mask head (`DETRsegm`).
        aux_loss: also return the predictions of every decoder layer but the last.
        image_size, max_image_size: pixels of the short side, and the most pixels of the long side, of the images that
            the model was made for. Preprocessing resizes images so; the model itself takes any size.

    Raises:
        TypeError, ValueError: a field has the wrong type or is out of range; the message names it.
    """

    backbone: str = "resnet50"
    backbone_width: int = 64
    dilation: bool = False
    hidden_dim: int = 256
    nheads: int = 8
    enc_layers: int = 6
    dec_layers: int = 6
    dim_feedforward: int = 2048
    dropout: float = 0.1
    num_queries: int = 100
    num_classes: int = 91
    masks: bool = False
    aux_loss: bool = False
    image_size: int = 800
    max_image_size: int = 1333

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value: Any = getattr(self, field.name)
            accepted = {"str": (str,), "bool": (bool,), "int": (int,), "float": (float, int)}[str(field.type)]
            if not isinstance(value, accepted) or (isinstance(value, bool) and field.type != "bool"):
                raise TypeError(f"{field.name} must be {field.type}, got {value!r}")
            if isinstance(value, int) and field.type == "int" and not 1 <= value <= 65536:
                raise ValueError(f"{field.name} must be between 1 and 65536, got {value}")
        if self.backbone not in RESNETS:
            raise ValueError(f"backbone must be one of {', '.join(RESNETS)}, got {self.backbone!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.dilation and RESNETS[self.backbone][1] == 1:
            raise ValueError(f"dilation needs a bottleneck backbone (resnet50, resnet101), got {self.backbone!r}")
        if self.hidden_dim % (2 * self.nheads) or self.hidden_dim % 4:
            raise ValueError(
                f"hidden_dim must be a multiple of 4 and of 2 x nheads, got {self.hidden_dim} with {self.nheads} heads"
            )
        if self.masks and self.hidden_dim < 16:
            raise ValueError(f"the mask head needs hidden_dim of at least 16, got {self.hidden_dim}")
        if self.masks and any(width % min(8, width) for width in self.mask_head_channels):
            raise ValueError(
                f"the mask head's widths {self.mask_head_channels}, made from hidden_dim {self.hidden_dim} and "
                f"{self.nheads} heads, must each be a multiple of 8 or below it (GroupNorm of 8 groups)"
            )

    @property
    def stage_channels(self) -> tuple[int, int, int, int]:
        """Output channels of the backbone's four stages, strides 4, 8, 16, 32 (16 with dilation)."""
        first = self.backbone_width * RESNETS[self.backbone][1]
        return first, 2 * first, 4 * first, 8 * first

    @property
    def mask_head_channels(self) -> tuple[int, int, int, int, int]:
        """Widths of the mask head's five convolutions, at strides 32, 32, 16, 8 and 4."""
        d = self.hidden_dim
        return d + self.nheads, d // 2, d // 4, d // 8, d // 16

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DetrConfig:
        """Raises ValueError, naming them, on keys that are no field."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown config keys {', '.join(unknown)}; accepted are {', '.join(known)}")
        return cls(**values)

    def replace(self, **changes: Any) -> DetrConfig:
        return dataclasses.replace(self, **changes)


# facebookresearch/detr's Torch Hub entry points, with COCO's `num_classes`, and the small bundled model, with the
# classes of `data.shapes`.
PRESETS: dict[str, DetrConfig] = {
    "detr_resnet50": DetrConfig(),
    "detr_resnet50_dc5": DetrConfig(dilation=True),
    "detr_resnet101": DetrConfig(backbone="resnet101"),
    "detr_resnet101_dc5": DetrConfig(backbone="resnet101", dilation=True),
    "detr_resnet50_panoptic": DetrConfig(num_classes=250, masks=True),
    "detr_resnet50_dc5_panoptic": DetrConfig(dilation=True, num_classes=250, masks=True),
    "detr_resnet101_panoptic": DetrConfig(backbone="resnet101", num_classes=250, masks=True),
    "shapes": DetrConfig(
        backbone="resnet18",
        backbone_width=16,
        hidden_dim=128,
        enc_layers=3,
        dec_layers=4,
        dim_feedforward=256,
        dropout=0.0,
        num_queries=30,
        num_classes=15,
        masks=True,
        image_size=256,
        max_image_size=426,
    ),
}
