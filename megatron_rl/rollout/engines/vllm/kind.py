"""vLLM, as the rest of the program knows it."""

from __future__ import annotations

from megatron_rl.rollout.engines.kind import FOLDERS, ServerKind

KIND = ServerKind(
    name="vllm",
    command="megatron_rl.rollout.engines.vllm.server:command",
    server="megatron_rl.rollout.engines.vllm.server:VllmServer",
    package="vllm",
    releases=">=0.32,<0.33",
    transports=(*FOLDERS, "collective", "delta", "cuda_ipc"),
    keeps_requests=True,
    memory_share=0.9,
    memory_option="--gpu-memory-utilization",
    remedy="is vLLM in rollout.server.python, and do rollout.server.arguments suit the GPU and the model?",
    processed_log_probs="start vLLM with --logprobs-mode processed_logprobs",
)
