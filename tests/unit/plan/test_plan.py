"""The contents of a plan, and how they follow the configuration."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.cli import main
from megatron_rl.config import load_config
from megatron_rl.config.passes import passes_of
from megatron_rl.errors import UserError
from megatron_rl.models.flops import body_flops, head_flops
from megatron_rl.plan.assumptions import lengths
from megatron_rl.plan.engines import engine_memory, rollout_seconds
from megatron_rl.plan.memory import host_bytes, node_bytes
from megatron_rl.plan.parameters import model_parameters, rank_parameters
from megatron_rl.plan.plan import Plan
from megatron_rl.plan.search import Choice, layouts, nearest
from megatron_rl.plan.times import step_flops
from tests.unit.plan.conftest import MODELS, Make

Output = pytest.CaptureFixture[str]
GIB = 2**30


def test_parameters_match_the_model_cards(make: Make) -> None:
    """The model cards state 14.8 B and 32.5 B parameters."""
    assert model_parameters(make().setup.model) == pytest.approx(14.8e9, rel=0.005)
    other = make(f"model.path={MODELS / 'Qwen2.5-32B'}", "actor.tensor_parallel=8", "actor.data_parallel=2")
    assert model_parameters(other.setup.model) == pytest.approx(32.5e9, rel=0.01)


def test_state_of_a_rank_matches_a_hand_calculation(make: Make) -> None:
    """14.77 B parameters over 4 tensor ranks: 2 bytes of weights, 4 of gradients, and 12 of state over 4 replicas."""
    (rank,) = make().actor
    each = 14.768e9 / 4
    kept = rank.phases["rollout"]
    assert kept["weights"] == pytest.approx(2 * each, rel=1e-3)
    assert kept["gradients"] == pytest.approx(4 * each, rel=1e-3)
    assert kept["main weights"] + kept["moments"] == pytest.approx(12 * each / 4, rel=1e-3)


def test_a_kernel_of_experts_is_refused_for_a_dense_model(make: Make) -> None:
    with pytest.raises(UserError, match=r"actor\.fusions\.expert_permutation: true needs a model with experts"):
        make("actor.fusions.expert_permutation=true")
    make("actor.fusions.expert_permutation=auto")


def test_a_model_that_the_run_itself_writes_has_no_plan_before(make: Make) -> None:
    with pytest.raises(UserError, match="the run itself writes this small model"):
        make("prepare={task: countdown, folder: task}", "model.path=task/model")


def test_responses_that_the_model_has_no_room_or_token_for_are_refused(make: Make) -> None:
    positions = make().setup.model.max_positions
    with pytest.raises(UserError, match=f"no room for a prompt: the model is made for {positions} positions"):
        make(f"rollout.max_response_tokens={positions}")
    make(f"rollout.max_response_tokens={positions}", f"model.max_positions={2 * positions}")
    with pytest.raises(UserError, match=r"rollout\.stop_token_ids: 999999 is no token id of the model"):
        make("rollout.stop_token_ids=[1, 999999]")


def test_phases_are_never_summed(make: Make) -> None:
    (rank,) = make().actor
    assert rank.peak == max(rank.total(phase) for phase in rank.phases)
    assert {"load", "rollout", "log-probs", "forward and backward", "optimizer", "weight sync", "checkpoint"} <= {
        *rank.phases
    }


@pytest.mark.parametrize(
    ("less", "more"),
    [
        (["actor.tensor_parallel=8", "actor.data_parallel=2"], []),
        ([], ["actor.recompute.granularity=selective"]),
        (["actor.recompute.granularity=selective"], ["actor.recompute.granularity=none"]),
        ([], ["actor.sequence_parallel=false"]),
        ([], ["actor.distributed_optimizer=false"]),
        (["actor.offload_optimizer=true"], []),
        ([], ["actor.lm_head=materialised"]),
        ([], ["actor.micro_batch_tokens=32768"]),
        ([], ["rollout.max_response_tokens=30000"]),
        (["actor.pipeline_parallel=2", "actor.data_parallel=2"], []),
    ],
)
def test_settings_that_save_memory_or_cost_it(make: Make, less: list[str], more: list[str]) -> None:
    def most(overrides: list[str]) -> float:
        return max(sum(rank.phases["forward and backward"].values()) for rank in make(*overrides).actor)

    assert most(less) < most(more)


def test_offloaded_state_and_other_policies_count_as_host_memory(make: Make) -> None:
    plain = make("train.async_save=false", "algorithm.name=grpo")
    assert host_bytes(plain.setup, 0) == 0
    offloaded = make("train.async_save=false", "algorithm.name=grpo", "actor.offload_optimizer=true")
    assert host_bytes(offloaded.setup, 0) == pytest.approx(12 * 14.768e9 / 16, rel=1e-3)
    assert "optimizer state from the host" in offloaded.actor[0].phases["optimizer"]
    lagged = make("algorithm.proxy_source=lagged", "algorithm.lp_reg.kl_estimator=k3")
    assert "other policy's log-probs" in lagged.actor[0].phases


def test_weights_in_shared_memory_count_as_host_memory_of_every_node_with_engines(make: Make) -> None:
    """Colocated engines read a copy on their own node; servers that get broadcasts need none."""
    apart, colocated = make("train.async_save=false"), make("train.async_save=false", "cluster.colocate=true")
    assert node_bytes(apart.setup) == {"its actor ranks": 0.0}
    parts = node_bytes(colocated.setup)
    bucket = colocated.setup.config.weight_sync.bucket_megabytes * 2**20
    assert parts["weights in /dev/shm"] == pytest.approx(2 * 14.768e9 + bucket, rel=1e-3)
    assert colocated.as_json()["node_host"] == parts
    offloaded = make("cluster.colocate=true", "actor.offload_optimizer=true").setup
    here = offloaded.placement.actors.count(0)
    assert here > 1 and node_bytes(offloaded)["its actor ranks"] == pytest.approx(here * host_bytes(offloaded, 0))


def test_a_plan_that_does_not_fit_names_the_nearest_layouts_that_do(make: Make) -> None:
    plan = make("actor.tensor_parallel=2", "actor.data_parallel=8", "actor.recompute.granularity=none")
    (problem,) = plan.problems
    assert "forward and backward" in problem and "H100 SXM 80 GB has 79.1 GiB" in problem
    found = nearest(plan.setup)
    assert found and all(not other.problems for _, other in found)
    here = Choice.of(plan.setup.config)
    distances = [choice.distance(here) for choice, _ in found]
    assert distances == sorted(distances) and distances[0] == 1


def test_an_engine_too_small_for_the_model_or_a_sequence_is_a_problem(make: Make) -> None:
    small = make("cluster.gpu=a100_40", f"model.path={MODELS / 'Qwen2.5-32B'}")
    assert any("rollout.server.tensor_parallel" in problem for problem in small.problems)
    assert not make("rollout.server.urls=[" + ", ".join("http://a" for _ in range(16)) + "]").problems


def test_a_search_is_sorted_and_uses_all_gpus(make: Make) -> None:
    found = layouts(make().setup)
    assert [plan.step_seconds for _, plan in found] == sorted(plan.step_seconds for _, plan in found)
    for choice, plan in found:
        assert not plan.problems
        assert choice.tensor * choice.pipeline * choice.data + choice.engines * choice.engine_tensor == 32
    quickest, plan = found[0]
    assert make(*quickest.overrides).step_seconds == pytest.approx(plan.step_seconds)
    assert plan.step_seconds < make().step_seconds


COLOCATED = ("cluster.colocate=true", "actor.data_parallel=8", "rollout.engines=8", "rollout.server.tensor_parallel=4")


def test_a_colocated_engine_gets_the_memory_that_the_actor_leaves(make: Make) -> None:
    alone, plan = make("rollout.engines=4", "rollout.server.tensor_parallel=4"), make(*COLOCATED)
    assert not plan.problems and plan.engine is not None and alone.engine is not None
    (rank,) = plan.actor
    assert rank.total("rollout") == pytest.approx(0.85 * plan.setup.gpu.memory)  # SGLang's usual share
    kept = sum(rank.phases["rollout"][part] for part in ("weights", "gradients", "main weights", "moments"))
    reserved = sum(rank.reserved.values())
    assert plan.engine.cache == pytest.approx(alone.engine.cache - kept - reserved)
    assert "the engine's weights" in rank.phases["weight sync"]
    for phase in ("load", "log-probs", "forward and backward", "optimizer", "checkpoint"):  # the engine sleeps
        assert not {"the engine's weights", "the engine's cache"} & {*rank.phases[phase]}
    offloaded = make(*COLOCATED, "actor.offload_optimizer=true")
    assert offloaded.engine is not None and offloaded.engine.cache > plan.engine.cache
    assert offloaded.step_seconds < make().step_seconds  # no half of the GPUs waits for the other


def test_the_weight_transport_determines_the_time_of_a_sync(make: Make) -> None:
    """29.5 GB over the network at 9 GB/s; written once and read by every node at 1 GB/s; over PCIe and back."""
    weights = 2 * model_parameters(make().setup.model)
    assert make().seconds["weight sync"] == pytest.approx(weights / 9e9)
    assert make("weight_sync.transport=disk").seconds["weight sync"] == pytest.approx(2 * weights / 1e9)
    alone = make("cluster={nodes: 1, colocate: true}", "actor.data_parallel=2", "rollout.engines=8")
    assert alone.seconds["weight sync"] == pytest.approx(2 * weights / 48e9)
    over_nodes = make("cluster.colocate=true").seconds["weight sync"]
    assert over_nodes == pytest.approx(2 * weights / 48e9 + weights / 9e9), "every node writes and reads its own copy"


def test_mapped_memory_is_held_in_all_phases(make: Make) -> None:
    """Two halves of one bucket each, which the engine's cache cannot use. The engine copies a bucket at a time."""
    colocated = ("rollout.engine=vllm", "cluster={nodes: 1, colocate: true}", "actor.data_parallel=2")
    server = ("rollout.engines=2", "rollout.server.tensor_parallel=4")
    by_files = make(*colocated, *server)
    mapped = make(*colocated, *server, "weight_sync={transport: cuda_ipc, bucket_megabytes: 1024}")
    halves = 2 * GIB
    (rank,), (other,) = mapped.actor, by_files.actor
    for phase in ("rollout", "log-probs", "forward and backward", "optimizer", "checkpoint"):
        assert rank.phases[phase]["memory mapped by engines"] == halves
        assert "memory mapped by engines" not in other.phases[phase]
    assert rank.phases["weight sync"]["the engine's copy of a bucket"] == GIB
    assert mapped.engine is not None and by_files.engine is not None
    assert mapped.engine.cache == pytest.approx(by_files.engine.cache - halves, rel=0.02)
    assert mapped.seconds["weight sync"] < by_files.seconds["weight sync"]


