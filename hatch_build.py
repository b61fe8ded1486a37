"""Builds the compiled CPU kernels where a C++ compiler is; without one the wheel is pure Python and says so."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path(__file__).parent / "src" / "nybble" / "kernels"


class Kernels(BuildHookInterface):
    """``src/nybble/kernels/_native/*.cpp`` -> a library beside it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; a wheel with the library in it is of this platform, for any Python 3."""
        spec = importlib.util.spec_from_file_location("_library", FOLDER / "_library.py")
        assert spec is not None and spec.loader is not None
        library = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(library)
        try:
            made = library.build(library.SOURCE)
        except OSError as error:
            self.app.display_warning(f"The CPU kernels are not compiled ({error}); nybble runs without them, slower.")
            return
        if version == "standard":
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data |= {"pure_python": False, "tag": f"py3-none-{platform}"}
            build_data["artifacts"].append(str(made.relative_to(self.root)))
