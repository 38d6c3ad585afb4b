"""The version, which artifacts and records name."""

__version__ = "0.1.0"
