"""A traced model in ONNX, with the scan as functions in operators that onnxruntime has."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import torch
from onnx import ModelProto
from onnx.defs import OpSchema
from onnxscript import opset20 as op
from onnxscript.values import Op, Opset
from torch.export import ExportedProgram

from vmamba.deployment import onnx_scan

ScanKind = tuple[str, int, int, bool]
_INPUTS = ("x", "projected", "dt_weight", "dt_bias", "A", "D", "height", "width")
# Protocol buffers end at 2 GiB; larger weights lie in a file beside the model.
_LARGEST_FILE = 2_000_000_000


def to_onnx(
    program: ExportedProgram, outputs: Sequence[str], metadata: Mapping[str, str], dynamic_size: bool = True
) -> ModelProto:
    """Translate a program of `vmamba.deployment.program.trace`.

    Args:
        program: The traced model.
        outputs: Names for its outputs.
        metadata: Stored in the model.
        dynamic_size: Whether height and width were left open.
    """
    kinds: list[ScanKind] = []
    buffer = io.BytesIO()
    with _quiet():
        translated = torch.onnx.export(
            program,
            (),
            None,
            dynamo=True,
            opset_version=onnx_scan.OPSET,
            input_names=["images"],
            output_names=list(outputs),
            custom_translation_table={torch.ops.vmamba.ss2d_scan.default: _translation(kinds)},
            optimize=True,
            verbose=False,
        )
        assert translated is not None
        onnx.save(translated.model_proto, buffer)
    model = onnx.load_model_from_string(buffer.getvalue())
    _add_functions(model, kinds)
    _name_sizes(model, dynamic_size)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(metadata))
    model.producer_name = "vmamba"
    model.doc_string = ""
    return model


def save_onnx(model: ModelProto, path: Path) -> None:
    """Check a model and write it; weights of more than 2 GB go to a file beside it."""
    large = model.ByteSize() > _LARGEST_FILE
    if not large:
        onnx.checker.check_model(model)
    onnx.save_model(model, str(path), save_as_external_data=large, location=f"{path.name}.data" if large else None)


def _translation(kinds: list[ScanKind]) -> Any:
    """Return the translation of `ss2d_scan`, which notes the kinds of scan it met."""
    domain = Opset(onnx_scan.DOMAIN, 1)

    def ss2d_scan(
        x: Any,
        projected: Any,
        dt_weight: Any,
        dt_bias: Any,
        A: Any,
        D: Any,
        height: Any,
        width: Any,
        routes: str,
        flip_back: bool,
        out_dtype: int,
        backend: str,
    ) -> Any:
        kind = (routes, int(A.shape[2]), int(dt_weight.shape[2]), bool(flip_back))
        if kind not in kinds:
            kinds.append(kind)
        function = Op(domain, onnx_scan.scan_name(*kind), _schema(onnx_scan.scan_name(*kind)))
        sizes = [op.Constant(value_int=size) if isinstance(size, int) else size for size in (height, width)]
        merged = function(x, projected, dt_weight, dt_bias, A, D, *sizes)
        return merged if out_dtype == onnx.TensorProto.FLOAT else op.Cast(merged, to=out_dtype)

    return ss2d_scan


def _schema(name: str) -> OpSchema:
    floats, wholes = "T", "tensor(int64)"
    kinds = [floats] * 6 + [wholes] * 2
    # A letter of its own for each input: under 16-bit weights some stay in 32 bits.
    inputs = [
        OpSchema.FormalParameter(given, f"{kind}{i}" if kind == floats else kind)
        for i, (given, kind) in enumerate(zip(_INPUTS, kinds, strict=True))
    ]
    constraints = [(f"T{i}", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "") for i in range(6)]
    merged = OpSchema.FormalParameter("y", "tensor(float)")
    return OpSchema(name, onnx_scan.DOMAIN, 1, inputs=inputs, outputs=[merged], type_constraints=constraints)


def _add_functions(model: ModelProto, kinds: Sequence[ScanKind]) -> None:
    model.functions.extend(onnx.parser.parse_function(text) for text in onnx_scan.functions(kinds))
    if kinds and not any(entry.domain == onnx_scan.DOMAIN for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(onnx_scan.DOMAIN, 1))


def _name_sizes(model: ModelProto, dynamic_size: bool) -> None:
    """Call the open sizes of the input batch, height and width, and take formulas off those of the outputs."""
    (images,) = model.graph.input
    batch, _, height, width = images.type.tensor_type.shape.dim
    renamed = {batch.dim_param: "batch"}
    if dynamic_size:
        renamed |= {height.dim_param: "height", width.dim_param: "width"}
        height.dim_param, width.dim_param = "height", "width"
    batch.dim_param = "batch"
    for index, output in enumerate(model.graph.output):
        for axis, size in enumerate(output.type.tensor_type.shape.dim):
            if size.HasField("dim_param"):
                size.dim_param = renamed.get(size.dim_param, f"size_{index}_{axis}")
    for value in (*model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    # Shapes of the inside were written in the names that are gone.
    del model.graph.value_info[:]


@contextlib.contextmanager
def _quiet() -> Any:
    """Keep the exporter's progress and its warnings about its own internals off the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