def test_copies_of_the_sent_weights_are_counted(make: Make) -> None:
    """The first rank of a stage and every process of a server keep what was sent last."""
    collective, delta = make(), make("weight_sync.transport=delta")
    weights = 2 * model_parameters(delta.setup.model)
    (before,), (after,) = ([host_bytes(plan.setup, rank.stage) for rank in plan.actor] for plan in (collective, delta))
    assert after - before == weights
    assert any(f"{weights / GIB:.1f} GiB" in remark for remark in delta.remarks)
    assert delta.seconds["weight sync"] == collective.seconds["weight sync"], "the first update sends all"


def test_problems_and_remarks_of_colocated_engines(make: Make) -> None:
    large = make(*COLOCATED, f"model.path={MODELS / 'Qwen2.5-32B'}", "rollout.server.tensor_parallel=1")
    assert any("unset cluster.colocate" in problem for problem in large.problems)
    vllm = make(*COLOCATED, "rollout.engine=vllm")
    (share,) = (float(text.rstrip("]").split()[-1]) for text in vllm.remarks if "gpu-memory-utilization" in text)
    assert 0.2 < share < 0.9
    assert any("16 of 32 GPUs have no engine" in text for text in make(*COLOCATED, "rollout.engines=4").remarks)
    for choice, plan in layouts(make(*COLOCATED).setup):
        actor = choice.tensor * choice.pipeline * choice.data
        assert actor == 32 >= choice.engines * choice.engine_tensor and not plan.problems


