"""The version, which every certificate names."""

__version__ = "0.1.0"
