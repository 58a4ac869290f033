"""Sine position encodings (Carion et al. 2020, section A.4; Vaswani et al. 2017, section 3.5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from detr_fast import ops
from detr_fast.detr.nested import NestedTensor


class PositionEmbeddingSine(nn.Module):
    """facebookresearch/detr's models/position_encoding.py, always computed in float32.

    Args:
        num_pos_feats: channels for each of y and x; the encoding has twice as many.
        temperature: base of the geometric progression of wavelengths.
        normalize: scale positions so that each image's last row and column are at `scale`.
        scale: the largest position, 2 pi when None; needs `normalize`.
    """

    def __init__(
        self, num_pos_feats: int = 64, temperature: float = 10000, normalize: bool = False, scale: float | None = None
    ):
        super().__init__()
        if scale is not None and not normalize:
            raise ValueError(f"scale needs normalize=True, got scale={scale} with normalize=False")
        self.num_pos_feats = num_pos_feats
        self.temperature = temperature
        self.normalize = normalize
        self.scale = 2 * math.pi if scale is None else scale

    def forward(self, tensor_list: NestedTensor) -> Tensor:
        """float32 [B, 2 * num_pos_feats, H, W] for a NestedTensor [B,C,H,W]: the y half first, then the x half."""
        tensors, mask = tensor_list.decompose()
        if mask is None:
            return self.grid(tensors.shape[2], tensors.shape[3], tensors.device).expand(tensors.shape[0], -1, -1, -1)
        return self.encode(~mask)

    def grid(self, height: int, width: int, device: torch.device) -> Tensor:
        """float32 [1, 2 * num_pos_feats, height, width]: the encoding where nothing is padded."""
        settings = (height, width, device, self.num_pos_feats, self.temperature, self.normalize, self.scale)
        whole = torch.ones(1, height, width, dtype=torch.bool, device=device)
        return ops.kept(self, "grid", settings, (), lambda: self.encode(whole))

    def encode(self, valid: Tensor) -> Tensor:
        """float32 [B, 2 * num_pos_feats, H, W] for bool [B,H,W], True on the image."""
        y, x = (valid.cumsum(axis, dtype=torch.float32) for axis in (1, 2))
        if self.normalize:
            y = y / (y[:, -1:, :] + 1e-6) * self.scale
            x = x / (x[:, :, -1:] + 1e-6) * self.scale
        exponent = torch.arange(self.num_pos_feats, dtype=torch.float32, device=valid.device)
        wavelength = self.temperature ** (2 * exponent.div(2, rounding_mode="floor") / self.num_pos_feats)
        waves = []
        for position in (y, x):
            angle = position[..., None] / wavelength
            waves.append(torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=-1).flatten(-2))
        return torch.cat(waves, dim=-1).permute(0, 3, 1, 2)
