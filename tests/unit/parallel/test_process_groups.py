from __future__ import annotations

import torch

from megatron_rl.parallel import process_groups


def test_cpu_ranks_use_gloo_and_gpu_ranks_use_nccl() -> None:
    assert process_groups.backend(torch.device("cpu")) == "gloo"
    assert process_groups.backend(torch.device("cuda", 1)) == "nccl"
