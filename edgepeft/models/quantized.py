"""In what form a folder stores its weights, and which forms cannot be a base for training here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from edgepeft.errors import BadInput
from edgepeft.models.headers import TensorHeader

StoredAs = Literal["fp32", "bf16", "fp16", "bnb-4bit", "bnb-8bit", "fp8", "mxfp4"]

_BY_DTYPE: Mapping[str, StoredAs] = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
_REFUSED: Mapping[str, str] = {
    "gptq": "GPTQ packs its weights for inference kernels and gives no exact weights back to train against",
    "awq": "AWQ scales and packs its weights for inference kernels and gives no exact weights back to train against",
    "compressed-tensors": "compressed-tensors files need a runtime that edgepeft does not have",
    "hqq": "HQQ weights need a runtime that edgepeft does not have",
    "aqlm": "AQLM's codebooks need a runtime that edgepeft does not have",
    "eetq": "EETQ weights need a CUDA-only runtime that edgepeft does not have",
    "bitnet": "ternary BitNet weights are trained in another way",
}
_HINT = "Use the model's original 16-bit folder: edgepeft quantizes it by itself, to int8 or NF4"


def stored_form(config: Mapping[str, Any], tensors: Iterable[TensorHeader], *, where: str) -> StoredAs:
    """How the weights lie in the files.

    Raises:
        BadInput: they are quantized in a way that cannot be trained on, or have an unknown dtype.
    """
    settings = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if isinstance(settings, Mapping):
        return _quantized_form(settings, where)
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size_bytes
    main = max(sizes, key=lambda dtype: sizes[dtype], default="")
    if main not in _BY_DTYPE:
        raise BadInput(
            f"the weights are stored as {main or 'nothing'}, which edgepeft cannot use", where=where, hint=_HINT
        )
    return _BY_DTYPE[main]


def _quantized_form(settings: Mapping[str, Any], where: str) -> StoredAs:
    method = str(settings.get("quant_method") or "").lower()
    four_bit = bool(settings.get("load_in_4bit") or settings.get("_load_in_4bit"))
    if not method and (four_bit or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    if method == "bitsandbytes" and four_bit:
        if settings.get("bnb_4bit_quant_type", "fp4") != "nf4":
            raise BadInput("4-bit weights of the older kind FP4 are not supported; NF4 is", where=where, hint=_HINT)
        return "bnb-4bit"
    if method == "bitsandbytes":
        return "bnb-8bit"
    if method in ("fp8", "finegrained_fp8"):
        return "fp8"
    if method == "mxfp4":
        return "mxfp4"
    reason = _REFUSED.get(method, f"its quantization {method or 'of an unnamed kind'!r} is not supported")
    raise BadInput(f"this model cannot be trained on: {reason}", where=where, hint=_HINT)
