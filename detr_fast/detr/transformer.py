"""The transformer (Carion et al. 2020, section A.3), normalising after each block.

Exact rewrites of `Transformer.definition`: (x + pos) W = x W + pos W, so that one GEMM gives Q, K and
V, and pos W, which depends on nothing but weights and shape, is kept; the keys and values of all decoder layers come
from one GEMM over the memory; attention never returns its weights; tokens on padding are dropped where that is faster.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast import ops, reference


class MultiheadAttention(nn.Module):
    """The parameters of torch.nn.MultiheadAttention under the same names; the layers below compute with them."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def projection(self, dtype: torch.dtype) -> Tensor:
        """The weight [3d,d] of Q, K and V."""
        return ops.cast(self, (self.in_proj_weight,), dtype)[0]

    def position_bias(self, pos: Tensor) -> Tensor:
        """What positions [...,L,d] and biases add to the Q, K, V [...,L,3d] of the tokens there; V sees no position."""
        d = self.embed_dim
        qk = F.linear(pos, self.in_proj_weight[: 2 * d], self.in_proj_bias[: 2 * d])
        return torch.cat((qk, self.in_proj_bias[2 * d :].expand(*qk.shape[:-1], d)), -1)

    def definition(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None = None) -> Tensor:
        """torch.nn.MultiheadAttention without its weights: query [B,Q,d], key and value [B,L,d] to [B,Q,d]."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        return self.out_proj(reference.attention(q, k, v, self.num_heads, padding))


class Tokens:
    """Which of B x L positions the transformer computes, and how they attend to each other.

    Args:
        padding: bool [B,L], True on positions that no token may attend to, or None.
    """

    def __init__(self, padding: Tensor | None):
        self.padding = padding
        self.packed = ops.packs_tokens(padding)
        if padding is not None and self.packed:
            valid = ~padding
            self.index = valid.flatten().nonzero()[:, 0]
            self.lengths: list[int] = valid.sum(1).tolist()

    def pack(self, x: Tensor) -> Tensor:
        """[B,L,C] as it is, or its N tokens off the padding as one sequence [1,N,C]."""
        return x.flatten(0, 1)[self.index][None] if self.packed else x

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse of `pack`; padding becomes 0."""
        if not self.packed:
            return x
        assert self.padding is not None
        rows = x.new_zeros(self.padding.numel(), x.shape[-1]).index_copy(0, self.index, x[0])
        return rows.unflatten(0, self.padding.shape)

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, nheads: int, dropout: float) -> Tensor:
        """From the tokens to the tokens: q, k, v packed."""
        if not self.packed:
            return ops.attention(q, k, v, nheads, self.padding, dropout)
        images = zip(*(x[0].split(self.lengths) for x in (q, k, v)), strict=True)
        return torch.cat([ops.attention(q[None], k[None], v[None], nheads, None, dropout) for q, k, v in images], 1)

    def cross_attention(self, q: Tensor, k: Tensor, v: Tensor, nheads: int, dropout: float) -> Tensor:
        """From the object queries q [B,Q,d] to the tokens k, v of their image, packed."""
        if not self.packed:
            return ops.attention(q, k, v, nheads, self.padding, dropout)
        images = zip(q.unbind(0), k[0].split(self.lengths), v[0].split(self.lengths), strict=True)
        return torch.cat([ops.attention(q[None], k[None], v[None], nheads, None, dropout) for q, k, v in images])


class FeedForward(nn.Module):
    """linear2(relu(linear1(x))); a base class, so that the layers keep facebookresearch/detr's flat names."""

    def __init__(self, d_model: int, dim_feedforward: int, dropout: float):
        super().__init__()
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)

    def feed_forward(self, x: Tensor) -> Tensor:
        return ops.linear(self.linear2, self.dropout(ops.linear(self.linear1, x).relu_()))


class TransformerEncoderLayer(FeedForward):
    def __init__(self, d_model: int, nhead: int, dim_feedforward: int, dropout: float):
        super().__init__(d_model, dim_feedforward, dropout)
        self.self_attn = MultiheadAttention(d_model, nhead, dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, position: Tensor, tokens: Tokens) -> Tensor:
        """x [B,L,d], the residual stream; position [B,L,3d] from `position_bias`, in the dtype to compute in."""
        attn, dtype = self.self_attn, position.dtype
        q, k, v = self.projected(x, position)
        y = tokens.self_attention(q, k, v, attn.num_heads, attn.dropout if self.training else 0.0)
        x = ops.add_layer_norm(x, self.dropout(ops.linear(attn.out_proj, y)), self.norm1)
        return ops.add_layer_norm(x, self.dropout(self.feed_forward(x.to(dtype))), self.norm2)

    def projected(self, x: Tensor, position: Tensor) -> tuple[Tensor, ...]:
        """Q, K and V [B,L,d] of the self-attention."""
        dtype = position.dtype
        return ops.project(x.to(dtype), self.self_attn.projection(dtype), position).chunk(3, -1)


