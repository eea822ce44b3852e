"""VMamba (arXiv 2401.10166): the visual state-space backbone.

The public names are imported on first use, so that `import vmamba` and `vmamba --help` stay light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmamba.models.checkpoint import load_checkpoint, load_model, save_checkpoint
    from vmamba.models.config import VMambaConfig, list_models
    from vmamba.models.fused import fuse
    from vmamba.models.registry import create_model
    from vmamba.models.vmamba import VMamba

__version__ = "0.1.0"

_WHERE = {
    "VMamba": "vmamba.models.vmamba",
    "VMambaConfig": "vmamba.models.config",
    "create_model": "vmamba.models.registry",
    "fuse": "vmamba.models.fused",
    "list_models": "vmamba.models.config",
    "load_checkpoint": "vmamba.models.checkpoint",
    "load_model": "vmamba.models.checkpoint",
    "save_checkpoint": "vmamba.models.checkpoint",
}

__all__ = [
    "VMamba",
    "VMambaConfig",
    "__version__",
    "create_model",
    "fuse",
    "list_models",
    "load_checkpoint",
    "load_model",
    "save_checkpoint",
]


if not TYPE_CHECKING:  # to type checkers it would make every name one of the package

    def __getattr__(name: str) -> Any:
        if name not in _WHERE:
            raise AttributeError(f"module 'vmamba' has no attribute {name!r}; it has {', '.join(__all__)}")
        return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
