"""GGUF, both ways: block types as QTensors (``types/``), and models as files (``write.py`` and what it needs)."""