class TransformerDecoderLayer(FeedForward):
    query_groups = 1  # in training: as many sets of queries, one after the other, that do not see each other

    def __init__(self, d_model: int, nhead: int, dim_feedforward: int, dropout: float):
        super().__init__(d_model, dim_feedforward, dropout)
        self.self_attn = MultiheadAttention(d_model, nhead, dropout)
        self.multihead_attn = MultiheadAttention(d_model, nhead, dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.norm3 = nn.LayerNorm(d_model)

    def query_biases(self, query_embed: Tensor) -> tuple[Tensor, Tensor]:
        """[Q,3d] and [Q,d]: what positions [Q,d] and biases add to self-attention's Q, K, V and cross-attention's Q."""
        cross, d = self.multihead_attn, self.multihead_attn.embed_dim
        return (
            self.self_attn.position_bias(query_embed),
            F.linear(query_embed, cross.in_proj_weight[:d], cross.in_proj_bias[:d]),
        )

    def forward(self, tgt: Tensor, k: Tensor, v: Tensor, biases: tuple[Tensor, Tensor], tokens: Tokens) -> Tensor:
        """tgt [B,Q,d], the residual stream; k and v [B,L,d] of the memory; biases from `query_biases`."""
        cross, dtype = self.multihead_attn, k.dtype
        tgt, q = self.cross_queries(tgt, biases, dtype)
        y = tokens.cross_attention(q, k, v, cross.num_heads, cross.dropout if self.training else 0.0)
        tgt = ops.add_layer_norm(tgt, self.dropout(ops.linear(cross.out_proj, y)), self.norm2)
        return ops.add_layer_norm(tgt, self.dropout(self.feed_forward(tgt.to(dtype))), self.norm3)

    def cross_queries(self, tgt: Tensor, biases: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """tgt [B,Q,d] after self-attention, and the Q [B,Q,d] of the cross-attention that follows."""
        attn, cross = self.self_attn, self.multihead_attn
        q, k, v = ops.project(tgt.to(dtype), attn.projection(dtype), biases[0]).chunk(3, -1)
        q, k, v = (x.unflatten(1, (self.query_groups, -1)).flatten(0, 1) for x in (q, k, v))
        y = ops.attention(q, k, v, attn.num_heads, dropout=attn.dropout if self.training else 0.0)
        y = y.reshape(tgt.shape)
        tgt = ops.add_layer_norm(tgt, self.dropout(ops.linear(attn.out_proj, y)), self.norm1)
        return tgt, ops.project(tgt.to(dtype), cross.projection(dtype)[: cross.embed_dim], biases[1])


class TransformerEncoder(nn.Module):
    def __init__(self, layer: TransformerEncoderLayer, num_layers: int):
        super().__init__()
        self.layers: Any = nn.ModuleList(copy.deepcopy(layer) for _ in range(num_layers))

    def position_biases(self, pos: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """[B,L,3d] for each layer from positions [B,L,d]."""
        return [layer.self_attn.position_bias(pos).to(dtype) for layer in self.layers]


class TransformerDecoder(nn.Module):
    def __init__(self, layer: TransformerDecoderLayer, num_layers: int, norm: nn.LayerNorm):
        super().__init__()
        self.layers: Any = nn.ModuleList(copy.deepcopy(layer) for _ in range(num_layers))
        self.norm = norm

    def cross_attentions(self) -> list[MultiheadAttention]:
        return [layer.multihead_attn for layer in self.layers]

    def memory_projection(self, dtype: torch.dtype) -> Tensor:
        """[layers*2d,d]: gives K and V of every layer, in turn, from the memory."""
        attentions = self.cross_attentions()
        weights = [attn.in_proj_weight for attn in attentions]
        d = attentions[0].embed_dim
        return ops.kept(
            self, "memory_projection", dtype, weights, lambda: torch.cat([weight[d:] for weight in weights]).to(dtype)
        )

    def memory_bias(self, pos: Tensor, dtype: torch.dtype) -> Tensor:
        """[B,L,layers*2d] from positions [B,L,d]: what positions and biases add to `memory_projection`'s outcome."""
        attentions = self.cross_attentions()
        d = attentions[0].embed_dim
        return torch.cat([attn.position_bias(pos)[..., d:] for attn in attentions], -1).to(dtype)


class Transformer(nn.Module):
    """facebookresearch/detr's models/transformer.py, post-norm, returning every decoder layer."""

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
    ):
        super().__init__()
        sizes = (d_model, nhead, dim_feedforward, dropout)
        self.encoder = TransformerEncoder(TransformerEncoderLayer(*sizes), num_encoder_layers)
        self.decoder = TransformerDecoder(TransformerDecoderLayer(*sizes), num_decoder_layers, nn.LayerNorm(d_model))
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.d_model = d_model
        self.nhead = nhead

    def forward(
        self, src: Tensor, mask: Tensor | None, query_embed: Tensor, pos_embed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Encodes feature maps and decodes object queries.

        Args:
            src: [B,d,h,w], in the dtype to compute in; residual stream, norms and softmax are float32 at least.
            mask: bool [B,h,w], True on padding, or None.
            query_embed: [Q,d].
            pos_embed: [B,d,h,w].

        Returns:
            hs [layers,B,Q,d], normalised outputs of the decoder's layers, and memory [B,d,h,w]. Memory on padding,
            which nothing may read, is 0 where the CPU skips it.
        """
        if ops.is_plain("transformer"):
            return self.definition(src, mask, query_embed, pos_embed)
        dtype, batch = src.dtype, src.shape[0]
        tokens = Tokens(None if mask is None else mask.flatten(1))
        encoder_biases, memory_bias = self._position_biases(pos_embed, dtype, tokens)
        x = tokens.pack(_sequence(src)).to(reference.at_least_float32(dtype))  # [B,L,d], or packed [1,N,d]
        for layer, bias in zip(self.encoder.layers, encoder_biases, strict=True):
            x = layer(x, bias, tokens)
        keys_values = ops.project(x.to(dtype), self.decoder.memory_projection(dtype), memory_bias)  # [B,L,layers*2*d]
        pairs = keys_values.unflatten(-1, (len(self.decoder.layers), 2, self.d_model)).unbind(-3)
        tgt = x.new_zeros(batch, *query_embed.shape)  # [B,Q,d]
        hs = []
        query_biases = self._query_biases(query_embed, dtype)
        for layer, pair, biases in zip(self.decoder.layers, pairs, query_biases, strict=True):
            tgt = layer(tgt, *pair.unbind(-2), biases, tokens)
            hs.append(ops.layer_norm(tgt, self.decoder.norm))
        return torch.stack(hs), tokens.unpack(x).transpose(1, 2).unflatten(-1, src.shape[-2:])

    def definition(
        self, src: Tensor, mask: Tensor | None, query_embed: Tensor, pos_embed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`forward` in evaluation, without dropout, as facebookresearch/detr computes it."""
        x, pos = _sequence(src), _sequence(pos_embed.to(src.dtype))  # [B,L,d]
        padding = None if mask is None else mask.flatten(1)
        for layer in self.encoder.layers:
            x = layer.norm1(x + layer.self_attn.definition(x + pos, x + pos, x, padding))
            x = layer.norm2(x + layer.linear2(layer.linear1(x).relu()))
        query_pos = query_embed.expand(src.shape[0], -1, -1)  # [B,Q,d]
        tgt, hs = torch.zeros_like(query_pos), []
        for layer in self.decoder.layers:
            q = tgt + query_pos
            tgt = layer.norm1(tgt + layer.self_attn.definition(q, q, tgt))
            tgt = layer.norm2(tgt + layer.multihead_attn.definition(tgt + query_pos, x + pos, x, padding))
            tgt = layer.norm3(tgt + layer.linear2(layer.linear1(tgt).relu()))
            hs.append(self.decoder.norm(tgt))
        return torch.stack(hs), x.transpose(1, 2).unflatten(-1, src.shape[-2:])

    def _position_biases(self, pos_embed: Tensor, dtype: torch.dtype, tokens: Tokens) -> tuple[list[Tensor], Tensor]:
        """For each encoder layer and for the memory. Kept for images without padding: they depend on the size alone."""
        parameters = [
            parameter
            for attn in [layer.self_attn for layer in self.encoder.layers] + self.decoder.cross_attentions()
            for parameter in (attn.in_proj_weight, attn.in_proj_bias)
        ]

        def build() -> tuple[list[Tensor], Tensor]:
            shared = pos_embed[:1] if pos_embed.stride(0) == 0 else pos_embed  # expanded over the batch
            pos = tokens.pack(_sequence(shared)).to(parameters[0].dtype)
            return self.encoder.position_biases(pos, dtype), self.decoder.memory_bias(pos, dtype)

        if tokens.padding is not None:
            return build()
        return ops.kept(self, "positions", (tuple(pos_embed.shape), dtype), [pos_embed, *parameters], build)

    def _query_biases(self, query_embed: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        parameters = [
            parameter
            for layer in self.decoder.layers
            for attn in (layer.self_attn, layer.multihead_attn)
            for parameter in (attn.in_proj_weight, attn.in_proj_bias)
        ]

        def build() -> list[tuple[Tensor, Tensor]]:
            pairs = [layer.query_biases(query_embed) for layer in self.decoder.layers]
            return [(own.to(dtype), cross.to(dtype)) for own, cross in pairs]

        return ops.kept(self, "queries", dtype, [query_embed, *parameters], build)


def _sequence(x: Tensor) -> Tensor:
    """[B,d,h,w] to [B,h*w,d]."""
    return x.flatten(2).transpose(1, 2)
