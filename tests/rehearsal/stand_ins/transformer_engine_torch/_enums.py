"""Enumerations of Transformer Engine's C extension, of which its Python checks some against its own."""

from __future__ import annotations

import enum
from importlib.metadata import version

from packaging.version import Version

NEWEST = Version(version("transformer-engine")) >= Version("2.20")
"""Whether this is the newest release that is rehearsed, of which a few names and results differ."""


def _enum(name: str, values: str) -> type[enum.IntEnum]:
    return enum.IntEnum(name, [(value, number) for number, value in enumerate(values.split())])  # type: ignore


_LAYOUTS = (
    "SB3HD SBH3D SBHD_SB2HD SBHD_SBH2D SBHD_SBHD_SBHD BS3HD BSH3D BSHD_BS2HD BSHD_BSH2D BSHD_BSHD_BSHD T3HD TH3D "
    "THD_T2HD THD_TH2D THD_THD_THD SBHD_BSHD_BSHD BSHD_SBHD_SBHD THD_BSHD_BSHD THD_SBHD_SBHD Paged_KV_BSHD_BSHD_BSHD "
    "Paged_KV_BSHD_SBHD_SBHD Paged_KV_SBHD_BSHD_BSHD Paged_KV_SBHD_SBHD_SBHD Paged_KV_THD_BSHD_BSHD "
    "Paged_KV_THD_SBHD_SBHD BHSD_BHSD_BHSD QKV_Layout_NOT_SET"
)
_MASKS = "NO PADDING CAUSAL PADDING_CAUSAL CAUSAL_BOTTOM_RIGHT PADDING_CAUSAL_BOTTOM_RIGHT"
_GEMMS = [f"GEMM{number}_{what}" for number in (1, 2, 3) for what in ("INPUT", "WEIGHT", "OUTPUT")]
_GRADS = [f"GRAD_{what}{number}" for number in (1, 2, 3) for what in ("OUTPUT", "INPUT")]
FP8FwdTensors = _enum("FP8FwdTensors", " ".join(_GEMMS))
FP8BwdTensors = _enum("FP8BwdTensors", " ".join(_GRADS))
NVTE_QKV_Layout = _enum("NVTE_QKV_Layout", " ".join(f"NVTE_{layout}" for layout in _LAYOUTS.split()))
NVTE_Mask_Type = _enum("NVTE_Mask_Type", " ".join(f"NVTE_{mask}_MASK" for mask in _MASKS.split()))
NVTE_Bias_Type = _enum("NVTE_Bias_Type", "NVTE_NO_BIAS NVTE_PRE_SCALE_BIAS NVTE_POST_SCALE_BIAS NVTE_ALIBI")
NVTE_Softmax_Type = _enum("NVTE_Softmax_Type", "NVTE_VANILLA_SOFTMAX NVTE_OFF_BY_ONE_SOFTMAX NVTE_LEARNABLE_SOFTMAX")
NVTE_QKV_Format = _enum(
    "NVTE_QKV_Format",
    "NVTE_BSHD NVTE_SBHD NVTE_THD NVTE_SBHD_2BSHD NVTE_BSHD_2SBHD NVTE_THD_2BSHD NVTE_THD_2SBHD NVTE_BHSD "
    "NVTE_QKV_Format_NOT_SET",
)
_BACKENDS = "NVTE_F16_arbitrary_seqlen NVTE_FP8 NVTE_No_Backend"
NVTE_Fused_Attn_Backend = _enum(
    "NVTE_Fused_Attn_Backend", _BACKENDS if NEWEST else f"NVTE_F16_max512_seqlen {_BACKENDS}"
)
NVTEScalingMode = _enum(
    "NVTEScalingMode",
    "NVTE_DELAYED_TENSOR_SCALING NVTE_MXFP8_1D_SCALING NVTE_BLOCK_SCALING_1D NVTE_BLOCK_SCALING_2D "
    "NVTE_NVFP4_1D_SCALING NVTE_INVALID_SCALING",
)
NVTERoutingMapFormat = _enum("NVTERoutingMapFormat", "BYTEMAP BITMAP_U8")
NVTEQBHistogramMode = _enum("NVTEQBHistogramMode", "TWO_KERNEL FUSED_ATOMIC")
Float8BlockScaleTensorFormat = _enum("Float8BlockScaleTensorFormat", "GEMM_READY COMPACT INVALID")
CommOverlapType = _enum("CommOverlapType", "RS AG")
CommOverlapAlgo = _enum("CommOverlapAlgo", "BULK_OVERLAP_AG BULK_OVERLAP_RS")