def test_remarks_of_a_plan(make: Make) -> None:
    assert any("GPUs are not used" in remark for remark in make("rollout.engines=8").remarks)
    assert any(
        "take turns" in remark for remark in make("rollout.max_response_tokens=16384", mean_response=9000).remarks
    )
    assert any("reach rollout.max_response_tokens" in remark for remark in make(mean_response=7000).remarks)
    assert any("sequences for" in remark for remark in make("train.updates_per_rollout=256").remarks)


def test_training_takes_six_operations_per_parameter_and_token(make: Make) -> None:
    setup = make().setup
    table = setup.model.hidden * setup.model.vocabulary
    weights = model_parameters(setup.model) - table  # the embedding is a table, not a product
    forward = body_flops(setup.model, 1e6, 0) + head_flops(setup.model, 1e6)
    assert forward == pytest.approx(2e6 * weights, rel=1e-3)
    once = step_flops(make("actor.recompute.granularity=none").setup)["forward and backward"]
    attention = 3 * 2 * setup.step_squares * 40 * 40 * 128
    head = 3 * head_flops(setup.model, setup.step_tokens - setup.sequences * 200)
    body = 6 * (weights - table) * setup.step_tokens
    assert once == pytest.approx(attention + head + body, rel=1e-3)


@pytest.mark.parametrize(
    ("overrides", "passes"),
    [
        ([], 0),
        (["train.updates_per_rollout=8"], 1),
        (["algorithm.name=high_entropy"], 1),
        (["algorithm.selection_log_probs=actor"], 1),
        (["algorithm.proxy_source=lagged"], 1),
        (["algorithm.reference_kl.coefficient=0.001"], 1),
        (["algorithm.name=grpo", "algorithm.correction.weights=truncated"], 0),
        (["algorithm.name=grpo", "algorithm.selection_log_probs=actor"], 0),
        (["train.updates_per_rollout=8", "algorithm.reference_kl.coefficient=0.001"], 2),
    ],
)
def test_number_of_forwards_without_gradients(make: Make, overrides: list[str], passes: int) -> None:
    setup = make(*overrides).setup
    assert passes_of(setup.config).forwards == passes
    assert ("log-probs" in step_flops(setup)) == (passes > 0)


