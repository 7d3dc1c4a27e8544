"""A stand-in for Transformer Engine's C extension: CPU arithmetic behind the signatures that its Python calls.

The order of arguments is that of the `extensions.h` of transformer-engine-torch 2.4 to 2.20. Products are taken in fp32
and rounded once, as a GPU's matrix units do. What has no stand-in raises NotImplementedError with its name when called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._dtypes import DType as DType
from ._enums import NEWEST as NEWEST
from ._enums import CommOverlapAlgo as CommOverlapAlgo
from ._enums import CommOverlapType as CommOverlapType
from ._enums import Float8BlockScaleTensorFormat as Float8BlockScaleTensorFormat
from ._enums import FP8BwdTensors as FP8BwdTensors
from ._enums import FP8FwdTensors as FP8FwdTensors
from ._enums import NVTE_Bias_Type as NVTE_Bias_Type
from ._enums import NVTE_Fused_Attn_Backend as NVTE_Fused_Attn_Backend
from ._enums import NVTE_Mask_Type as NVTE_Mask_Type
from ._enums import NVTE_QKV_Format as NVTE_QKV_Format
from ._enums import NVTE_QKV_Layout as NVTE_QKV_Layout
from ._enums import NVTE_Softmax_Type as NVTE_Softmax_Type
from ._enums import NVTEQBHistogramMode as NVTEQBHistogramMode
from ._enums import NVTERoutingMapFormat as NVTERoutingMapFormat
from ._enums import NVTEScalingMode as NVTEScalingMode
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
