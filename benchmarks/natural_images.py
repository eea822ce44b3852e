"""Compare the logits of every form of a model with those of float32 eager on photographs.

    python benchmarks/natural_images.py --images FOLDER          # JPEG or PNG files, such as scikit-image's
    python benchmarks/natural_images.py --images FOLDER --weights model.safetensors

Prints for each form the relative error over all images, the largest of one image, and in how many the first class is
the same; for those where it is not, how far apart the two classes were in float32, as a share of the logits' spread.
Without weights the model is random with perturbed norms, and its head is fitted to tell the pictures from one another:
the first two of a thousand random logits can be as near to each other as one rounding. `--head random` keeps it so.
"""

import argparse
import copy
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

import vmamba

CROPS = 3  # of every picture
RIDGE = 0.3  # of the mean square length of the features: without it the head would live on their smallest differences


def photographs(folder: Path) -> Tensor:
    """Return (n, 3, 224, 224): the middle and two opposite corners of every picture, the shorter side 256 pixels."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not paths:
        raise SystemExit(f"no .jpg or .png files in {folder}")
    prepare = v2.Compose([
        v2.ToImage(), v2.Resize(256, antialias=True), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
    crops = []
    for path in paths:
        image = prepare(Image.open(path).convert("RGB"))
        crops += [v2.functional.center_crop(image, [224, 224]), image[:, :224, :224], image[:, -224:, -224:]]
    return torch.stack(crops)


def random_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = vmamba.create_model(name).eval()
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if "norm" in parameter_name or p.ndim == 1:
                p.add_(0.2 * torch.randn_like(p))
    return model


def fit_head(model: nn.Module, images: Tensor) -> None:
    """Make a class of every picture, whose crops lie together, by ridge regression on the pooled features (float64)."""
    pictures = torch.arange(len(images) // CROPS, device=images.device).repeat_interleave(CROPS)
    wanted = nn.functional.one_hot(pictures).double()
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images), pre_logits=True).double()
        middle, offset = features.mean(0), wanted.mean(0)
        kernel = (features - middle) @ (features - middle).T
        ridge = RIDGE * kernel.trace() / len(kernel) * torch.eye(len(kernel)).to(kernel)
        weight = (features - middle).T @ torch.linalg.solve(kernel + ridge, wanted - offset)
        model.reset_classifier(weight.shape[1])
        model.to(images.device).classifier.head.weight.copy_(weight.T)
        model.classifier.head.bias.copy_(offset - middle @ weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--model", default="vmamba_tiny")
    parser.add_argument("--weights", type=Path, help="a trained model's file, instead of --model")
    parser.add_argument("--head", choices=("fitted", "random"), default="fitted", help="of a model without weights")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = photographs(arguments.images).to(device)
    model = (vmamba.load_model(arguments.weights)[0] if arguments.weights else random_model(arguments.model)).to(device)
    if arguments.head == "fitted" and not arguments.weights:
        fit_head(model, images)
    low = torch.bfloat16
    forms = {"float32, compiled": (torch.compile(model), torch.float32)}
    if device.type == "cuda":
        narrow = copy.deepcopy(model).to(low)
        fused = vmamba.fuse(model, low)
        forms |= {
            "bfloat16": (narrow, low),
            "bfloat16, compiled": (torch.compile(narrow), low),
            "bfloat16, fused": (fused, low),
            "bfloat16, fused, compiled": (torch.compile(fused), low),
        }
    else:
        forms["float32, fused"] = (vmamba.fuse(model), torch.float32)
    with torch.no_grad():
        expected = model(images)
        first = expected.argmax(1)
        whose = arguments.weights or f"{arguments.model}, {arguments.head} head"
        print(f"{whose}, {len(images)} crops, {device.type}, torch {torch.__version__}")
        for name, (form, dtype) in forms.items():
            logits = form(images.to(dtype)).float()
            error = (logits - expected).norm() / expected.norm()
            worst = ((logits - expected).norm(dim=1) / expected.norm(dim=1)).max()
            other = logits.argmax(1)
            gaps = (expected.amax(1) - expected.gather(1, other[:, None])[:, 0])[other != first] / expected.std()
            same = int((other == first).sum())
            print(f"{name:28} {error:.2e}, worst {worst:.2e}; first class equal in {same}/{len(images)}", end="")
            print("; gaps " + " ".join(f"{gap:.1e}" for gap in gaps.tolist()) if len(gaps) else "")


if __name__ == "__main__":
    main()
