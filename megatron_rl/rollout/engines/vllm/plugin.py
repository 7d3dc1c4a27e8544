"""Registers our weight transport with vLLM. Each process of vLLM loads this by the entry point `vllm.general_plugins`.

A server uses the transport if it is started with
    --weight-transfer-config '{"backend": "megatron_rl"}'
    --worker-extension-cls megatron_rl.rollout.engines.vllm.receiver.Extension
"""

from __future__ import annotations

BACKEND = "megatron_rl"
EXTENSION = "megatron_rl.rollout.engines.vllm.receiver.Extension"


def register() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory as factory

    if BACKEND not in factory._registry:
        factory.register_engine(BACKEND, "megatron_rl.rollout.engines.vllm.receiver", "Receiver")
