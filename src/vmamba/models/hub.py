"""Models on the Hugging Face Hub: `push_to_hub`, `save_pretrained`, `from_pretrained`, and the card beside them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, hf_hub_download
from huggingface_hub.errors import HFValidationError
from typing_extensions import Self

if TYPE_CHECKING:
    from torch import nn

    from vmamba.models.config import VMambaConfig

WEIGHTS = "model.safetensors"
_CONFIG = "config.json"

_CARD = """---
{{ card_data }}
---

# {{ name }}

{{ summary }}

```python
import vmamba

model = vmamba.VMamba.from_pretrained("{{ repo_id }}").eval()
```

`timm.create_model("hf-hub:{{ repo_id }}", pretrained=True)` opens it too, after `import vmamba.models`.

| | |
|---|---|
| architecture | {{ architecture }} |
| parameters | {{ parameters }} |
| classes | {{ classes }} |
| image size | {{ img_size }} |
| normalisation | mean {{ mean }}, std {{ std }} |
| accuracy | {{ accuracy }} |

{{ labels }}

VMamba is a visual state-space model: [arXiv 2401.10166](https://arxiv.org/abs/2401.10166).
"""


class HubMixin(ModelHubMixin):
    """What a VMamba needs to live on the Hub.

    A repository or folder holds `model.safetensors`, with the configuration and the metadata in its header;
    `config.json` as timm writes it, so that timm finds the model by its address; and the card, `README.md`.

    Attributes:
        metadata: What `save_pretrained` stores beside the weights: labels, mean, std, img_size, …
    """

    config: VMambaConfig
    metadata: dict[str, Any]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **overrides: Any,
    ) -> Self:
        """Open a model from the Hub or a folder that `save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: "owner/name", or a folder.
            revision: Branch, tag or commit.
            cache_dir: Where downloads are kept.
            force_download: Download again what is there already.
            local_files_only: Do not ask the network.
            token: For private repositories.
            **overrides: Fields of VMambaConfig; with another `num_classes` the head starts afresh.

        Returns:
            The model, in evaluation mode.

        Raises:
            CheckpointError: The weights cannot be read or do not fit.
        """
        from vmamba.models.checkpoint import CheckpointError, infer_config, load_checkpoint, read_checkpoint

        name = os.fspath(pretrained_model_name_or_path)
        file = os.path.join(name, WEIGHTS)
        if not os.path.isdir(name):
            try:
                file = hf_hub_download(
                    name,
                    WEIGHTS,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            except HFValidationError:
                raise CheckpointError(f"there is no folder '{name}', nor can a repository be called so") from None
        checkpoint = read_checkpoint(file)
        config = (checkpoint.config or infer_config(checkpoint.state_dict)).replace(**overrides)
        model = cls(config)
        load_checkpoint(cast("nn.Module", model), checkpoint, adapt_classifier="num_classes" in overrides)
        model.metadata = dict(checkpoint.metadata)
        return model.eval()  # type: ignore[attr-defined]

    def _save_pretrained(self, save_directory: Path) -> None:
        from vmamba.models.checkpoint import save_checkpoint

        save_checkpoint(self, save_directory / WEIGHTS, metadata=self._metadata())  # type: ignore[arg-type]
        (save_directory / _CONFIG).write_text(json.dumps(self._timm_config(), indent=2) + "\n", encoding="utf-8")

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Write the card from what the model knows of itself; keywords replace entries of the template."""
        metadata, config = self._metadata(), self.config
        labels = metadata.get("labels") or ()
        top1 = metadata.get("top1", metadata.get("accuracy"))
        count = sum(parameter.numel() for parameter in self.parameters())  # type: ignore[attr-defined]
        task = "image-classification" if config.num_classes else "image-feature-extraction"
        entries = {
            "name": self._architecture(),
            "repo_id": "OWNER/NAME",
            "summary": f"A {self._architecture()} for {config.num_classes} classes."
            if config.num_classes
            else f"The backbone of a {self._architecture()}, without a classifier.",
            "architecture": f"`{self._architecture()}`: depths {config.depths}, widths {config.stage_dims}",
            "parameters": f"{count:,}",
            "classes": config.num_classes or "none",
            "img_size": metadata.get("img_size", config.img_size),
            "mean": metadata.get("mean", "as ImageNet's"),
            "std": metadata.get("std", "as ImageNet's"),
            "accuracy": f"{top1:.2%}" if isinstance(top1, float) else "not stated",
            "labels": f"Classes: {', '.join(map(str, labels[:50]))}{', …' if len(labels) > 50 else ''}."
            if labels
            else "",
        }
        data = ModelCardData(
            library_name="vmamba", pipeline_tag=task, tags=["vmamba", "timm", "image-classification", "pytorch"]
        )
        return ModelCard.from_template(data, template_str=_CARD, **{**entries, **kwargs})

    def _metadata(self) -> dict[str, Any]:
        return dict(getattr(self, "metadata", {}))

    def _architecture(self) -> str:
        from vmamba.models.config import variant_name

        return variant_name(self.config) or "vmamba"

    def _timm_config(self) -> dict[str, Any]:
        """Return what timm reads: the registered name, the arguments it does not imply, and the preprocessing."""
        from vmamba.models.config import get_config, variant_name

        metadata, name = self._metadata(), variant_name(self.config)
        size = metadata.get("img_size", self.config.img_size)
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        pretrained = {
            "tag": "hub",
            "custom_load": False,
            "input_size": [self.config.in_chans, height, width],
            "fixed_input_size": False,
            "num_classes": self.config.num_classes,
            "first_conv": "patch_embed.0",
            "classifier": "classifier.head",
        }
        for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode"):
            if metadata.get(key) is not None:
                pretrained[key] = metadata[key]
        if metadata.get("labels"):
            pretrained["label_names"] = list(metadata["labels"])
        base = get_config(name).to_dict() if name else {}
        differing = {k: v for k, v in self.config.to_dict().items() if base.get(k) != v and k != "num_classes"}
        return {
            "architecture": name or "vmamba_tiny",
            "num_classes": self.config.num_classes,
            "num_features": self.config.stage_dims[-1],
            "global_pool": self.config.global_pool,
            "model_args": differing,
            "pretrained_cfg": pretrained,
            "vmamba": self.config.to_dict(),
        }
