"""The autoencoder that makes pictures of latents: diffusers' AutoencoderKL."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

PIXEL_CHANNELS = (1, 3)


def load_decoder(folder: Path, channels: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """latents [n, channels, h, w] -> images [n, 1 or 3, H, W] in [-1, 1], float32 on the device.

    folder: of AutoencoderKL.save_pretrained, or of a pipeline with such a vae/; its weights are safetensors, no pickle.
    Raises FileNotFoundError, ImportError, or ValueError naming the folder.
    """
    folder = _find(folder)
    _check_config(_read_config(folder), folder, channels)
    vae = _load(folder).to(device).eval()
    config = vae.config
    scale, shift = 1 / config.scaling_factor, config.shift_factor or 0.0
    if config.latents_mean is not None and config.latents_std is not None:
        mean, std = (
            torch.tensor(each, device=device).view(1, -1, 1, 1) for each in (config.latents_mean, config.latents_std)
        )
        scale, shift = scale * std, shift + mean

    def decode(latents: Tensor) -> Tensor:
        return vae.decode(latents.float() * scale + shift).sample

    return decode


def pixels_per_latent(folder: Path) -> int:
    """By how much the images of load_decoder are larger than their latents. Errors as there."""
    config = _read_config(_find(folder))
    levels = config.get("block_out_channels", (64,)) if isinstance(config, dict) else ()
    if not isinstance(levels, (list, tuple)) or not levels:
        raise ValueError(f"--vae: {folder} has block_out_channels {levels!r}, must be a list")
    return 2 ** (len(levels) - 1)


def _find(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"--vae: {folder} is not a folder")
    return folder / "vae" if not (folder / "config.json").exists() and (folder / "vae").is_dir() else folder


def _read_config(folder: Path):
    path = folder / "config.json"
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise FileNotFoundError(f"--vae: {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--vae: {path} is not JSON: {error}") from error


def _check_config(config, folder: Path, channels: int) -> None:
    """What can be told before the weights are read."""
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind != "AutoencoderKL":
        raise ValueError(f"--vae: {folder} is a {kind or 'folder of something else'}, must be an AutoencoderKL")
    latent, pixel = config.get("latent_channels", 4), config.get("out_channels", 3)
    if latent != channels:
        raise ValueError(f"--vae: {folder} has latents of {latent} channels, the model has {channels}: they must agree")
    if pixel not in PIXEL_CHANNELS:
        raise ValueError(f"--vae: {folder} gives images of {pixel} channels, must be 1 or 3")


def _load(folder: Path):
    from diffusers import AutoencoderKL
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what it would tell of is raised below
    try:
        vae, report = AutoencoderKL.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # diffusers raises whatever a damaged configuration leads to
        raise ValueError(f"--vae: {folder} cannot be loaded: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
    wrong = {kind: names for kind, names in report.items() if names}
    if wrong:
        raise ValueError(f"--vae: {folder} has weights that do not fit its configuration: {wrong}")
    return vae
