"""Checkpoints from the Hugging Face Hub, where huggingface_hub is installed. Only JSON and safetensors are fetched."""

from __future__ import annotations

import os
import re
from pathlib import Path

_PATTERNS = ["*.json", "*.safetensors"]


def is_hub_id(path: str | os.PathLike) -> bool:
    """Whether a name that is no local path may be "owner/name"."""
    return isinstance(path, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path) is not None


def fetch(repo_id: str, subfolder: str = "", **options) -> Path:
    """The local folder of a repository's snapshot. options: huggingface_hub.snapshot_download's revision, cache_dir,
    token and local_files_only.

    Raises FileNotFoundError saying what the Hub answered, or that huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise FileNotFoundError(
            f"{repo_id} is not there; as the id of a repository on the Hugging Face Hub it needs "
            "`pip install huggingface_hub`"
        ) from None
    patterns = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in _PATTERNS]
    try:
        folder = snapshot_download(repo_id, allow_patterns=patterns, **options)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"{repo_id} is not there, nor can it be had from the Hugging Face Hub: {reason}"
        ) from error
    return Path(folder) / subfolder
