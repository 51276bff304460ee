"""Masked-attention query decoder (paper, sec. 3.2.1).

B pictures, Q queries, C channels, N classes, M pixels of one level
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f.config import QueryDecoderConfig
from m2f.kernels import gpu
from m2f.layers import Attention, FeedForward, sine_positions, xavier_normal_matrices
from m2f.mask_product import masks_of
from m2f.types import Prediction


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward; each normalised after its residual."""

    def __init__(self, channels: int, config: QueryDecoderConfig) -> None:
        super().__init__()
        self.cross_attention = Attention(channels, config.heads)
        self.norm1 = nn.LayerNorm(channels)
        self.self_attention = Attention(channels, config.heads)
        self.norm2 = nn.LayerNorm(channels)
        self.feedforward = FeedForward(channels, config.feedforward)
        self.norm3 = nn.LayerNorm(channels)

    def forward(
        self,
        query_BQC: Tensor,
        position_QC: Tensor,
        key_BMC: Tensor,
        value_BMC: Tensor,
        allowed: Tensor | gpu.MaskWords,
    ) -> Tensor:
        attended = self.cross_attention(query_BQC + position_QC, key_BMC, value_BMC, allowed)
        query_BQC = self.norm1(query_BQC + attended)
        placed = query_BQC + position_QC
        query_BQC = self.norm2(query_BQC + self.self_attention(placed, placed, query_BQC))
        return self.norm3(query_BQC + self.feedforward(query_BQC))


class QueryDecoder(nn.Module):
    """Turns learned queries into classes and masks, once before the first layer and after every layer."""

    def __init__(self, config: QueryDecoderConfig, *, channels: int, num_classes: int, levels: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.query_feature = nn.Embedding(config.queries, channels)
        self.query_position = nn.Embedding(config.queries, channels)
        self.level_embedding = nn.Embedding(levels, channels)
        self.layers = nn.ModuleList(DecoderLayer(channels, config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(channels)
        self.class_head = nn.Linear(channels, num_classes + 1)
        self.mask_head = nn.Sequential(
            nn.Linear(channels, channels),
            nn.ReLU(),
            nn.Linear(channels, channels),
            nn.ReLU(),
            nn.Linear(channels, channels),
        )
        xavier_normal_matrices(self.layers)

    def forward(self, mask_features: Tensor, maps: Sequence[Tensor], *, auxiliary: bool) -> Prediction:
        """`maps`: the attended levels, coarse to fine; without `auxiliary` only the last layer's masks are made."""
        values, keys = [], []
        for x, level in zip(maps, self.level_embedding.weight, strict=True):
            value_BMC = x.flatten(2).transpose(1, 2) + level
            values.append(value_BMC)
            keys.append(value_BMC + sine_positions(x.shape[2], x.shape[3], x.shape[1], x.device))
        # Shrinking the logits, as the paper does, equals taking logits of shrunk features: both are
        # linear. The second needs three small maps in all instead of a full-size one per layer.
        with torch.no_grad():
            # a CPU resizes with the channels last: without this each of the three calls would copy them
            cpu = mask_features.device.type == "cpu"
            features = mask_features.contiguous(memory_format=torch.channels_last) if cpu else mask_features
            shrunk = [
                F.interpolate(features, size=x.shape[2:], mode="bilinear", align_corners=False).flatten(2) for x in maps
            ]

        query = self.query_feature.weight.expand(mask_features.shape[0], -1, -1)
        predictions = []
        for i in range(len(self.layers) + 1):
            last = i == len(self.layers)
            normed = self.norm(query)
            embedding_BQC = self.mask_head(normed)
            if auxiliary or last:
                mask_logits = masks_of(embedding_BQC, mask_features)
                predictions.append(Prediction(self.class_head(normed), mask_logits))
            if last:
                break
            level = i % len(maps)
            allowed = allowed_pixels(embedding_BQC, shrunk[level], heads=self.heads)
            query = self.layers[i](query, self.query_position.weight, keys[level], values[level], allowed)
        *earlier, final = predictions
        return Prediction(final.class_logits, final.mask_logits, tuple(earlier))


@torch.no_grad()
def allowed_pixels(embedding_BQC: Tensor, features_BCM: Tensor, *, heads: int) -> Tensor | gpu.MaskWords:
    """Where queries may look: mask probability at least 1/2, (B, Q, M) bool or as `MaskWords`, which an attention of so
    many heads reads. A query that sees nothing sees everything."""
    if gpu.takes_masks(embedding_BQC, features_BCM, heads):
        return gpu.mask_words(embedding_BQC, features_BCM)
    allowed = (embedding_BQC @ features_BCM).sigmoid() >= 0.5
    allowed |= ~allowed.any(dim=-1, keepdim=True)
    return allowed
