"""Captions for FlexPixArt and FlexLatte: of prompts, by a T5 encoder of transformers, or of a file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

_BATCH = 8  # prompts at once


@dataclass(frozen=True)
class Captions:
    """caption [N, L, C] and mask [N, L] bool, and where there is one those of the text that guidance leads away from,
    [N or 1, L0, C] and [N or 1, L0]."""

    caption: Tensor
    mask: Tensor
    null: Tensor | None = None
    null_mask: Tensor | None = None


def read_prompts(path: Path) -> list[str]:
    """One a line; empty lines do not count."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except ValueError as error:
        raise ValueError(f"--prompts: {path} is not UTF-8: {error}") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts: {path} has no prompts, must have one a line")
    return prompts


# ---- transformers' T5 -----------------------------------------------------------------------------------------------


def check_text_encoder(folder: Path, channels: int) -> None:
    """What can be told before anything is loaded. Raises FileNotFoundError or ValueError naming the folder."""
    encoder, tokenizer = _parts(folder)
    for part in (encoder, tokenizer):
        if not part.is_dir():
            raise FileNotFoundError(f"--text-encoder: {part} is not a folder")
    path = encoder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise FileNotFoundError(f"--text-encoder: {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--text-encoder: {path} is not JSON: {error}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "t5":
        raise ValueError(f"--text-encoder: {encoder} is a {kind or 'folder of something else'}, must be a t5")
    if config.get("d_model") != channels:
        raise ValueError(
            f"--text-encoder: {encoder} gives captions of {config.get('d_model')} channels, the model has {channels}: "
            "they must agree"
        )


def _parts(folder: Path) -> tuple[Path, Path]:
    """Where encoder and tokenizer are: in a pipeline's folders, or both in one."""
    if (folder / "text_encoder").is_dir():
        return folder / "text_encoder", folder / "tokenizer"
    return folder, folder


class TextEncoder:
    """A T5 encoder with its tokenizer. Nothing is fetched from a network. Raises ValueError naming the folder where it
    cannot be loaded."""

    def __init__(self, folder: Path, device: torch.device):
        self._tokenizer, self._encoder = _load(folder, device)
        self._device = device

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], length: int, warn: Callable[[int, str], None]) -> tuple[Tensor, Tensor]:
        """The last hidden state [N, L, C] for the texts, lower case and without space at their ends as diffusers'
        PixArt and Latte pipelines take them, and its mask [N, L] bool. Tokens beyond `length` are cut off, and `warn`
        is told the text's number and what is left out."""
        texts = [text.lower().strip() for text in texts]
        with _quietly():
            for number, ids in enumerate(self._tokenizer(texts).input_ids):
                if len(ids) > length:
                    rest = self._tokenizer.decode(ids[length - 1 : -1])  # the last one ends every text
                    warn(number, f"has {len(ids)} tokens, the model reads {length}, left out is: {rest}")
            options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
            tokens = self._tokenizer(texts, **options)
        ids, mask = tokens.input_ids.to(self._device), tokens.attention_mask.to(self._device)
        states = [
            self._encoder(input_ids=ids[i : i + _BATCH], attention_mask=mask[i : i + _BATCH]).last_hidden_state
            for i in range(0, len(texts), _BATCH)
        ]
        return torch.cat(states), mask.bool()


def encode(
    folder: Path, texts: Sequence[str], length: int, device: torch.device, warn: Callable[[int, str], None]
) -> tuple[Tensor, Tensor]:
    """What the TextEncoder in a folder makes of the texts."""
    return TextEncoder(folder, device)(texts, length, warn)


def _load(folder: Path, device: torch.device):
    from transformers import AutoTokenizer, T5EncoderModel

    encoder, tokenizer = _parts(folder)
    try:
        with _quietly():
            words = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
            model, report = T5EncoderModel.from_pretrained(
                encoder, local_files_only=True, use_safetensors=True, dtype="auto", output_loading_info=True
            )
    except Exception as error:  # transformers raises whatever a damaged folder leads to
        raise ValueError(f"--text-encoder: {folder} cannot be loaded: {error}") from error
    wrong = {kind: sorted(map(str, report[kind])) for kind in ("missing_keys", "mismatched_keys") if report.get(kind)}
    if wrong:
        raise ValueError(f"--text-encoder: {encoder} has weights that do not fit its configuration: {wrong}")
    return words, model.to(device).eval()


@contextlib.contextmanager
def _quietly():
    """Without transformers' bars and messages."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# ---- a file ---------------------------------------------------------------------------------------------------------


def read_captions(path: Path, channels: int, length: int) -> Captions:
    """Of a safetensors file with caption [N, L, C], floating point, and if there are any caption_mask [N, L], 1 where
    there is a token, null_caption [L0, C] or [N or 1, L0, C], and null_caption_mask without the C.

    channels: C; length: the most tokens. Raises OSError, or ValueError naming the file and the tensor.
    """
    try:
        with open(path, "rb"):
            pass
        tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"--captions: {path} is not a safetensors file: {error}") from error
    known = ("caption", "caption_mask", "null_caption", "null_caption_mask")
    where = f"--captions: {path}:"
    if unknown := sorted(set(tensors) - set(known)):
        raise ValueError(f"{where} unknown tensors {unknown}, allowed are {list(known)}")
    if "caption" not in tensors:
        raise ValueError(f"{where} there is no tensor caption [N, L, {channels}]")
    caption = tensors["caption"]
    mask = _check(where, "caption", caption, tensors.get("caption_mask"), (len(caption),), channels, length)
    if "null_caption" not in tensors:
        if "null_caption_mask" in tensors:
            raise ValueError(f"{where} null_caption_mask is given without null_caption")
        return Captions(caption, mask)
    null, null_mask = tensors["null_caption"], tensors.get("null_caption_mask")
    if null.dim() == 2:
        null, null_mask = null[None], None if null_mask is None or null_mask.dim() != 1 else null_mask[None]
    null_mask = _check(where, "null_caption", null, null_mask, (1, len(caption)), channels, length)
    return Captions(caption, mask, null, null_mask)


def _check(where: str, name: str, caption: Tensor, mask: Tensor | None, counts, channels: int, length: int) -> Tensor:
    """The mask as bool [N, L]; without one all tokens count."""
    shape = tuple(caption.shape)
    wrong = caption.dim() != 3 or shape[0] not in counts or shape[0] == 0 or shape[2] != channels
    if wrong or not 1 <= shape[1] <= length:
        samples = "N" if name == "caption" else "N or 1"
        raise ValueError(
            f"{where} {name} has shape {shape}, must be [{samples}, L, {channels}] with L from 1 to {length}"
        )
    if not caption.is_floating_point():
        raise ValueError(f"{where} {name} is {caption.dtype}, must be floating point")
    if mask is None:
        return torch.ones(shape[:2], dtype=torch.bool)
    if tuple(mask.shape) != shape[:2]:
        raise ValueError(f"{where} {name}_mask has shape {tuple(mask.shape)}, must be {shape[:2]} as {name}")
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"{where} {name}_mask has values other than 0 and 1")
    if not mask.bool().any(1).all():
        empty = int((~mask.bool().any(1)).nonzero()[0])
        raise ValueError(f"{where} {name}_mask[{empty}] has no token, must have one at least")
    return mask.bool()
