"""VMamba: stem, four stages of VSS blocks with downsampling in between, head (figure 3 of the paper).

Maps are channels-last, (B, H, W, D), inside; images and returned features are (B, C, H, W).
"""

import dataclasses
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vmamba.models.config import VMambaConfig
from vmamba.models.hub import HubMixin
from vmamba.models.initialization import WITHOUT_DECAY
from vmamba.models.layers import DropPath, LayerNorm, Mlp, have_hooks, make_downsample, make_norm, make_stem
from vmamba.models.ss2d import SS2D
from vmamba.models.training_gpu import Parts, run_blocks


class VSSBlock(nn.Module):
    """x + drop_path(ss2d(norm(x))), then x + drop_path(mlp(norm2(x))); either branch may be absent."""

    def __init__(self, dim: int, config: VMambaConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        self.post_norm = config.post_norm
        self.drop_path = DropPath(drop_path)
        self.norm = self.op = self.norm2 = self.mlp = None
        if config.ssm_ratio > 0:
            self.norm = make_norm(config.norm_layer, dim)
            self.op = SS2D(
                dim,
                d_state=config.d_state,
                ssm_ratio=config.ssm_ratio,
                dt_rank=config.dt_rank,
                act=config.ssm_act,
                d_conv=config.d_conv,
                conv_bias=config.conv_bias,
                gated=config.gated,
                gate_act=config.gate_act,
                out_norm=config.out_norm,
                out_act=config.out_act,
                routes=config.routes,
                sequential_routes=config.sequential_routes,
                force_fp32=config.force_fp32,
                dropout=config.ssm_drop_rate,
                ssm_init=config.ssm_init,
                dt_init=config.dt_init,
                dt_min=config.dt_min,
                dt_max=config.dt_max,
                backend=config.backend,
            )
        if config.mlp_ratio > 0:
            self.norm2 = make_norm(config.norm_layer, dim)
            hidden = int(dim * config.mlp_ratio)
            if hidden < 1:
                raise ValueError(
                    f"mlp_ratio {config.mlp_ratio} of {dim} channels leaves none for the MLP; raise one of them"
                )
            self.mlp = Mlp(dim, hidden, config.mlp_act, config.mlp_drop_rate, gated=config.gated_mlp)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, D) to (B, H, W, D)."""
        if not self.post_norm and (y := run_blocks(x, [self.parts()])) is not None:
            return y
        if self.op is not None and self.norm is not None:
            x = self._branch(self.op, self.norm, x)
        if self.mlp is not None and self.norm2 is not None:
            x = self._branch(self.mlp, self.norm2, x)
        return x

    def parts(self) -> Parts:
        """Return what the block consists of."""
        return Parts(self.op, self.norm, self.mlp, self.norm2, self.drop_path)

    def _branch(self, op: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
        if self.post_norm:
            return x + self.drop_path(norm(op(x)))
        if isinstance(norm, LayerNorm) and not have_hooks((norm,)):
            x, normed = norm.with_skip(x)
        else:
            normed = norm(x)
        return x + self.drop_path(op(normed))


class Blocks(nn.Sequential):
    """The blocks of a stage; under gradient checkpointing their insides are computed again in the backward pass."""

    grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, D) to (B, H, W, D)."""
        if not self.grad_checkpointing and (y := self._run_at_once(x)) is not None:
            return y
        for block in self:
            recompute = self.grad_checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x

    def _run_at_once(self, x: Tensor) -> Tensor | None:
        parts = [b.parts() for b in self if type(b) is VSSBlock and not (b.post_norm or have_hooks((b,)))]
        return run_blocks(x, parts) if 0 < len(parts) == len(self) else None


class Stage(nn.Module):
    """Blocks at one resolution, and the downsampling to the next."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = Blocks(*blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, D) to the next stage's input."""
        return self.downsample(self.blocks(x))


class Head(nn.Module):
    """Norm, global average pool, linear layer."""

    def __init__(self, dim: int, config: VMambaConfig) -> None:
        super().__init__()
        self.norm = make_norm(config.norm_layer, dim)
        self.drop = nn.Dropout(config.drop_rate)
        self.head = nn.Linear(dim, config.num_classes) if config.num_classes else nn.Identity()


