"""nybble: low-bit neural networks, any published method on any number format."""
