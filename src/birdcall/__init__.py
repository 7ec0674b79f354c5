"""Name the birds in every five seconds of a field soundscape."""

__version__ = "0.1.0"
