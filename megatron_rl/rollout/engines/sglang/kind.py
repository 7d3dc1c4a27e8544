"""SGLang, as the rest of the program knows it."""

from __future__ import annotations

from megatron_rl.rollout.engines.kind import FOLDERS, ServerKind

KIND = ServerKind(
    name="sglang",
    command="megatron_rl.rollout.engines.sglang.server:command",
    server="megatron_rl.rollout.engines.sglang.server:SglangServer",
    package="sglang",
    releases=">=0.5.23,<0.6",
    router=True,
    transports=(*FOLDERS, "collective", "delta", "cuda_ipc"),
    memory_share=0.85,
    remedy="is SGLang in rollout.server.python, and do rollout.server.arguments suit the GPU and the model?",
    processed_log_probs="start SGLang without SGLANG_RETURN_ORIGINAL_LOGPROB",
)
