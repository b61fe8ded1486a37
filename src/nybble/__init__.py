"""nybble: low-bit neural networks, any published method on any number format."""

__version__ = "0.1.0"
