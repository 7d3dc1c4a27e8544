"""Settings that contradict each other are refused by name."""

from __future__ import annotations

import pytest

from megatron_rl.errors import UserError

EVALUATION = ("evaluation={every: 5, suites: {a: a.jsonl}}",)


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["rollout.samples_per_prompt=1"], ["rollout.samples_per_prompt", "algorithm.advantage"]),
        (["algorithm.preset=paper", "algorithm.proxy_source=lagged", "algorithm.lp_reg.min_p=0"],
         ["algorithm.lp_reg.min_p: 0", "algorithm.proxy_source: lagged", "k3"]),
        (["train.updates_per_rollout=3"], ["rollout.prompts_per_step: 4", "3 equal mini-batches"]),
        (["train={steps: 10, updates_per_rollout: 8, epochs_per_rollout: 3}"],
         ["train.updates_per_rollout: 8", "train.epochs_per_rollout: 3"]),
        (["train.updates_per_rollout=4", "actor.data_parallel=4"], ["actor.data_parallel: 4", "2 rows of an update"]),
        (["algorithm.lp_reg={min_p: 0.1, fixed_tau: 0.1}"], ["algorithm.lp_reg.min_p", "algorithm.lp_reg.fixed_tau"]),
        (["algorithm.lp_reg={select_by: random, selection_scope: micro_batch_negatives}"],
         ["algorithm.lp_reg.selection_scope must be 'batch'", "select_by='random'"]),
        (["algorithm.preset=reference", "algorithm.lp_reg.advantage_sign=both"], ["algorithm.lp_reg.selection_scope"]),
        (["algorithm.name=clip_higher", "algorithm.clip_higher.constant_length=9"],
         ["algorithm.clip_higher.constant_length must be given with"]),
        (["algorithm.name=grpo", "algorithm.grpo.aggregation=constant_length"],
         ["algorithm.grpo.constant_length must be given with"]),
        (["algorithm.preset=papers"],
         ["override algorithm.preset=papers: algorithm.preset: 'papers'", "paper, reference"]),
        (["algorithm.settings={beta: 1.0}"], ["algorithm.settings", "algorithm.lp_reg"]),
        (["rollout.dynamic_sampling=true", "rollout.samples_per_prompt=1", "algorithm.advantage=reinforce_plus_plus"],
         ["rollout.dynamic_sampling"]),
        (["algorithm.overlong.buffer_tokens=9"], ["algorithm.overlong.buffer_tokens: 9", "max_response_tokens: 8"]),
        (["algorithm.advantage=maxrl", "algorithm.overlong.buffer_tokens=4"],
         ["algorithm.advantage: maxrl takes no negative rewards", "algorithm.overlong.buffer_tokens: 4"]),
        (["algorithm.advantage=maxrl", "reward.format={tags: [<a>, </a>]}"],
         ["algorithm.advantage: maxrl takes no negative rewards", "leave reward.format out"]),
        (["algorithm.correction={weights: masked, low: 2.0}"], ["algorithm.correction.low: 2.0", "high: 2.0"]),
        (["algorithm.correction={reject_sequences: true, sequence_low: 1.5}"],
         ["algorithm.correction.sequence_low: 1.5", "algorithm.correction.sequence_high: 1.01"]),
        (["actor.device=cpu", "actor.context_parallel=2"], ["actor.context_parallel: 2 is not for a CPU"]),
        (["actor={device: cpu, dtype: bfloat16, fp8: blockwise}"], ["actor.fp8: blockwise is not for a CPU"]),
        (["actor={device: cpu, expert_gemm: grouped}"], ["actor.expert_gemm: grouped is not for a CPU"]),
        (["actor={device: cpu, dtype: bfloat16, fusions: {rope: true}}"], ["actor.fusions.rope: true needs"]),
        (["actor={device: cpu, dtype: bfloat16, fusions: {swiglu: true}}"], ["actor.fusions.swiglu: true needs CUDA"]),
        (["actor={device: cuda, fusions: {expert_permutation: true}}"], ["expert_permutation: true needs a model"]),
        (["actor={device: cpu, dtype: bfloat16, attention_backend: flash}"],
         ["actor.attention_backend: flash", "they need CUDA, bfloat16"]),
        (["actor={device: cuda, attention_backend: fused}"], ["actor.attention_backend: fused", "auto or local"]),
        (["actor.device=cuda", "actor.fp8=tensorwise"], ["actor.fp8: tensorwise is a form of bfloat16"]),
        (
            ["actor={device: cuda, dtype: bfloat16, context_parallel: 2, rows: padded}"],
            ["actor.context_parallel: 2 needs packed rows, not padded; set actor.rows to packed"],
        ),
        (["actor={device: cuda, context_parallel: 2}"], ["actor.context_parallel: 2 needs actor.dtype: bfloat16"]),
        (["actor.virtual_pipeline=2", "actor.rows=padded"], ["actor.virtual_pipeline: 2 needs packed rows"]),
        (
            ["actor={device: cuda, dtype: bfloat16, context_parallel: 2, rows: prefix_tree}"],
            ["actor.context_parallel: 2 needs packed rows, not prefix_tree"],
        ),
        (["actor.data_parallel=9"], ["actor.data_parallel: 9", "8 rows", "rollout.prompts_per_step"]),
        (
            ["rollout.engine=sglang", "actor.device=cuda", "cluster.colocate=true", "weight_sync.transport=collective"],
            ["weight_sync.transport: collective is not for cluster.colocate"],
        ),
        (
            ["rollout.engine=vllm", "actor.device=cuda", "cluster.colocate=true", "weight_sync.transport=delta"],
            ["weight_sync.transport: delta is not for cluster.colocate"],
        ),
        (["weight_sync.transport=delta"], ["weight_sync.transport: delta is for rollout.engine: sglang or vllm"]),
        (["actor.device=cpu", "rollout.engine=vllm", "cluster.colocate=true", "weight_sync.transport=cuda_ipc"],
         ["weight_sync.transport: cuda_ipc is memory of GPUs", "actor.device is cpu"]),
        (["actor.device=cuda", "rollout.engine=vllm", "weight_sync.transport=cuda_ipc"],
         ["weight_sync.transport: cuda_ipc is for engines on the actor's GPUs", "set collective"]),
        (["actor.device=cuda", "rollout.engine=vllm", "weight_sync.transport=cuda_ipc",
          "cluster={nodes: 2, colocate: true}"], ["weight_sync.transport: cuda_ipc reaches one node only"]),
        (["cluster.nodes=2", "weight_sync.transport=shared_memory"],
         ["weight_sync.transport: shared_memory reaches several nodes only if every engine is on a node of the actor"]),
        (["actor.device=cuda", "weight_sync.transport=cuda_ipc", "cluster.colocate=true"],
         ["weight_sync.transport: cuda_ipc is for rollout.engine: sglang or vllm"]),
        (["rollout.asynchronous=true"], ["rollout.asynchronous", "rollout.max_staleness: 0"]),
        (["rollout.max_staleness=1", "rollout.over_sampling=2.5", "algorithm.correction.weights=masked"],
         ["rollout.over_sampling: 2.5", "rollout.max_staleness: 1", "at most 2"]),
        (["rollout.max_staleness=1", "rollout.over_sampling=1.5", "rollout.asynchronous=true",
          "algorithm.correction.weights=masked"],
         ["rollout.over_sampling: 1.5", "asynchronous", "at most 1"]),
        (["rollout.max_staleness=1"], ["algorithm.correction.weights: none", "rollout.max_staleness: 1"]),
        (["rollout.max_staleness=1", "rollout.asynchronous=true", "algorithm.correction.weights=masked",
          "cluster.colocate=true"], ["rollout.asynchronous", "cluster.colocate"]),
        (["rollout.engine=vllm", "rollout.server.arguments=[--quantization, fp8]"],
         ["algorithm.correction.weights: none", "--quantization"]),
        (["rollout.engines=5"], ["rollout.engines: 5", "rollout.prompts_per_step: 4"]),
        (["rollout.agent={function: solve}"], ["rollout.agent.function", "package.module:function"]),
        (["reward.name=agent"], ["reward.name: agent", "rollout.agent"]),
        (["rollout.engine=vllm", "rollout.server.router=round_robin"], ["rollout.server.router", "vllm"]),
        (["rollout.server.router=round_robin"], ["rollout.server", "not by transformers"]),
        (["cluster.colocate=true", "rollout.engine=sglang", "rollout.server.urls=[http://a]"],
         ["cluster.colocate", "rollout.server.urls"]),
        (["reward.name=countdwn"], ["reward.name: 'countdwn'", "did you mean countdown?"]),
        (["reward.name='my module:f'"], ["reward.name: 'my module:f'", "package.module:function"]),
        (["actor.optimizer={schedule: cosine, warmup_steps: 10}"],
         ["actor.optimizer.warmup_steps: 10", "train.steps: 10"]),
        (["evaluation.probes={p: {after: a, token: b}}"], ["evaluation.probes", "evaluation.suites"]),
        (["train={steps: 10, save_every: 5, keep_best: {metric: eval/a/avg@8}}", "evaluation.every=5"],
         ["train.keep_best.metric: 'eval/a/avg@8'", "evaluation.suites: none"]),
        (["train={steps: 10, save_every: 5, keep_best: {metric: eval/macro_mean/avg}}", *EVALUATION],
         ["eval/macro_mean/avg is the mean over several suites", "has 1"]),
        (["train={steps: 10, save_every: 5, keep_best: {metric: reward/mean}}", *EVALUATION],
         ["train.keep_best.metric: 'reward/mean'", "evaluation.suites: a"]),
        (["train={steps: 10, save_every: 3, keep_best: {metric: eval/a/avg@8}}", *EVALUATION],
         ["train.save_every (3)", "evaluation.every (5)"]),
        (["train={steps: 10, keep_best: {metric: eval/a/avg@8}}", *EVALUATION], ["train.save_every (0)"]),
    ],
)  # fmt: skip
def test_contradictions_are_refused(load, overrides, keys):
    with pytest.raises(UserError) as caught:
        load(*overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert [key for key in keys if key not in message] == []


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.name=grpo", "algorithm.proxy_source=lagged", "algorithm.preset=paper"],
        ["algorithm.preset=paper", "algorithm.proxy_source=lagged", "algorithm.lp_reg={kl_estimator: k3, min_p: 0}"],
        ["algorithm.preset=paper", "algorithm.proxy_source=lagged"],
        ["algorithm.preset=paper", "train.updates_per_rollout=2"],
        ["algorithm.lp_reg.kl_estimator=full"],
        ["train={steps: 10, save_every: 5, keep_best: {metric: eval/a/avg@8}}", *EVALUATION],
        ["train={steps: 40, save_every: 10, keep_best: {metric: eval/a/entropy, mode: min}}", *EVALUATION],
        [
            "train={steps: 10, save_every: 5, keep_best: {metric: eval/macro_mean/avg}}",
            *EVALUATION,
            "evaluation.suites.b=b.jsonl",
        ],
        ["train={steps: 10, updates_per_rollout: 8, epochs_per_rollout: 2}", "actor.data_parallel=2"],
        ["reward.name=my_package.rewards:score"],
        ["actor.data_parallel=8"],
        ["rollout.samples_per_prompt=1", "algorithm.advantage=reinforce_plus_plus"],
        ["algorithm.name=clip_higher"],
        ["algorithm.advantage=maxrl"],
        ["algorithm.advantage=maxrl", "algorithm.overlong={buffer_tokens: 4, penalty: 0}"],
        ["actor={device: cuda, dtype: bfloat16, attention_backend: flash, fusions: {rope: true, swiglu: true}}"],
        ["actor={device: cuda, fusions: {swiglu: true}}"],
        ["actor={device: cpu, attention_backend: local, fusions: {rope: false}}"],
        ["algorithm.correction={weights: truncated, low: 2.0, sequence_low: 1.5}"],
        ["algorithm.name=grpo", "algorithm.grpo={aggregation: constant_length, constant_length: 512}"],
        ["algorithm.preset=reference", "algorithm.lp_reg={select_by: entropy, selection_scope: batch}"],
    ],
)
def test_consistent_settings_are_accepted(load, overrides):
    load(*overrides)


def test_contradictions_are_listed_together(load):
    with pytest.raises(UserError) as caught:
        load("rollout.samples_per_prompt=1", "actor.device=cpu", "actor.context_parallel=2")
    assert len(str(caught.value).splitlines()) == 2
