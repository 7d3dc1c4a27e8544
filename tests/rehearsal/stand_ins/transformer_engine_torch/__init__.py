"""A stand-in for Transformer Engine's C extension: CPU arithmetic behind the signatures that its Python calls.

The order of arguments is that of the `extensions.h` of transformer-engine-torch 2.4 to 2.20. Products are taken in fp32
and rounded once, as a GPU's matrix units do. What has no stand-in raises NotImplementedError with its name when called.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from ._dtypes import DType as DType
from ._gemm import generic_gemm as generic_gemm
from ._gemm import te_general_grouped_gemm as te_general_grouped_gemm
from ._optimizer import multi_tensor_adam as multi_tensor_adam
from ._optimizer import multi_tensor_l2norm as multi_tensor_l2norm
from ._optimizer import multi_tensor_scale as multi_tensor_scale
from ._optimizer import multi_tensor_scale_tensor as multi_tensor_scale_tensor
from ._pointwise import dswiglu as dswiglu
from ._pointwise import rmsnorm_bwd as rmsnorm_bwd
from ._pointwise import rmsnorm_fwd as rmsnorm_fwd
from ._pointwise import swiglu as swiglu
from ._rope import fused_rope_backward as fused_rope_backward
from ._rope import fused_rope_forward as fused_rope_forward
from ._thd import convert_bshd_to_thd as convert_bshd_to_thd
from ._thd import convert_thd_to_bshd as convert_thd_to_bshd
from ._thd import thd_grad_correction as thd_grad_correction
from ._thd import thd_out_correction as thd_out_correction
from ._thd import thd_read_half_tensor as thd_read_half_tensor
from ._thd import thd_read_second_half_lse as thd_read_second_half_lse
from ._thd import thd_second_half_lse_correction as thd_second_half_lse_correction

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


class FP8TensorMeta:
    """The scales of delayed scaling, which Transformer Engine's Python fills in."""

    scale: Any = None
    scale_inv: Any = None
    amax_history: Any = None


class CommOverlapHelper: ...


class CommOverlapCore: ...


class CommOverlap(CommOverlapCore): ...


class CommOverlapP2P(CommOverlapCore): ...


def get_cublasLt_version() -> int:
    return 130000


def get_cudnn_version() -> int:
    return 91900


def get_num_cublas_streams() -> int:
    return 4


_num_cublas_streams = 4


def get_stream_priority_range() -> tuple[int, int]:
    return 0, -5


def device_supports_multicast(device: int = 0) -> bool:
    return False


def get_fused_attn_backend(*args: Any, **settings: Any) -> Any:
    """Offers no cuDNN attention, so that Transformer Engine chooses FlashAttention 2, which has a stand-in."""
    none = NVTE_Fused_Attn_Backend["NVTE_No_Backend"]
    return (none, "the rehearsal has no cuDNN") if NEWEST else none


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **settings: Any) -> Any:
        raise NotImplementedError(f"transformer_engine_torch.{name} has no stand-in in tests/rehearsal/stand_ins")

    return missing
