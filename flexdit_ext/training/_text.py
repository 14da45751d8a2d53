"""The text encoder of PixArt-alpha and Latte: transformers' T5, once over a data set's captions."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor


class TextEncoder:
    """Captions to the last hidden states of a T5 encoder, float32.

    folder: of T5EncoderModel.save_pretrained and its tokenizer's, or of a pipeline with text_encoder/ and tokenizer/;
    weights are safetensors, no pickle. max_tokens: longer captions are cut, as PixArt-alpha cuts at 120.
    Raises ValueError naming the folder.
    """

    def __init__(self, folder: str, max_tokens: int, device: torch.device | str):
        from transformers import AutoTokenizer, T5EncoderModel

        parts = [os.path.join(folder, name) for name in ("text_encoder", "tokenizer")]
        weights, words = parts if os.path.isdir(parts[0]) else (folder, folder)
        if not os.path.isdir(weights):
            raise ValueError(f"text_encoder {folder} is not a folder")
        try:
            # Its files only: a name on the Hub would be another model tomorrow.
            self._tokenizer = AutoTokenizer.from_pretrained(words, local_files_only=True)
            model = T5EncoderModel.from_pretrained(weights, local_files_only=True, use_safetensors=True)
        except Exception as error:  # transformers raises whatever a damaged folder leads to
            raise ValueError(f"text_encoder {folder} is not a T5 that transformers can load: {error}") from error
        self._model = model.to(device, torch.float32).eval().requires_grad_(False)
        self.max_tokens, self.channels = max_tokens, model.config.d_model

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[Tensor]:
        """[L, channels] of each text, on the CPU; L counts its own tokens, one for the empty text."""
        texts = [text.lower().strip() for text in texts]  # as PixArt-alpha was trained
        tokens = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self._model.device)
        mask = tokens["attention_mask"].bool()
        states = self._model(tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        return [state[own].cpu() for state, own in zip(states, mask)]


def padded(captions: Sequence[Tensor]) -> dict[str, Tensor]:
    """caption [n, L, D] and caption_mask [n, L] of captions [L_i, D], zeros behind the shorter ones."""
    caption = torch.nn.utils.rnn.pad_sequence(list(captions), batch_first=True)
    counts = torch.tensor([len(one) for one in captions])
    return {"caption": caption, "caption_mask": torch.arange(caption.shape[1]) < counts[:, None]}
