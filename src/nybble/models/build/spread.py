"""A model that is loaded, spread over devices, memory and disk by accelerate, packed weights as bytes that they are."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nybble.core.errors import DeviceError, FileError, UsageError
from nybble.nn.packed import end_offer, offer_offloading

BALANCED = ("auto", "balanced", "balanced_low_0", "sequential")


def spread(
    model: Any,
    device_map: str | Mapping[str, Any],
    max_memory: Mapping[Any, int | str] | None = None,
    offload_folder: str | Path | None = None,
) -> None:
    """Put the parts of a model where they are to run; those on ``disk`` are brought for each call, and let go of.

    Args:
        model: on the CPU.
        device_map: ``auto`` and the like, as transformers', or a device; or name of a module -> device, ``cpu`` or
            ``disk`` (``""`` is all that isn't named).
        max_memory: of each device, for ``auto``: bytes, or ``"2GiB"``; what doesn't fit goes to the next, last to disk.
        offload_folder: what goes to disk goes into a temporary folder in it, which goes with the model; None takes the
            system's place for such.

    Raises:
        UsageError: accelerate is missing, or a map that it can't follow. DeviceError: it names a device that isn't
            there. FileError: the disk can't take it.
    """
    try:
        import accelerate
    except ImportError:
        raise UsageError("device_map needs the package accelerate: pip install accelerate") from None
    offer_offloading(model)
    try:
        places = _places(accelerate, model, device_map, max_memory)
        folder = None
        if "disk" in places.values():
            # A folder of its own: accelerate takes what it finds in an old one for this model's.
            folder = tempfile.mkdtemp(prefix="nybble-", dir=offload_folder)
            weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
        accelerate.dispatch_model(model, places, offload_dir=folder)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"device_map={device_map!r}: {error}") from error
    except OSError as error:
        raise FileError(f"{offload_folder or tempfile.gettempdir()} can't take what goes to disk: {error}") from error
    except (RuntimeError, AssertionError) as error:  # torch's, of a device
        raise DeviceError(f"device_map={device_map!r}: {error}") from error
    finally:
        end_offer(model)


def _places(accelerate: Any, model: Any, device_map: Any, max_memory: Any) -> dict[str, Any]:
    """Name -> device. accelerate takes no "" that goes to disk: what it stands for is named."""
    if not isinstance(device_map, str):
        found = dict(device_map)
    elif device_map in BALANCED:
        found = _balanced(accelerate, model, device_map, max_memory)
    else:
        found = {"": device_map}
    if found.get("") != "disk":
        return found
    del found[""]
    return {name: "disk" for name, _ in model.named_children()} | found


def _balanced(accelerate: Any, model: Any, device_map: str, max_memory: Any) -> dict[str, Any]:
    whole = [str(kind) for kind in getattr(model, "_no_split_modules", None) or ()]
    room = None if max_memory is None else dict(max_memory)
    if device_map != "sequential":
        low = device_map == "balanced_low_0"
        room = accelerate.utils.get_balanced_memory(model, max_memory=room, no_split_module_classes=whole, low_zero=low)
    found: dict[str, Any] = accelerate.infer_auto_device_map(model, max_memory=room, no_split_module_classes=whole)
    return found
