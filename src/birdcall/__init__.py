"""Identify the birds in every five seconds of a field soundscape.

The names below are for use from Python. Each is imported when it is first used, so that
``import birdcall`` and the command line start at once. See docs/api.md.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from birdcall.audio.frontend import LogMel
    from birdcall.audio.reading import read_audio
    from birdcall.experiments import EXPERIMENTS
    from birdcall.models.sed import build_model
    from birdcall.prediction.package import load_package

__version__ = "0.1.0"

__all__ = ["EXPERIMENTS", "LogMel", "build_model", "load_package", "read_audio"]

_MODULES = {
    "EXPERIMENTS": "birdcall.experiments",
    "LogMel": "birdcall.audio.frontend",
    "build_model": "birdcall.models.sed",
    "load_package": "birdcall.prediction.package",
    "read_audio": "birdcall.audio.reading",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'birdcall' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
