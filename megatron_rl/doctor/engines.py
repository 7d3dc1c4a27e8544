"""The check of the rollout engines: they start where the run will have them, answer a request, and end."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rl.config import Config
from megatron_rl.doctor.findings import Finding
from megatron_rl.errors import UserError

if TYPE_CHECKING:
    from megatron_rl.cluster.runtime import Nodes

CHECK = "engines"
SHOWN_LINES = 8
"""Lines shown from the log of an engine that failed."""


def check_engines(config: Config, nodes: Nodes, logs: Path) -> Finding:
    """Starts every engine of the run from the model's folder, samples a few tokens with each, and ends them."""
    from megatron_rl.cluster.engines import Engines
    from megatron_rl.models.weights_check import check_weights
    from megatron_rl.run.launch import launch_of
    from megatron_rl.types import Prompt, SamplingParams

    rollout = config.rollout
    if rollout.replay:
        return Finding(CHECK, "skipped", "rollout.replay: the run will have no engines")
    if nodes.placement.shared and not nodes.rank_devices:
        return Finding(CHECK, "skipped", "they share the actor's GPUs, whose ranks did not start")
    if not any(config.model.path.glob("*.safetensors")):
        remedy = "engines start from the model's weights: put them there first"
        return Finding(CHECK, "skipped", f"model.path: {config.model.path} has no weights yet", remedy)
    try:
        check_weights(config.model.path)
        launch = launch_of(config, config.model.path)
    except UserError as error:
        return Finding(CHECK, "failure", str(error), "the model's folder is incomplete")
    # A failed engine is not replaced, as it would be in a run.
    server = rollout.server.model_copy(update={"outage_seconds": 0.1, "request_attempts": 1})
    once, launch = rollout.model_copy(update={"server": server}), replace(launch, server=server)
    prompts = [Prompt(f"doctor:{i}", (i + 1, i + 2, i + 3), "", None) for i in range(rollout.engines)]
    sampling = SamplingParams(n=1, max_tokens=4, temperature=1.0, stop_token_ids=(0,), seed=config.seed)
    engines: Engines | None = None
    started = time.monotonic()
    try:
        engines = Engines(once, launch, logs, nodes, notify=lambda _: None)
        seconds = time.monotonic() - started
        answers = engines.generate(prompts, sampling)
    except Exception as error:  # whatever an engine raises is the finding
        return Finding(CHECK, "failure", f"{str(error).strip()}{_last_lines(logs)}", launch.kind.remedy)
    finally:
        if engines is not None:
            engines.close()
    count = sum(len(response) for group in answers for response in group)
    found = f"{rollout.engines} x {launch.kind.name} started in {seconds:.0f} s, sampled {count} tokens, ended"
    return Finding(CHECK, "ok", found)


def _last_lines(logs: Path) -> str:
    """Last lines of the longest engine log; the logs' folder is removed after the check."""
    texts = [path.read_text(encoding="utf-8", errors="replace").strip() for path in logs.glob("engine-*.log")]
    lines = max(texts, key=len, default="").splitlines()[-SHOWN_LINES:]
    return "".join(f"\n  {line}" for line in lines)
