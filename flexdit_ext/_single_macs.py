"""Multiply-accumulates of FlexPixArt and FlexLatte, as this library computes them."""

from __future__ import annotations

import math

from ._arguments import Grid

_FEATURES = 256  # of a timestep


def macs(config, sparse_grid: Grid | None, caption_tokens: int) -> float:
    """Of one sample's forward pass on the config's dense grid; attention scores count, sums and norms do not."""
    c, hidden = config.hidden_size, config.mlp_hidden_size
    dense, patch = config.dense_grid, config.patch_size**2
    n, order = math.prod(dense), iter(range(config.depth))
    text = caption_tokens if config.caption_channels else 0

    def rest(rows: int, k: int) -> float:
        """Cross-attention, if block k has one, and MLP."""
        cross = 2 * rows * c * c + 2 * text * c * c + 2 * rows * text * c if config.has_cross(k) else 0
        return cross + 2 * rows * c * hidden

    def self_attention(grid: Grid) -> float:
        k, rows = next(order), math.prod(grid)
        keys = {"all": rows, "space": math.prod(grid[-2:]), "time": rows // math.prod(grid[-2:])}[config.axis(k)]
        return 4 * rows * c * c + 2 * rows * keys * c + rest(rows, k)

    def cross_attention(rows: int, keys: int) -> float:
        return 2 * rows * c * c + 2 * keys * c * c + 2 * rows * keys * c + rest(rows, next(order))

    total = n * patch * config.in_channels * c + n * c * patch * config.out_channels
    total += (_FEATURES + c) * c + 6 * c * c + text * (config.caption_channels + c) * c
    if config.size_conditions:
        total += 3 * (_FEATURES + c // 3) * (c // 3)
    for _ in range(config.num_pooling_blocks):
        total += 2 * c * c + rest(n, next(order))
    for _ in range(config.num_sdtm):
        generation, sparse, recovery, last = config.sdtm_blocks
        m = math.prod(sparse_grid)
        total += sum(cross_attention(m, n) for _ in range(generation))
        total += sum(self_attention(sparse_grid) for _ in range(sparse))
        total += sum(m * c * c + n * c * c + cross_attention(n, m) for _ in range(recovery))
        total += sum(self_attention(dense) for _ in range(last))
    return total + sum(self_attention(dense) for _ in range(config.num_dense_blocks))
