"""Settings of all tests. torch is imported only if a test needs it, so that tests without it start quickly."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# torch and its child processes read these when they are first imported, so they are set before any test module is.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A test that tries to use the network fails.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

# A slow example on a busy machine is no failure. In CI, the same commit always tries the same examples.
for _profile, _examples in (("quick", 25), ("nightly", 150)):
    settings.register_profile(
        _profile,
        max_examples=_examples,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        derandomize="CI" in os.environ,
        print_blob=_profile == "nightly",
    )
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

FIRST = (
    "e2e_cpu/test_quickstart.py",
    "invariance/test_methods_layouts.py",
    "e2e_cpu/test_resume.py",
    "invariance/test_actor_layouts.py",
    "e2e_cpu/test_agents.py",
    "e2e_cpu/test_staleness.py",
    "e2e_cpu/test_demonstration.py",
    "e2e_cpu/test_processes.py",
    "e2e_cpu/test_experts.py",
    "e2e_cpu/test_ray_by_hand.py",
    "e2e_cpu/test_failing_reward.py",
    "e2e_cpu/test_python.py",
    "invariance/test_conversion_layouts.py",
    "unit/doctor/test_doctor_command.py",
    "unit/docker/test_resolution.py",
    "unit/plan/test_plan.py",
    "unit/plan/test_memory_of_actor.py",
    "unit/reward/test_pool.py",
    "unit/reward/test_grading_corpus.py",
    "invariance/test_megatron_matches_hf.py",
    "unit/lpreg/test_trl_trainer.py",
)
"""Files that take longest, longest first, so that no core is idle at the end while another works on one of them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first, and skips tests marked `gpu` if there is no CUDA device."""
    here = Path(__file__).parent
    place = {here / name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(FIRST)))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
