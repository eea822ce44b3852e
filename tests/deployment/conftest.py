"""A model, its ONNX file and its images, made once for all tests of deployment."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

import vmamba
from vmamba.data.transforms import Preprocessing
from vmamba.deployment.export import export
from vmamba.deployment.files import Description


@pytest.fixture(scope="session")
def model():
    """Two blocks of a vmamba_test, whose parameters are off their initial values."""
    torch.manual_seed(0)
    made = vmamba.create_model("vmamba_test", depths=(1, 1)).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return made


@pytest.fixture(scope="session")
def description():
    labels = tuple(f"class {i}" for i in range(10))
    return Description("vmamba_test", labels=labels, preprocessing=Preprocessing(img_size=64).to_dict())


@pytest.fixture(scope="session")
def onnx_report(model, description, tmp_path_factory):
    return export(model, tmp_path_factory.mktemp("onnx") / "model.onnx", description)


@pytest.fixture(scope="session")
def encoded():
    """A PNG of random pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()
