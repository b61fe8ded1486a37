"""A pipeline of diffusers: the denoiser is the model, everything else goes along untouched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nybble.core.errors import ModelError
from nybble.models.pipeline_parts import INDEX, Parts, read_parts
from nybble.models.sources.folder import FolderSource


class PipelineSource(FolderSource):
    """The denoiser's folder in a pipeline's."""

    def __init__(self, spec: str, parts: Parts) -> None:
        super().__init__(spec, parts.folder / parts.denoiser)
        self.parts = parts

    def side_files(self) -> Mapping[str, Path]:
        """The other parts of the pipeline, and its index."""
        return self.parts.files()


def open_pipeline(spec: str, folder: Path) -> PipelineSource:
    """Open a folder with ``model_index.json``.

    Raises:
        ModelError: a part is missing. FileError: a file is malformed.
    """
    parts = read_parts(folder)
    if not (folder / parts.denoiser / "config.json").is_file():
        raise ModelError(
            f"{spec} has no {parts.denoiser}/config.json, which {INDEX} names: without its denoiser a pipeline has "
            "nothing to quantize."
        )
    return PipelineSource(spec, parts)
