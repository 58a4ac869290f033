"""ResNet with frozen batch normalisation (He et al. 2016; Carion et al. 2020, section 4)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast import ops, reference
from detr_fast.config import RESNETS, DetrConfig
from detr_fast.detr.nested import NestedTensor
from detr_fast.detr.position import PositionEmbeddingSine


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
        return reference.frozen_batch_norm(x, self.weight, self.bias, self.running_mean, self.running_var, self.eps)


class LiveBatchNorm2d(FrozenBatchNorm2d):
    """Batch normalisation that trains, by the names and with the state of a frozen one: as nn.BatchNorm2d, with
    momentum 0.1."""

    def __init__(self, frozen: FrozenBatchNorm2d):
        super().__init__(len(frozen.weight))
        self.load_state_dict(frozen.state_dict())
        for name in ("weight", "bias"):
            parameter = nn.Parameter(getattr(self, name))
            delattr(self, name)
            self.register_parameter(name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] to [B,C,H,W], by the batch's statistics in training and by the running ones in evaluation."""
        statistics = (self.running_mean, self.running_var)
        return F.batch_norm(x, *statistics, self.weight, self.bias, self.training, 0.1, self.eps)


def thaw_batch_norm(module: nn.Module) -> None:
    """Replaces every FrozenBatchNorm2d within `module` by a LiveBatchNorm2d, for a backbone that is not pretrained."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is FrozenBatchNorm2d:
                setattr(parent, name, LiveBatchNorm2d(child).to(child.weight.device))


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


class LiveConv(NamedTuple):
    """A convolution and the live normalisation after it."""

    conv: nn.Conv2d
    norm: LiveBatchNorm2d
    weight: Tensor

    @classmethod
    def of(cls, conv: nn.Conv2d, norm: FrozenBatchNorm2d, dtype: torch.dtype) -> LiveConv:
        assert isinstance(norm, LiveBatchNorm2d)
        return cls(conv, norm, ops.image_layout(conv.weight.to(dtype)))

    def __call__(self, x: Tensor, *, relu: bool = False, residual: Tensor | None = None) -> Tensor:
        conv = self.conv
        y = self.norm(F.conv2d(x, self.weight, None, conv.stride, conv.padding, conv.dilation))
        if residual is not None:
            y = y + residual
        return y.relu_() if relu else y


Unit = tuple[nn.Conv2d, FrozenBatchNorm2d]
Convs = Mapping[nn.Module, FoldedConv | LiveConv]


class Block(nn.Module):
    """A residual block. Subclasses name their convolutions as torchvision does."""

    downsample: nn.Sequential | None

    def units(self) -> list[Unit]:
        """Each convolution of the main branch with the normalisation after it, in order."""
        raise TypeError(f"{type(self).__name__} must say what its units are")

    def forward(self, x: Tensor, convs: Convs) -> Tensor:
        """[B,C,H,W] to [B,C',H/stride,W/stride]; may overwrite x."""
        *first, last = (convs[conv] for conv, _ in self.units())
        identity = x if self.downsample is None else convs[self.downsample[0]](x)
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
            return self.definition(x)
        convs = self._convs(x.dtype)
        x = convs[self.conv1](ops.image_layout(x), relu=True)  # [B,width,H/2,W/2]
        x = F.max_pool2d(x, 3, 2, 1)  # [B,width,H/4,W/4]
        outputs = []
        for stage in self.stages():
            for block in stage:
                x = block(x, convs)
            outputs.append(x)
        return outputs

    def definition(self, x: Tensor) -> list[Tensor]:
        """`forward` as facebookresearch/detr computes it: each convolution, norm, ReLU and sum by itself."""

        def convolve(x: Tensor, conv: nn.Conv2d, norm: nn.Module) -> Tensor:
            return norm(F.conv2d(x, conv.weight.to(x.dtype), None, conv.stride, conv.padding, conv.dilation))

        x = F.max_pool2d(convolve(x, self.conv1, self.bn1).relu(), 3, 2, 1)
        stages = []
        for stage in self.stages():
            for block in stage:
                y, units = x, block.units()
                for index, (conv, norm) in enumerate(units):
                    y = convolve(y, conv, norm)
                    y = y.relu() if index < len(units) - 1 else y
                identity = x if block.downsample is None else convolve(x, *block.downsample)
                x = (y + identity).relu()
            stages.append(x)
        return stages

    def _convs(self, dtype: torch.dtype) -> Convs:
        """Each convolution with its normalisation: folded into one, unless the latter is live."""
        units = self.units()
        if isinstance(self.bn1, LiveBatchNorm2d):
            return {conv: LiveConv.of(conv, norm, dtype) for conv, norm in units}
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
