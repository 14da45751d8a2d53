"""The token density over the denoising of one image, as a PNG strip.

    python examples/density_strip.py out/flexdit --sampler flow --label 3 --out strip.png

A column for each step shown, from noise to data. Top: what enters the model. Below: the image that the model expects at
the end, with the windows of its sparse tokens, each in the colour of its mean: the detail that sparse blocks work on.
Bottom: the number of sparse tokens, the full height being all dense tokens. Without a checkpoint a small untrained
model stands in: its images are noise, its grids are as they would be.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from flexdit_ext import DensitySchedule, FlexDiT, FlexDiTConfig
from flexdit_ext.diffusion import make_sampler
from flexdit_ext.diffusion.ddpm import split_output
from flexdit_ext.sampling import derive_seed, normal_noise

CELL, GAP, BAR, TEXT = 160, 8, 60, 34  # pixels
INK, PALE, LINE = (40, 40, 40), (225, 228, 232), (255, 140, 0)


def untrained() -> FlexDiT:
    torch.manual_seed(0)
    schedule = DensitySchedule([(8, 8), (6, 6), (4, 4), (2, 2)])
    return FlexDiT(
        FlexDiTConfig(
            input_size=32, hidden_size=64, num_heads=4, num_classes=10, num_pooling_blocks=1, num_sdtm=1,
            num_dense_blocks=1, schedule=schedule,
        )
    ).eval()  # fmt: skip


@torch.no_grad()
def denoise(model: FlexDiT, label: int, steps: int, sampler: str, seed: int) -> list[tuple]:
    """One image's way: per step its timestep, sparse grid, input [C, H, W] and expected image [C, H, W]."""
    config, walker = model.config, make_sampler(sampler, steps)
    seeds, shape = [derive_seed(seed, 0)], (config.in_channels, config.input_size, config.input_size)
    x, out = normal_noise(seeds, 0, shape), []
    for i, step in enumerate(walker.steps):
        output = model(x, torch.tensor([step.timestep]), torch.tensor([label]))
        expected = step.x0_from_x * x + step.x0_from_output * split_output(output, config.in_channels)[0]
        out.append((step.timestep, model.schedule.grid(step.timestep), x[0], expected[0]))
        noise = normal_noise(seeds, i + 1, shape) if walker.needs_noise(i) else None
        x = walker.step(output, i, x, noise)
    return out


def windows(length: int, count: int) -> list[slice]:
    """The pooling windows of `count` sparse tokens along `length` dense ones; they may overlap."""
    return [slice(i * length // count, ((i + 1) * length - 1) // count + 1) for i in range(count)]


def means(values: np.ndarray, dense: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """[C, H, W] -> [C, *grid]: the mean over every sparse token's window."""
    channels, height, width = values.shape
    tokens = values.reshape(channels, dense[0], height // dense[0], dense[1], width // dense[1]).mean(axis=(2, 4))
    rows, columns = windows(dense[0], grid[0]), windows(dense[1], grid[1])
    return np.stack([np.stack([tokens[:, y, x].mean(axis=(1, 2)) for x in columns], 1) for y in rows], 1)


def picture(values: np.ndarray, scale: float) -> Image.Image:
    """[C, H, W] -> a cell: one channel in grey, else the first three as colours; +-scale is the whole range."""
    colours = np.repeat(values[:1], 3, axis=0) if len(values) < 3 else values[:3]
    pixels = np.clip((colours / scale + 1) * 127.5, 0, 255).astype(np.uint8).transpose(1, 2, 0)
    return Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.NEAREST)


def mosaic(values: np.ndarray, dense: tuple[int, int], grid: tuple[int, int], scale: float) -> Image.Image:
    """The windows' means, and lines between them."""
    cell = picture(means(values, dense, grid), scale)
    draw = ImageDraw.Draw(cell)
    for count, line in ((grid[1], lambda p: (p, 0, p, CELL)), (grid[0], lambda p: (0, p, CELL, p))):
        for i in range(1, count):
            draw.line(line(round(i * CELL / count)), fill=LINE)
    return cell


def strip(way: list[tuple], dense: tuple[int, int], columns: int) -> Image.Image:
    """`columns` of the steps, the first and the last among them."""
    shown = [way[round(i * (len(way) - 1) / max(columns - 1, 1))] for i in range(min(columns, len(way)))]
    image = Image.new("RGB", (len(shown) * (CELL + GAP) + GAP, 2 * (CELL + GAP) + GAP + BAR + TEXT), "white")
    draw = ImageDraw.Draw(image)
    scale = float(np.abs(way[-1][3].numpy()).max()) or 1.0
    for i, (t, grid, x, expected) in enumerate(shown):
        left, top = GAP + i * (CELL + GAP), GAP
        image.paste(picture(x.numpy(), 3 * float(x.std())), (left, top))
        image.paste(mosaic(expected.numpy(), dense, grid, scale), (left, top + CELL + GAP))
        bottom = top + 2 * (CELL + GAP) + BAR
        tokens, total = grid[0] * grid[1], dense[0] * dense[1]
        draw.rectangle((left, bottom - BAR, left + CELL - 1, bottom), fill=PALE)
        draw.rectangle((left, bottom - round(BAR * tokens / total), left + CELL - 1, bottom), fill=LINE)
        draw.text((left, bottom + 4), f"t = {t:.0f}\n{grid[0]}x{grid[1]}: {tokens} of {total} tokens", fill=INK)
    return image


def save_whole(image: Image.Image, path: Path) -> None:
    """Under a temporary name, then renamed."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-", suffix=".png")
    os.close(handle)
    try:
        image.save(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="what save_pretrained wrote, such as out/flexdit of `make demo`")
    parser.add_argument("--label", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--sampler", default="ddim", help='of make_sampler; "flow" for a flow model, as the demo\'s is')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--columns", type=int, default=8, help="steps shown")
    parser.add_argument("--out", type=Path, default=Path("density_strip.png"))
    arguments = parser.parse_args()
    if arguments.columns < 1:
        parser.error(f"--columns is {arguments.columns}, must be at least 1")
    model = untrained()
    if arguments.checkpoint:
        model = FlexDiT.from_pretrained(arguments.checkpoint, dtype=torch.float32)
    if not model.config.num_sdtm:
        parser.error(f"{arguments.checkpoint} is a dense DiT, it has no sparse tokens")
    if not 0 <= arguments.label <= model.config.num_classes:
        parser.error(f"--label is {arguments.label}, must be in 0..{model.config.num_classes}")
    way = denoise(model, arguments.label, arguments.steps, arguments.sampler, arguments.seed)
    save_whole(strip(way, model.config.dense_grid, arguments.columns), arguments.out)
    print(f"{arguments.out}: sparse tokens {[grid[0] * grid[1] for _, grid, _, _ in way]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
