"""The one place that states the version; CMake and setup.py read it."""

__version__ = "0.1.0"
