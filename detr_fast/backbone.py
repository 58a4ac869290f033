"""ResNet with frozen batch normalisation (He et al. 2016; Carion et al. 2020, section 4)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast import ops, reference
from detr_fast.config import RESNETS, DetrConfig
from detr_fast.nested import NestedTensor
from detr_fast.position import PositionEmbeddingSine


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation with fixed statistics and affine parameters (facebookresearch/detr, models/backbone.py)."""

    eps = 1e-5

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)  # torchvision's weights have it, nothing here needs it
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] to [B,C,H,W]."""
        return reference.frozen_batch_norm(x, self)


class FoldedConv(NamedTuple):
    """A convolution and the frozen normalisation after it as one convolution with a bias."""

    weight: Tensor
    bias: Tensor
    stride: int
    padding: int
    dilation: int

    @classmethod
    def of(cls, conv: nn.Conv2d, norm: FrozenBatchNorm2d, dtype: torch.dtype) -> FoldedConv:
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight = ops.image_layout((conv.weight * scale[:, None, None, None]).to(dtype))
        bias = (norm.bias - norm.running_mean * scale).to(dtype)
        return cls(weight, bias, int(conv.stride[0]), int(conv.padding[0]), int(conv.dilation[0]))

    def __call__(self, x: Tensor, *, relu: bool = False, residual: Tensor | None = None) -> Tensor:
        geometry = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return ops.conv2d(x, self.weight, self.bias, **geometry, relu=relu, residual=residual)


Unit = tuple[nn.Conv2d, FrozenBatchNorm2d]


class Block(nn.Module):
    """A residual block. Subclasses name their convolutions as torchvision does."""

    downsample: nn.Sequential | None

    def units(self) -> list[Unit]:
        """Each convolution of the main branch with the normalisation after it, in order."""
        raise TypeError(f"{type(self).__name__} must say what its units are")

    def forward(self, x: Tensor, folded: dict[nn.Module, FoldedConv]) -> Tensor:
        """[B,C,H,W] to [B,C',H/stride,W/stride]; may overwrite x."""
        *first, last = (folded[conv] for conv, _ in self.units())
        identity = x if self.downsample is None else folded[self.downsample[0]](x)
        for conv in first:
            x = conv(x, relu=True)
        return last(x, relu=True, residual=identity)


class BasicBlock(Block):
    def __init__(self, in_channels: int, width: int, stride: int, dilation: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, dilation, dilation, bias=False)
        self.bn1 = FrozenBatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, dilation, dilation, bias=False)
        self.bn2 = FrozenBatchNorm2d(width)
        self.downsample = _downsample(in_channels, width, stride)

    def units(self) -> list[Unit]:
        return [(self.conv1, self.bn1), (self.conv2, self.bn2)]


class Bottleneck(Block):
    def __init__(self, in_channels: int, width: int, stride: int, dilation: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = FrozenBatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = FrozenBatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = FrozenBatchNorm2d(4 * width)
        self.downsample = _downsample(in_channels, 4 * width, stride)

    def units(self) -> list[Unit]:
        return [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]


def _downsample(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), FrozenBatchNorm2d(out_channels))


class ResNet(nn.Module):
    """ResNet without its classifier; parameter names are torchvision's. The stride is in the 3x3 convolution."""

    def __init__(self, config: DetrConfig):
        super().__init__()
        depths, expansion = RESNETS[config.backbone]
        block = Bottleneck if expansion == 4 else BasicBlock
        width = config.backbone_width
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = FrozenBatchNorm2d(width)
        channels = width
        for number, depth in enumerate(depths, 1):
            stride = 1 if number == 1 or (number == 4 and config.dilation) else 2
            # DC5: the last stage keeps its resolution, and all its blocks but the first see twice as far
            dilation = 2 if number == 4 and config.dilation else 1
            blocks = []
            for index in range(depth):
                first = index == 0
                blocks.append(block(channels, width, stride if first else 1, 1 if first else dilation))
                channels = width * expansion
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            width *= 2
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def stages(self) -> list[list[Block]]:
        return [list(getattr(self, f"layer{number}")) for number in range(1, 5)]

    def units(self) -> list[Unit]:
        """Every convolution with the normalisation after it."""
        units = [(self.conv1, self.bn1)]
        for stage in self.stages():
            for block in stage:
                units += block.units()
                if block.downsample is not None:
                    conv, norm = block.downsample
                    assert isinstance(conv, nn.Conv2d) and isinstance(norm, FrozenBatchNorm2d)
                    units.append((conv, norm))
        return units

    def forward(self, x: Tensor) -> list[Tensor]:
        """The outputs of the four stages, strides 4, 8, 16 and 32 (16 with dilation), for images [B,3,H,W]."""
        if ops.is_plain("backbone"):
            return reference.resnet(self, x)
        folded = self._folded(x.dtype)
        x = F.max_pool2d(folded[self.conv1](ops.image_layout(x), relu=True), 3, 2, 1)
        outputs = []
        for stage in self.stages():
            for block in stage:
                x = block(x, folded)
            outputs.append(x)
        return outputs

    def _folded(self, dtype: torch.dtype) -> dict[nn.Module, FoldedConv]:
        units = self.units()
        sources = [tensor for conv, norm in units for tensor in (conv.weight, *norm.buffers())]
        layout = ops.is_plain("channels_last")
        return ops.kept(
            self,
            "folded",
            (dtype, layout),
            sources,
            lambda: {conv: FoldedConv.of(conv, norm, dtype) for conv, norm in units},
        )


class Backbone(nn.Module):
    """The ResNet under facebookresearch/detr's name `body`; returns all four stages, or the last alone."""

    def __init__(self, config: DetrConfig):
        super().__init__()
        self.body = ResNet(config)
        self.num_channels = config.stage_channels[-1]
        self.return_interm_layers = config.masks

    def forward(self, tensor_list: NestedTensor) -> OrderedDict[str, NestedTensor]:
        """Feature maps by name, coarser last, each with the padding mask at its resolution."""
        images, mask = tensor_list.decompose()
        features = self.body(images)
        if not self.return_interm_layers:
            features = features[-1:]
        return OrderedDict((str(i), NestedTensor(x, _resize_mask(mask, x))) for i, x in enumerate(features))


class Joiner(nn.Sequential):
    """The backbone at 0 and the position encoding at 1."""

    def __init__(self, backbone: Backbone, position_embedding: PositionEmbeddingSine):
        super().__init__(backbone, position_embedding)
        self.num_channels = backbone.num_channels

    def forward(self, tensor_list: NestedTensor) -> tuple[list[NestedTensor], list[Tensor]]:
        """Feature maps, coarser last, and the last one's position encoding float32 [B,d,h,w] in a list."""
        features = list(self[0](tensor_list).values())
        return features, [self[1](features[-1])]


def build_backbone(config: DetrConfig) -> Joiner:
    return Joiner(Backbone(config), PositionEmbeddingSine(config.hidden_dim // 2, normalize=True))


def _resize_mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    if mask is None:
        return None
    return F.interpolate(mask[None].float(), size=x.shape[-2:])[0].to(torch.bool)
