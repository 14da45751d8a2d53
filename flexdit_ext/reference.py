"""FlexDiT (arXiv 2412.06028) in plain PyTorch: the definition that the fast library is tested against.

Part 1 holds the public ops' twins. They take packed rows: the tokens of all samples one after another, [R, C], and one
grid per sample, (h, w) or (f, h, w), whose product is the sample's number of rows; row-major, the last axis fastest.
They loop over the samples and spell the definitions out.
Part 2 holds the blocks and the model on [B, N, C], one grid for the whole batch, with PyTorch's own fast functions.

Letters: B samples, N = H*W dense tokens, M = h*w sparse tokens, C hidden size. "method.md" is the specification.
"""

import bisect
import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, ...]

# ---------------------------------------------------------------------------------------------------------------------
# Part 1: ops on packed rows
# ---------------------------------------------------------------------------------------------------------------------


def token_counts(grids: Sequence[Grid]) -> list[int]:
    """Tokens of each sample: the product of its grid's sides."""
    return [math.prod(grid) for grid in grids]


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, grids: Sequence[Grid], eps: float = 1e-6) -> Tensor:
    """LN(x) * (1 + scale) + shift, LN over C without affine (method.md, Notation).

    x [R, C]; shift, scale [B, C], one row per sample. Returns [R, C].
    """
    samples = x.split(token_counts(grids))
    return torch.cat([_modulated_layer_norm(rows, shift[i], scale[i], eps) for i, rows in enumerate(samples)])


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, grids: Sequence[Grid]) -> Tensor:
    """x + gate * y. x, y [R, C]; gate [B, C], one row per sample. Returns [R, C]."""
    counts = token_counts(grids)
    return torch.cat([a + gate[i] * b for i, (a, b) in enumerate(zip(x.split(counts), y.split(counts)))])


def pooled_attention(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    grids: Sequence[Grid],
    eps: float = 1e-6,
) -> Tensor:
    """W_o mean_n(W_v mod(x)_n + b_v) + b_o: attention whose weights are all 1 / N (method.md, Blocks, pooling block).

    x [R, C]; shift, scale [B, C]; weights [C, C]; biases [C]. Returns [B, C], one vector for all tokens of a sample.
    """
    modulated = modulated_layer_norm(x, shift, scale, grids, eps)
    values = F.linear(modulated, v_weight, v_bias)
    mean = torch.stack([rows.mean(0) for rows in values.split(token_counts(grids))])
    return F.linear(mean, proj_weight, proj_bias)


