"""FlashAttention's C extension, of which Transformer Engine only asks whether it can be imported."""


def varlen_bwd(*args: object) -> None:
    raise NotImplementedError("flash_attn_2_cuda.varlen_bwd has no stand-in")