class VMamba(nn.Module, HubMixin):
    """The VMamba backbone and classifier.

    Args:
        config: what to build; see VMambaConfig.
        **overrides: fields of the configuration to change.

    The state dict has the layout of the published checkpoints.
    """

    output_fmt = "NCHW"

    def __init__(self, config: VMambaConfig | None = None, **overrides: Any) -> None:
        super().__init__()
        config = (config or VMambaConfig()).replace(**overrides)
        self.config = config
        dims, depths = config.stage_dims, config.depths
        self.num_classes, self.in_chans, self.drop_rate = config.num_classes, config.in_chans, config.drop_rate
        self.global_pool = config.global_pool
        self.num_features = self.head_hidden_size = dims[-1]
        self.grad_checkpointing = False
        self.prefer_ema = True  # which of a published file's weights `load_pretrained` takes

        self.patch_embed = make_stem(
            config.stem, config.in_chans, dims[0], config.patch_size, config.norm_layer, config.patch_norm
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, dims[0], *self._grid(config))) if config.pos_embed else None

        rates = torch.linspace(0, config.drop_path_rate, sum(depths), device="cpu").tolist()
        self.layers = nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            first = sum(depths[:i])
            blocks = [VSSBlock(dim, config, rate) for rate in rates[first : first + depth]]
            last = i == len(depths) - 1
            down = nn.Identity() if last else make_downsample(config.downsample, dim, dims[i + 1], config.norm_layer)
            self.layers.append(Stage(blocks, down))
        self.classifier = Head(dims[-1], config)

        strides = [config.patch_size * (1 if config.downsample == "none" else 2**i) for i in range(len(dims))]
        self.feature_info = [
            {"num_chs": dim, "reduction": stride, "module": f"layers.{i}.blocks"}
            for i, (dim, stride) in enumerate(zip(dims, strides, strict=True))
        ]
        if config.residual_in_fp32:
            for start in (self.patch_embed, *(stage.downsample for stage in self.stages())):
                for norm in (module for module in start.modules() if isinstance(module, LayerNorm)):
                    norm.keep_float32 = True
        self.apply(_init_linear)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @staticmethod
    def _grid(config: VMambaConfig) -> tuple[int, int]:
        size = config.img_size
        height, width = (size, size) if isinstance(size, int) else size
        return height // config.patch_size, width // config.patch_size

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to the normalised last map (B, C, H/32, W/32)."""
        x = self._stem(x)
        for stage in self.layers:
            x = stage(x)
        return self._final_norm(x).permute(0, 3, 1, 2)

    def _final_norm(self, x: Tensor) -> Tensor:
        """Normalise the last map (B, h, w, C)."""
        return self.classifier.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map `forward_features`'s (B, C, h, w) to logits; to the pooled features (B, C) with `pre_logits`."""
        if self.global_pool == "avg":
            x = self.classifier.drop(x.mean(dim=(2, 3)))
        return x if pre_logits else self.classifier.head(x)

    def _stem(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"images must be (B, {self.in_chans}, H, W); got shape {tuple(x.shape)}")
        # Channels-last storage; asked for as a memory format it is unknown to torch.func.vmap.
        x = self.patch_embed(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))
        if self.pos_embed is not None:
            position: Tensor = self.pos_embed
            if position.shape[2:] != x.shape[1:3]:
                position = F.interpolate(position, size=x.shape[1:3], mode="bicubic", align_corners=False)
            x = x + position.permute(0, 2, 3, 1).to(x.dtype)
        return x

    @overload
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = ...,
        norm: bool = ...,
        stop_early: bool = ...,
        output_fmt: str = ...,
        intermediates_only: Literal[False] = ...,
    ) -> tuple[Tensor, list[Tensor]]: ...

    @overload
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = ...,
        norm: bool = ...,
        stop_early: bool = ...,
        output_fmt: str = ...,
        *,
        intermediates_only: Literal[True],
    ) -> list[Tensor]: ...

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the maps of some stages, as timm defines it.

        Args:
            x: images (B, in_chans, H, W).
            indices: stages wanted, negative ones from the end; an integer n means the last n; None means all.
            norm: pass the last stage's map through the final norm.
            stop_early: do not compute the stages after the last one wanted.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return the maps alone.

        Returns:
            The maps, each before its downsampling, and unless `intermediates_only` the last map before them.

        Raises:
            ValueError: an index or the format is not one of those.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC'; got {output_fmt!r}")
        wanted = self._stage_indices(indices)
        last = len(self.layers) - 1
        maps = list(self._stage_maps(x, up_to=max(wanted) if stop_early else last))
        final = self._final_norm(maps[last]) if len(maps) > last else maps[-1]
        chosen = [final if norm and i == last else maps[i] for i in wanted]
        intermediates = [y.permute(0, 3, 1, 2) if output_fmt == "NCHW" else y for y in chosen]
        return intermediates if intermediates_only else (final.permute(0, 3, 1, 2), intermediates)

    def _stage_maps(self, x: Tensor, up_to: int) -> Iterator[Tensor]:
        """Yield the map (B, H, W, D) of each stage up to a last one, before its downsampling."""
        x = self._stem(x)
        for i, stage in enumerate(self.stages()[: up_to + 1]):
            x = stage.blocks(x)
            yield x
            if i < up_to:
                x = stage.downsample(x)

    def stages(self) -> list[Stage]:
        """Return the stages, first to last."""
        return [stage for stage in self.layers if isinstance(stage, Stage)]

    def _stage_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        n = len(self.layers)
        if indices is None:
            return list(range(n))
        wrong = ValueError(f"indices must name stages -{n} to {n - 1} (or be a count from 1 to {n}); got {indices!r}")
        try:
            given = [operator.index(i) for i in (indices if isinstance(indices, Iterable) else (indices,))]
        except TypeError:
            raise wrong from None
        if not isinstance(indices, Iterable):
            given = list(range(n - given[0], n)) if 1 <= given[0] <= n else []
        if not given or any(not -n <= i < n for i in given):
            raise wrong
        return [i % n for i in given]

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last one wanted, and if asked the final norm and the head, as timm defines it.

        The final norm belongs to the last stage, and goes with it; so does the downsampling to a stage that is dropped.
        """
        wanted = self._stage_indices(indices)
        if max(wanted) + 1 < len(self.layers):
            prune_norm = True
            self.layers = self.layers[: max(wanted) + 1]
            self.stages()[-1].downsample = nn.Identity()
            self.num_features = self.head_hidden_size = self.config.stage_dims[max(wanted)]
        if prune_norm:
            self.classifier.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.classifier.head

    def reset_classifier(self, num_classes: int, global_pool: Literal["avg", ""] | None = None) -> None:
        """Replace the head by a fresh one; 0 classes leaves it out, `global_pool=""` the pooling too."""
        pool = self.global_pool if global_pool is None else global_pool
        self.config = self.config.replace(num_classes=num_classes, global_pool=pool)
        self.num_classes, self.global_pool = self.config.num_classes, pool
        like = next(self.parameters())
        head = nn.Linear(self.num_features, self.num_classes) if self.num_classes else nn.Identity()
        head.apply(_init_linear)
        self.classifier.head = head.to(device=like.device, dtype=like.dtype).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its insides."""
        self.grad_checkpointing = enable
        for stage in self.stages():
            stage.blocks.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that weight decay should spare: time scales, skip weights, position embedding.

        The published training decayed `A_logs` and `dt_projs_bias` all the same: its optimiser read only names.
        """
        # By name: marks on the tensors are lost in copies, and where `load_state_dict(assign=True)` replaces them.
        spared = {name for name, _ in self.named_parameters() if set(name.split(".")) & set(WITHOUT_DECAY)}
        return spared | ({"pos_embed"} if self.pos_embed is not None else set())

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns by which timm groups layers for layer-wise learning-rate decay."""
        stages = r"^layers\.(\d+)"
        blocks = [(r"^layers\.(\d+)\.downsample", (99998,)), (r"^layers\.(\d+)\.blocks\.(\d+)", None)]
        return {
            "stem": r"^patch_embed|^pos_embed",
            "blocks": stages if coarse else [*blocks, (r"^classifier\.norm", (99999,))],
        }

    def load_pretrained(self, checkpoint_path: str, prefix: str = "") -> None:
        """Load published or own weights from a file; timm calls this for `pretrained=True`.

        With another number of classes the head starts afresh; with another number of input channels the first
        convolution's weights are adapted as timm does it.
        """
        from timm.models import adapt_input_conv

        from vmamba.models.checkpoint import load_checkpoint, read_checkpoint

        checkpoint = read_checkpoint(checkpoint_path, prefer_ema=self.prefer_ema)
        first = "patch_embed.0.weight"
        weights = dict(checkpoint.state_dict)
        if first in weights and weights[first].shape[1] == 3 != self.in_chans:
            weights[first] = adapt_input_conv(self.in_chans, weights[first])
            checkpoint = dataclasses.replace(checkpoint, state_dict=weights)
        load_checkpoint(self, checkpoint, adapt_classifier=True)


class VMambaBackbone(VMamba):
    """Four stage maps with a norm on each, as the published detection and segmentation models take them.

    Args:
        config: what to build.
        out_indices: stages to return.
        **overrides: fields of the configuration to change.
    """

    def __init__(
        self, config: VMambaConfig | None = None, out_indices: Sequence[int] = (0, 1, 2, 3), **overrides: Any
    ) -> None:
        super().__init__(config, **overrides)
        self.out_indices = tuple(self._stage_indices(list(out_indices)))
        for i in self.out_indices:
            self.add_module(f"outnorm{i}", make_norm(self.config.norm_layer, self.config.stage_dims[i]))
        del self.classifier  # its norm and head have no part here, and no weights in the published files

    def _final_norm(self, x: Tensor) -> Tensor:
        last = len(self.layers) - 1
        return getattr(self, f"outnorm{last}")(x) if last in self.out_indices else x

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        """Map images (B, in_chans, H, W) to the maps (B, C_i, H/2^(i+2), W/2^(i+2)) of `out_indices`."""
        return [
            getattr(self, f"outnorm{i}")(y).permute(0, 3, 1, 2)
            for i, y in enumerate(self._stage_maps(x, up_to=max(self.out_indices)))
            if i in self.out_indices
        ]


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
