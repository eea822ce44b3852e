"""VMamba's models. Importing this registers their names with timm."""

from vmamba.models.config import VMambaConfig, get_config, list_models, variant_name
from vmamba.models.registry import create_model
from vmamba.models.ss2d import SS2D
from vmamba.models.vmamba import VMamba, VMambaBackbone, VSSBlock

__all__ = [
    "SS2D",
    "VMamba",
    "VMambaBackbone",
    "VMambaConfig",
    "VSSBlock",
    "create_model",
    "get_config",
    "list_models",
    "variant_name",
]
