"""Text encoders: captions to the tokens that FlexPixArt's cross-attention reads.

WordEncoder is small and learns with the model; T5Encoder is a frozen one from a folder. Both are called with captions
and return [B, L, channels] float32 and a mask [B, L], true where there is a token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from captions.wording import check_words, split_words
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flexdit_ext._text import TextEncoder

CONFIG_NAME, WEIGHTS_NAME = "text_encoder.json", "text_encoder.safetensors"


class WordEncoder(nn.Module):
    """A transformer over the words of a caption and an end token, which is all that the empty caption has.

    Args:
        words: the vocabulary, in order.
        channels, layers, heads: of the transformer.
        max_tokens: of a caption, the end token among them.
    """

    def __init__(self, words: Sequence[str], channels: int = 64, layers: int = 2, heads: int = 4, max_tokens: int = 12):
        super().__init__()
        self.words, self.channels, self.max_tokens = list(words), channels, max_tokens
        self.settings = {"channels": channels, "layers": layers, "heads": heads, "max_tokens": max_tokens}
        self._end = len(self.words)
        self._index = {word: index for index, word in enumerate(self.words)}
        self.embedding = nn.Embedding(len(self.words) + 1, channels)
        self.position = nn.Parameter(0.02 * torch.randn(max_tokens, channels))
        layer = nn.TransformerEncoderLayer(
            channels, heads, 2 * channels, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, layers, nn.LayerNorm(channels), enable_nested_tensor=False)

    @classmethod
    def for_captions(cls, captions: Sequence[str], **settings) -> WordEncoder:
        """With the words of these captions, in alphabetical order."""
        return cls(sorted({word for caption in captions for word in split_words(caption)}), **settings)

    def tokenize(self, caption: str) -> list[int]:
        """Raises ValueError naming an unknown word and the known ones, or a caption that is too long."""
        check_words(caption, self.words)
        tokens = [*(self._index[word] for word in split_words(caption)), self._end]
        if len(tokens) > self.max_tokens:
            raise ValueError(f"the caption {caption!r} has {len(tokens) - 1} words, at most {self.max_tokens - 1} fit")
        return tokens

    def forward(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """[B, L, channels] and the mask [B, L], L being the longest caption's tokens. Raises as tokenize."""
        tokens = [torch.tensor(self.tokenize(caption)) for caption in captions]
        mask = _mask([len(row) for row in tokens])
        indices = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=self._end)
        embedded = self.embedding(indices) + self.position[: indices.shape[1]]
        return self.transformer(embedded, src_key_padding_mask=~mask), mask

    def save(self, folder: Path) -> None:
        """text_encoder.json and text_encoder.safetensors."""
        _write_config(folder, {"kind": "words", "words": self.words} | self.settings)
        save_file(self.state_dict(), folder / WEIGHTS_NAME)

    @classmethod
    def load(cls, folder: Path, config: dict) -> WordEncoder:
        """Raises ValueError for weights that do not fit the configuration."""
        path = folder / WEIGHTS_NAME
        try:
            encoder = cls(**config)
            encoder.load_state_dict(load_file(path))
        except (TypeError, RuntimeError) as error:  # unknown settings; other names or shapes
            raise ValueError(f"{path} and {CONFIG_NAME} do not belong together: {error}") from error
        return encoder


class T5Encoder:
    """The library's T5 encoder, frozen; a caption is encoded once.

    directory: as for `flexdit sample --text-encoder`. Raises ImportError without transformers, NotADirectoryError, and
    ValueError naming a folder that cannot be loaded.
    """

    def __init__(self, directory: Path, max_tokens: int = 48):
        try:
            import transformers  # noqa: F401
        except ImportError as error:
            raise ImportError("a T5 text encoder needs transformers: pip install 'flexdit_ext[text]'") from error
        if not directory.is_dir():
            raise NotADirectoryError(f"the text encoder {directory} is not a folder")
        self.directory, self.max_tokens = directory, max_tokens
        self._encoder = TextEncoder(directory, torch.device("cpu"))
        self._encoded: dict[str, Tensor] = {}  # caption -> [tokens, channels]
        self.channels: int = self([""])[0].shape[-1]

    def __deepcopy__(self, memo) -> T5Encoder:
        return self  # frozen: the average's and the fork's are the same

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """[B, L, channels] and the mask [B, L]. Raises ValueError for a caption that is too long."""
        if new := [caption for caption in dict.fromkeys(captions) if caption not in self._encoded]:

            def refuse(number: int, text: str) -> None:
                raise ValueError(f"the caption {new[number]!r} {text}")

            output, mask = self._encoder(new, self.max_tokens, refuse)
            for caption, row, kept in zip(new, output.float(), mask, strict=True):
                self._encoded[caption] = row[kept].clone()
        rows = [self._encoded[caption] for caption in captions]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), _mask([len(row) for row in rows])

    def save(self, folder: Path) -> None:
        """text_encoder.json, which names T5's folder; the weights stay there."""
        config = {"kind": "t5", "directory": str(self.directory.resolve()), "max_tokens": self.max_tokens}
        _write_config(folder, config)


def load_encoder(folder: Path) -> WordEncoder | T5Encoder:
    """What save() wrote. Raises ValueError naming a file that is not such a one, OSError for one that is missing."""
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config.pop("kind")
        if kind == "t5":
            return T5Encoder(Path(config["directory"]), config["max_tokens"])
        if kind != "words":
            raise ValueError(f"kind is {kind!r}, must be 'words' or 't5'")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a text encoder's: {error}") from error
    return WordEncoder.load(folder, config)


def _mask(counts: list[int]) -> Tensor:
    """[B, L] bool from tokens per caption."""
    return torch.arange(max(counts)) < torch.tensor(counts)[:, None]


def _write_config(folder: Path, config: dict) -> None:
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