def test_more_or_larger_engines_are_faster(make: Make) -> None:
    assert rollout_seconds(make().setup) < rollout_seconds(make("rollout.engines=8").setup)
    assert (
        engine_memory(make("rollout.server.tensor_parallel=2", "rollout.engines=8").setup).tokens
        > engine_memory(make().setup).tokens
    )


def test_the_papers_hardware_gives_its_gpu_hours_within_a_factor_of_two(make: Make) -> None:
    """Published: 8,000 GPU hours for 14B on 32 H20 and 1,000 steps, by code with two or three more forwards."""
    assert 4000 < make("cluster.gpu=h20").gpu_hours < 16000


@given(mean=st.floats(10, 7000), spread=st.floats(0.1, 1.2))
def test_lengths_have_the_requested_mean(mean: float, spread: float) -> None:
    found = lengths(mean, spread, 8192)
    assert found.mean() == pytest.approx(mean, rel=1e-3)
    assert list(found.values) == sorted(found.values) and found.values[-1] <= 8192
    assert found.longer(0) == 1 and found.longer(8192) == 0


def test_stages_together_hold_the_complete_model(make: Make) -> None:
    setup = make("actor.pipeline_parallel=4", "actor.data_parallel=1").setup
    parts = [rank_parameters(setup.model, setup.layout, stage).total for stage in range(4)]
    norms = 40 * (2 * 5120 + 2 * 128) + 5120  # on every tensor rank
    assert 4 * sum(parts) == model_parameters(setup.model) + 3 * norms


# ---------------------------------------------------------------------- the command