def pool_tokens(x: Tensor, grids: Sequence[Grid], sparse_grids: Sequence[Grid]) -> Tensor:
    """Adaptive average pooling of every sample to its sparse grid (method.md, Blocks, sparse token generation).

    Window i of n -> m covers [floor(i n / m), ceil((i + 1) n / m)) on each axis; windows may overlap.
    x [R, C]. Returns [sum of the sparse grids' products, C].
    """
    pooled = []
    for rows, grid, sparse_grid in zip(x.split(token_counts(grids)), grids, sparse_grids):
        tokens = rows.unflatten(0, grid)
        for cell in itertools.product(*map(range, sparse_grid)):
            window = tuple(slice(i * n // m, -(-(i + 1) * n // m)) for i, n, m in zip(cell, grid, sparse_grid))
            pooled.append(tokens[window].flatten(0, -2).mean(0))
    return torch.stack(pooled)


def nearest_index(sparse_grid: Grid, grid: Grid, device: torch.device | None = None) -> Tensor:
    """For each dense token its sparse token: on each axis floor(j m / n) (method.md, Blocks). Returns int64 [N].

    In integers: F.interpolate multiplies by a rounded float32 m / n and is one short where j m / n is just an integer.
    """
    index = torch.zeros(1, dtype=torch.int64, device=device)
    for m, n in zip(sparse_grid, grid):
        axis = torch.arange(n, device=device) * m // n
        index = (index[:, None] * m + axis).flatten()
    return index


def recover_tokens(
    s: Tensor,
    x: Tensor,
    sparse_weight: Tensor,
    sparse_bias: Tensor,
    dense_weight: Tensor,
    dense_bias: Tensor,
    sparse_grids: Sequence[Grid],
    grids: Sequence[Grid],
) -> Tensor:
    """m = W_1 up(s) + b_1 + W_2 x + b_2, up = nearest neighbour (method.md, Blocks, dense token recovery).

    s [sum of the sparse grids' products, C]; x [R, C]; weights [C, C]; biases [C]. Returns [R, C].
    """
    sparse_rows = s.split(token_counts(sparse_grids))
    upsampled = [
        rows[nearest_index(sparse_grid, grid, s.device)]
        for rows, sparse_grid, grid in zip(sparse_rows, sparse_grids, grids)
    ]
    return F.linear(torch.cat(upsampled), sparse_weight, sparse_bias) + F.linear(x, dense_weight, dense_bias)


def select_tokens(t: Tensor, begins: Sequence[int], segment_grids: Sequence[Grid]) -> list[Grid]:
    """Sparse grid of every sample: that of the last segment whose begin <= t (method.md, Density schedule).

    t [B], int or float, 0 = data; begins ascending, the first is 0; one grid per segment. Returns B grids.
    """
    return [tuple(segment_grids[bisect.bisect_right(begins, step) - 1]) for step in t.tolist()]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    grids_q: Sequence[Grid],
    grids_k: Sequence[Grid],
    across_frames: bool = False,
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v within every sample, d = C / num_heads, a head's channels contiguous; with
    across_frames (then grids_k is grids_q) among the tokens at one position of a sample's frames.

    q [Rq, C] by grids_q; k, v [Rk, C] by grids_k. Returns [Rq, C].
    """
    counts_k = token_counts(grids_k)
    if across_frames:
        outs = []
        for rows, grid in zip(zip(*(x.split(counts_k) for x in (q, k, v))), grids_q):
            positions = math.prod(grid[-2:])
            by_position = (x.view(-1, positions, x.shape[-1]).transpose(0, 1) for x in rows)  # [h * w, f, C]
            outs.append(_attention(*by_position, num_heads).transpose(0, 1).flatten(0, 1))
        return torch.cat(outs)
    samples = zip(q.split(token_counts(grids_q)), k.split(counts_k), v.split(counts_k))
    return torch.cat([_attention(a[None], b[None], c[None], num_heads)[0] for a, b, c in samples])


# ---------------------------------------------------------------------------------------------------------------------
# Part 2: blocks and the model on [B, N, C]
# ---------------------------------------------------------------------------------------------------------------------


def _modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def _attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """q [B, Nq, C], k, v [B, Nk, C] -> [B, Nq, C]; scale d^-0.5 is the function's default."""
    q, k, v = (tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2) for tokens in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def adaptive_pool(x: Tensor, grid: Grid, sparse_grid: Grid) -> Tensor:
    """pool_tokens for one grid: x [B, N, C] -> [B, M, C]."""
    pool = {2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[len(grid)]
    return pool(x.transpose(1, 2).unflatten(2, grid), sparse_grid).flatten(2).transpose(1, 2)


def sincos_position_embedding(grid: Grid, dim: int) -> Tensor:
    """DiT's fixed 2-D sin-cos table (get_2d_sincos_pos_embed), float64 [prod(grid), dim]; dim divisible by 4.

    The first half of the channels encodes the column, the second half the row, each as [sin | cos] of
    position / 10000^(i / (dim / 4)). A 3-D grid repeats the table over its frames.
    """
    if dim % 4:
        raise ValueError(f"dim must be divisible by 4, got {dim}")
    *frames, height, width = grid
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def encode(positions: int) -> Tensor:
        angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    columns = encode(width)[None].expand(height, -1, -1)
    rows = encode(height)[:, None].expand(-1, width, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1).repeat(math.prod(frames), 1)


def timestep_frequencies(t: Tensor, dim: int = 256, max_period: float = 10000.0, shift: int = 0) -> Tensor:
    """DiT's timestep features [cos | sin] of t / max_period^(i / (dim / 2 - shift)). t [B], int or float -> float32
    [B, dim]. shift is 0 in DiT, 1 in diffusers.

    float32 whatever the model's dtype, as in DiT: checkpoints were trained with these values. exp, cos and sin are
    rounded from double: torch's own in float32 differ between processors, and an angle of 1000 shows it.
    """
    half = dim // 2
    indices = torch.arange(half, dtype=torch.float32, device=t.device)
    exponents = -math.log(max_period) * indices / (half - shift)
    angles = (t.float()[:, None] * exponents.double().exp().float()).double()
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


class TimestepEmbedding(nn.Module):
    """t [B] -> [B, C]: sinusoidal features through a two-layer MLP with SiLU, as in DiT."""

    def __init__(self, dim: int, shift: int = 0):
        super().__init__()
        self.shift = shift
        self.fc1 = nn.Linear(256, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        features = timestep_frequencies(t, shift=self.shift).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(features)))


class Mlp(nn.Module):
    """Linear, GELU(tanh), Linear."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SelfAttention(nn.Module):
    """Multi-head self-attention; qkv's rows are [q; k; v], heads contiguous inside each, as in timm."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(_attention(*self.qkv(x).chunk(3, dim=-1), self.num_heads))


class CrossAttention(nn.Module):
    """Queries from x [B, Nq, C], keys and values from context [B, Nk, C]; kv's rows are [k; v]."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.proj(_attention(self.q(x), *self.kv(context).chunk(2, dim=-1), self.num_heads))


class PooledAttention(nn.Module):
    """Attention with all weights 1 / N: x [B, N, C] -> [B, 1, C]. See pooled_attention."""

    def __init__(self, dim: int):
        super().__init__()
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.v(x).mean(dim=1, keepdim=True))


class Block(nn.Module):
    """DiT block with adaLN-Zero, x [B, N, C], c [B, C] -> [B, N, C]; the subclass brings its attention."""

    def __init__(self, dim: int, mlp_ratio: float, attn: nn.Module):
        super().__init__()
        self.mlp_norm_eps = 1e-6  # FlexDiT sets its configuration's
        self.modulation = nn.Linear(dim, 6 * dim)
        self.attn = attn
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def modulate(self, c: Tensor) -> tuple[Tensor, ...]:
        """shift1, scale1, gate1, shift2, scale2, gate2, each [B, 1, C]."""
        return self.modulation(F.silu(c))[:, None].chunk(6, dim=-1)

    def residual_mlp(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        return x + gate * self.mlp(_modulated_layer_norm(x, shift, scale, self.mlp_norm_eps))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, *mlp_modulation = self.modulate(c)
        x = x + gate1 * self.attn(_modulated_layer_norm(x, shift1, scale1))
        return self.residual_mlp(x, *mlp_modulation)


class DenseBlock(Block):
    """Self-attention among all tokens; on sparse tokens it is the sparse block."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__(dim, mlp_ratio, SelfAttention(dim, num_heads))


class PoolingBlock(Block):
    """Poolingformer: pooled attention adds the same vector to all tokens of a sample."""

    def __init__(self, dim: int, mlp_ratio: float):
        super().__init__(dim, mlp_ratio, PooledAttention(dim))


class GenerationBlock(Block):
    """Sparse token generation: sparse tokens s [B, M, C] read the dense tokens x [B, N, C]. Returns the new s."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__(dim, mlp_ratio, CrossAttention(dim, num_heads))

    def forward(self, s: Tensor, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, *mlp_modulation = self.modulate(c)
        query, context = _modulated_layer_norm(s, shift1, scale1), _modulated_layer_norm(x, shift1, scale1)
        s = s + gate1 * self.attn(query, context)
        return self.residual_mlp(s, *mlp_modulation)


class RecoveryBlock(Block):
    """Dense token recovery: merge s [B, M, C] into x [B, N, C], then let the merged tokens read s. Returns [B, N, C].

    index [N] is nearest_index; position [N, C] is added to the merged tokens (config.reinject_position) unless None.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__(dim, mlp_ratio, CrossAttention(dim, num_heads))
        self.from_sparse = nn.Linear(dim, dim)  # W_1, b_1
        self.from_dense = nn.Linear(dim, dim)  # W_2, b_2

    def forward(self, s: Tensor, x: Tensor, c: Tensor, index: Tensor, position: Tensor | None) -> Tensor:
        shift1, scale1, gate1, *mlp_modulation = self.modulate(c)
        x = self.from_sparse(s.index_select(1, index)) + self.from_dense(x)
        if position is not None:
            x = x + position
        query, context = _modulated_layer_norm(x, shift1, scale1), _modulated_layer_norm(s, shift1, scale1)
        x = x + gate1 * self.attn(query, context)
        return self.residual_mlp(x, *mlp_modulation)


class SparseDenseTokenModule(nn.Module):
    """SDTM (method.md, Blocks): pool, generation blocks, sparse blocks, recovery blocks, dense blocks."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, num_blocks: Sequence[int]):
        super().__init__()
        generation, sparse, recovery, dense = num_blocks
        size = dim, num_heads, mlp_ratio
        self.generation = nn.ModuleList(GenerationBlock(*size) for _ in range(generation))
        self.sparse = nn.ModuleList(DenseBlock(*size) for _ in range(sparse))
        self.recovery = nn.ModuleList(RecoveryBlock(*size) for _ in range(recovery))
        self.dense = nn.ModuleList(DenseBlock(*size) for _ in range(dense))

    def forward(self, x: Tensor, c: Tensor, grid: Grid, sparse_grid: Grid, position: Tensor | None = None) -> Tensor:
        """x [B, N, C] on grid -> [B, N, C]; position [N, C] is added again after each change of grid unless None."""
        s = adaptive_pool(x, grid, sparse_grid)
        if position is not None:
            s = s + adaptive_pool(position[None], grid, sparse_grid)
        for block in self.generation:
            s = block(s, x, c)
        for block in self.sparse:
            s = block(s, c)
        index = nearest_index(sparse_grid, grid, x.device)
        for block in self.recovery:
            x = block(s, x, c, index, position)
        for block in self.dense:
            x = block(x, c)
        return x


class FinalLayer(nn.Module):
    """LN, shift and scale, Linear to a patch's values. x [B, N, C] -> [B, N, p * p * out]."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.modulation = nn.Linear(dim, 2 * dim)
        self.linear = nn.Linear(dim, out_dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(F.silu(c))[:, None].chunk(2, dim=-1)
        return self.linear(_modulated_layer_norm(x, shift, scale))


class FlexDiT(nn.Module):
    """The model. config: any object with FlexDiTConfig's attributes. Weights start as PyTorch's defaults.

    Labels are never dropped here, not even in training mode: the same call gives the same result.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        dim, num_heads, mlp_ratio = config.hidden_size, config.num_heads, config.mlp_ratio
        patch = config.patch_size
        self.grid: Grid = tuple(config.dense_grid)
        num_labels = config.num_classes + (config.class_dropout_prob > 0)  # the null label, last, serves guidance

        self.register_buffer("pos_embed", sincos_position_embedding(self.grid, dim).float())
        self.patch_embed = nn.Conv2d(config.in_channels, dim, patch, stride=patch)
        self.timestep_embed = TimestepEmbedding(dim, config.timestep_shift)
        self.label_embed = nn.Embedding(num_labels, dim)
        self.pooling_blocks = nn.ModuleList(PoolingBlock(dim, mlp_ratio) for _ in range(config.num_pooling_blocks))
        self.sdtm = nn.ModuleList(
            SparseDenseTokenModule(dim, num_heads, mlp_ratio, config.sdtm_blocks) for _ in range(config.num_sdtm)
        )
        self.dense_blocks = nn.ModuleList(DenseBlock(dim, num_heads, mlp_ratio) for _ in range(config.num_dense_blocks))
        self.final_layer = FinalLayer(dim, patch * patch * config.out_channels)
        for block in self.modules():
            if isinstance(block, Block):
                block.mlp_norm_eps = config.mlp_norm_eps

    def forward(self, x: Tensor, t: Tensor, y: Tensor, grid: Grid | Sequence[Grid] | None = None) -> Tensor:
        """x [B, in, H*p, W*p], t [B] in [0, 1000], y [B] int64 -> [B, out, H*p, W*p].

        grid: the sparse grid, (h, w) for all samples or one per sample; needed unless the model has no SDTM.
        """
        if grid is None and len(self.sdtm):
            raise ValueError("grid: the reference has no schedule; give (h, w) or one grid per sample")
        if grid is not None and not isinstance(grid[0], int):
            if len(grid) != len(x):
                raise ValueError(f"grid: {len(grid)} grids for {len(x)} samples")
            samples = zip(x.split(1), t.split(1), y.split(1), grid)
            return torch.cat([self.forward(*sample) for sample in samples])

        position = self.pos_embed if self.config.reinject_position else None
        x = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.timestep_embed(t) + self.label_embed(y)
        for block in self.pooling_blocks:
            x = block(x, c)
        for module in self.sdtm:
            x = module(x, c, self.grid, grid, position)
        for block in self.dense_blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, grid: Grid | Sequence[Grid] | None = None
    ) -> Tensor:
        """Classifier-free guidance as in DiT. x [2B, ...]: the first half is used twice; y: labels, then null labels.

        Guides the first three channels (all, if the image has fewer); the learned variance passes as it is.
        """
        first = x[: len(x) // 2]
        out = self.forward(torch.cat([first, first]), t, y, grid)
        guided = min(3, self.config.in_channels)
        conditional, unconditional = out[:, :guided].chunk(2)
        noise = unconditional + cfg_scale * (conditional - unconditional)
        return torch.cat([torch.cat([noise, noise]), out[:, guided:]], dim=1)

    def unpatchify(self, x: Tensor) -> Tensor:
        """[B, N, p * p * out], a row holding (row, column, channel), -> [B, out, H*p, W*p]."""
        patch = self.config.patch_size
        x = x.unflatten(2, (patch, patch, -1)).unflatten(1, self.grid)  # [B, H, W, p, p, out]
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
