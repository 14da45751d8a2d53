"""Imports torch where it is installed, before the C++ library: its OpenMP library then serves both, with one pool of
threads."""

from importlib.util import find_spec

HAS_TORCH = find_spec("torch") is not None
if HAS_TORCH:
    import torch  # noqa: F401