def test_the_command_loads_neither_torch_nor_ray(run_file: Path) -> None:
    script = (
        "import sys; from megatron_rl.cli import main; main(['plan', 'run.yaml']);"
        "sys.exit(str({'torch', 'ray', 'megatron', 'transformers', 'numpy'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.strip() == ""
    for words in (
        "placement",
        "forwards without gradient: ",
        "forward and backward",
        "GPU hours",
        "Estimated, not measured",
        "fits",
    ):
        assert words in done.stdout


def test_json_holds_the_plan(run_file: Path, capsys: Output, make: Make) -> None:
    assert main(["plan", "run.yaml", "--json", "--assume", "mean_response=2700"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["fits"] is True and printed["run"]["gpu_hours"] == pytest.approx(make().gpu_hours)
    assert printed["placement"]["actors"] == [0] * 8 + [1] * 8
    assert printed["actor"][0]["phases"]["load"]["weights"] > 0
    assert printed["assumed"]["mean_response"] == 2700


def test_a_search_prints_overrides_that_load(run_file: Path, capsys: Output) -> None:
    assert main(["plan", "run.yaml", "--search"]) == 0
    (first,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("The fastest: "))
    load_config(run_file, first.removeprefix("The fastest: ").split())
    assert main(["plan", "run.yaml", "--search", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["fits"]


def test_a_plan_that_does_not_fit_is_printed(run_file: Path, capsys: Output) -> None:
    assert main(["plan", "run.yaml", "actor.tensor_parallel=1", "actor.sequence_parallel=false"]) == 0
    printed = capsys.readouterr().out
    assert "does not fit" in printed and "Nearest layouts that fit" in printed and "actor.tensor_parallel=" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--assume", "length=3"], "NAME one of"),
        (["--assume", "mean_response=many"], "'many' is not a number"),
        (["--assume", "mean_response=9000"], "mean_response: 9000 is not between 0 and rollout.max_response_tokens"),
        (["model.path=gone"], "gone"),
        (["actor.tensor_parallel=3"], "actor.tensor_parallel is 3"),
        (["actor.data_parallel=64"], "more GPUs than cluster.nodes: 4"),
        (["cluster.gpu=b300"], "cluster.gpu"),
    ],
)
def test_invalid_input_is_an_error(run_file: Path, capsys: Output, arguments: list[str], words: str) -> None:
    assert main(["plan", "run.yaml", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_mean_response_beyond_the_limit_is_refused(make: Make) -> None:
    with pytest.raises(UserError, match="mean_response"):
        make(mean_response=8192)


def test_the_fused_swiglu_saves_two_feed_forward_tensors_per_layer(make: Make) -> None:
    """Qwen3-14B: 40 layers of width 17,408 over 4 ranks, in bf16."""
    keep = "actor.recompute.granularity=none"
    (fused,), (plain,) = make(keep).actor, make(keep, "actor.fusions.swiglu=false").actor
    tokens = make().setup.micro_batch_tokens
    phase = "forward and backward"
    saved = plain.phases[phase]["activations"] - fused.phases[phase]["activations"]
    assert saved == pytest.approx(2 * 2 * tokens * 40 * 17408 / 4, rel=1e-6)


def test_a_checkpoint_gathers_the_embedding_in_fp32(make: Make) -> None:
    """Qwen3-14B: 151,936 x 5,120 numbers, a quarter of which is on each rank."""
    (rank,) = make().actor
    gathered = rank.phases["checkpoint"]["a gathered fp32 tensor"]
    assert gathered == pytest.approx(4 * 151936 * 5120 * 2.25, rel=1e-6)


def test_fp8_keeps_two_copies_of_the_layers_weights(make: Make) -> None:
    (rank,) = make("actor.fp8=blockwise").actor
    layers = 14.768e9 - 2 * 151936 * 5120
    assert rank.phases["rollout"]["weights in FP8"] == pytest.approx(2 * layers / 4, rel=1e-3)
    assert "weights in FP8" not in make().actor[0].phases["rollout"]


def test_torchs_adam_needs_roots_of_the_second_moments(make: Make) -> None:
    from megatron_rl.plan.setup import setup_of

    config = make().setup.config
    without, (rank,) = setup_of(config, transformer_engine=False), make().actor
    phase = Plan(without).actor[0].phases["optimizer"]
    assert phase["roots of the second moments"] == rank.phases["optimizer"]["moments"] / 2
    assert "roots of the second moments" not in rank.phases["optimizer"]


def test_the_check_of_the_export_needs_little_beside_the_state(make: Make) -> None:
    (rank,) = make().actor
    logits = rank.phases["check of the export"]["logits of the checked tokens"]
    assert logits == 256 * 151936 * 8
    assert rank.total("check of the export") < rank.total("forward and backward")
