"""Keys of other trainers, and the key with the same meaning here, for the messages about unknown keys.

The names are those of verl's ppo_trainer.yaml (dotted), TRL's GRPOConfig, and the command lines of slime, Megatron and
OpenRLHF, without their dashes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_VERL = {
    "actor_rollout_ref.model.path": "model.path",
    "actor_rollout_ref.actor.optim.lr": "actor.optimizer.lr",
    "actor_rollout_ref.actor.optim.weight_decay": "actor.optimizer.weight_decay",
    "actor_rollout_ref.actor.optim.betas": "actor.optimizer.betas",
    "actor_rollout_ref.actor.optim.clip_grad": "actor.optimizer.clip_grad",
    "actor_rollout_ref.actor.optim.lr_warmup_steps": "actor.optimizer.warmup_steps",
    "actor_rollout_ref.actor.optim.lr_decay_style": "actor.optimizer.schedule",
    "actor_rollout_ref.actor.grad_clip": "actor.optimizer.clip_grad",
    "actor_rollout_ref.actor.ppo_mini_batch_size": "train.updates_per_rollout",
    "actor_rollout_ref.actor.ppo_epochs": "train.epochs_per_rollout",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": "actor.micro_batch_tokens",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": "actor.micro_batch_tokens",
    "actor_rollout_ref.actor.policy_loss.loss_mode": "algorithm.name",
    "actor_rollout_ref.actor.kl_loss_coef": "algorithm.reference_kl.coefficient",
    "actor_rollout_ref.actor.kl_loss_type": "algorithm.reference_kl.estimator",
    "actor_rollout_ref.actor.use_kl_loss": "algorithm.reference_kl.coefficient",
    "actor_rollout_ref.actor.entropy_coeff": "algorithm.entropy_bonus.coefficient",
    "actor_rollout_ref.actor.clip_ratio": "algorithm.grpo.clip_low",
    "actor_rollout_ref.actor.clip_ratio_low": "algorithm.clip_higher.clip_low",
    "actor_rollout_ref.actor.clip_ratio_high": "algorithm.clip_higher.clip_high",
    "actor_rollout_ref.actor.megatron.tensor_model_parallel_size": "actor.tensor_parallel",
    "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size": "actor.pipeline_parallel",
    "actor_rollout_ref.actor.megatron.virtual_pipeline_model_parallel_size": "actor.virtual_pipeline",
    "actor_rollout_ref.actor.megatron.context_parallel_size": "actor.context_parallel",
    "actor_rollout_ref.actor.megatron.expert_model_parallel_size": "actor.expert_parallel",
    "actor_rollout_ref.actor.megatron.sequence_parallel": "actor.sequence_parallel",
    "actor_rollout_ref.actor.megatron.optimizer_offload": "actor.offload_optimizer",
    "actor_rollout_ref.rollout.name": "rollout.engine",
    "actor_rollout_ref.rollout.n": "rollout.samples_per_prompt",
    "actor_rollout_ref.rollout.temperature": "rollout.temperature",
    "actor_rollout_ref.rollout.response_length": "rollout.max_response_tokens",
    "actor_rollout_ref.rollout.prompt_length": "data.max_prompt_tokens",
    "actor_rollout_ref.rollout.tensor_model_parallel_size": "rollout.server.tensor_parallel",
    "actor_rollout_ref.rollout.val_kwargs.n": "evaluation.samples_per_prompt",
    "actor_rollout_ref.rollout.val_kwargs.temperature": "evaluation.temperature",
    "data.train_files": "data.train",
    "data.val_files": "evaluation.suites",
    "data.train_batch_size": "rollout.prompts_per_step",
    "data.max_prompt_length": "data.max_prompt_tokens",
    "data.max_response_length": "rollout.max_response_tokens",
    "data.truncation": "data.long_prompts",
    "data.filter_overlong_prompts": "data.long_prompts",
    "algorithm.adv_estimator": "algorithm.advantage",
    "algorithm.kl_ctrl.kl_coef": "algorithm.reference_kl.coefficient",
    "algorithm.filter_groups.enable": "rollout.dynamic_sampling",
    "trainer.total_training_steps": "train.steps",
    "trainer.save_freq": "train.save_every",
    "trainer.test_freq": "evaluation.every",
    "trainer.nnodes": "cluster.nodes",
    "trainer.n_gpus_per_node": "cluster.gpus_per_node",
    "trainer.experiment_name": "run.name",
    "trainer.project_name": "observability.wandb.project",
    "trainer.default_local_dir": "run.folder",
    "trainer.resume_mode": "resume",
    "custom_reward_function.path": "reward.name",
    "reward_model.reward_manager": "reward.name",
}

_TRL = {
    "num_generations": "rollout.samples_per_prompt",
    "num_generations_eval": "evaluation.samples_per_prompt",
    "max_completion_length": "rollout.max_response_tokens",
    "generation_batch_size": "rollout.prompts_per_step",
    "steps_per_generation": "train.updates_per_rollout",
    "num_iterations": "train.epochs_per_rollout",
    "per_device_train_batch_size": "actor.micro_batch_tokens",
    "learning_rate": "actor.optimizer.lr",
    "lr_scheduler_type": "actor.optimizer.schedule",
    "max_grad_norm": "actor.optimizer.clip_grad",
    "max_steps": "train.steps",
    "eval_steps": "evaluation.every",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_checkpoints",
    "output_dir": "run.folder",
    "run_name": "run.name",
    "resume_from_checkpoint": "resume",
    "loss_type": "algorithm.name",
    "beta": "algorithm.reference_kl.coefficient",
    "epsilon": "algorithm.grpo.clip_low",
    "epsilon_high": "algorithm.clip_higher.clip_high",
    "importance_sampling_level": "algorithm.name",
    "top_entropy_quantile": "algorithm.high_entropy.share",
    "scale_rewards": "algorithm.advantage",
    "shuffle_dataset": "data.shuffle",
    "use_vllm": "rollout.engine",
    "vllm_server_base_url": "rollout.server.urls",
    "vllm_tensor_parallel_size": "rollout.server.tensor_parallel",
    "vllm_importance_sampling_correction": "algorithm.correction.weights",
    "bf16": "actor.dtype",
    "gradient_checkpointing": "actor.recompute.granularity",
}

_SLIME = {
    "hf_checkpoint": "model.path",
    "prompt_data": "data.train",
    "label_key": "data.label_field",
    "apply_chat_template": "data.template",
    "rollout_shuffle": "data.shuffle",
    "rollout_max_prompt_len": "data.max_prompt_tokens",
    "num_rollout": "train.steps",
    "rollout_batch_size": "rollout.prompts_per_step",
    "n_samples_per_prompt": "rollout.samples_per_prompt",
    "rollout_max_response_len": "rollout.max_response_tokens",
    "rollout_temperature": "rollout.temperature",
    "rollout_stop_token_ids": "rollout.stop_token_ids",
    "rollout_num_gpus_per_engine": "rollout.server.tensor_parallel",
    "rollout_external_engine_addrs": "rollout.server.urls",
    "over_sampling_batch_size": "rollout.over_sampling",
    "partial_rollout": "rollout.max_staleness",
    "dynamic_sampling_filter_path": "rollout.group_filter",
    "num_steps_per_rollout": "train.updates_per_rollout",
    "max_tokens_per_gpu": "actor.micro_batch_tokens",
    "advantage_estimator": "algorithm.advantage",
    "kl_loss_coef": "algorithm.reference_kl.coefficient",
    "kl_loss_type": "algorithm.reference_kl.estimator",
    "entropy_coef": "algorithm.entropy_bonus.coefficient",
    "eps_clip": "algorithm.grpo.clip_low",
    "eps_clip_high": "algorithm.clip_higher.clip_high",
    "use_tis": "algorithm.correction.weights",
    "tis_clip": "algorithm.correction.high",
    "tis_clip_low": "algorithm.correction.low",
    "rm_type": "reward.name",
    "custom_rm_path": "reward.name",
    "rm_url": "reward.remote.url",
    "eval_interval": "evaluation.every",
    "eval_prompt_data": "evaluation.suites",
    "n_samples_per_eval_prompt": "evaluation.samples_per_prompt",
    "eval_temperature": "evaluation.temperature",
    "eval_max_response_len": "evaluation.max_response_tokens",
    "save": "run.folder",
    "save_interval": "train.save_every",
    "load": "resume",
    "colocate": "cluster.colocate",
    "actor_num_nodes": "cluster.nodes",
    "num_gpus_per_node": "cluster.gpus_per_node",
    "wandb_project": "observability.wandb.project",
    # Megatron's own
    "tensor_model_parallel_size": "actor.tensor_parallel",
    "pipeline_model_parallel_size": "actor.pipeline_parallel",
    "context_parallel_size": "actor.context_parallel",
    "expert_model_parallel_size": "actor.expert_parallel",
    "clip_grad": "actor.optimizer.clip_grad",
}

_OPENRLHF = {
    "pretrain": "model.path",
    "input_template": "data.template",
    "prompt_max_len": "data.max_prompt_tokens",
    "generate_max_len": "rollout.max_response_tokens",
    "max_epochs": "train.epochs_per_rollout",
    "actor_learning_rate": "actor.optimizer.lr",
    "max_norm": "actor.optimizer.clip_grad",
    "l2": "actor.optimizer.weight_decay",
    "adam_betas": "actor.optimizer.betas",
    "adam_offload": "actor.offload_optimizer",
    "init_kl_coef": "algorithm.reference_kl.coefficient",
    "kl_estimator": "algorithm.reference_kl.estimator",
    "entropy_loss_coef": "algorithm.entropy_bonus.coefficient",
    "policy_loss_type": "algorithm.name",
    "overlong_buffer_len": "algorithm.overlong.buffer_tokens",
    "overlong_penalty_factor": "algorithm.overlong.penalty",
    "enable_vllm_is_correction": "algorithm.correction.weights",
    "vllm_is_truncated_threshold": "algorithm.correction.high",
    "vllm_num_engines": "rollout.engines",
    "vllm_tensor_parallel_size": "rollout.server.tensor_parallel",
    "dynamic_filtering": "rollout.dynamic_sampling",
    "async_train": "rollout.asynchronous",
    "remote_rm_url": "reward.remote.url",
    "eval_dataset": "evaluation.suites",
    "eval_n_samples_per_prompt": "evaluation.samples_per_prompt",
    "save_path": "run.folder",
    "max_ckpt_num": "train.keep_checkpoints",
    "colocate_all_models": "cluster.colocate",
}

PEERS = {"verl": _VERL, "TRL": _TRL, "slime": _SLIME, "OpenRLHF": _OPENRLHF}
"""Trainer -> its key -> ours."""


def translation(key: tuple[str, ...]) -> tuple[str, str] | None:
    """Returns our key and the trainers that have the given one; None if none of them has it.

    A key of verl is known by its path or the end of it, any other by its last name, wherever it was put.
    """
    dotted, name = ".".join(key), key[-1].lstrip("-").replace("-", "_")
    found = {peer: ours for peer, keys in PEERS.items() if peer != "verl" and (ours := keys.get(name))}
    for path, ours in _VERL.items():
        if path == dotted or (len(key) > 1 and path.endswith(f".{dotted}")):
            found.setdefault("verl", ours)
    if not found:
        return None
    ours = next(iter(found.values()))
    return ours, " and ".join(peer for peer, other in found.items() if other == ours)


def translations(tree: Any, key: tuple[str, ...]) -> Iterator[str]:
    """Yields a sentence for every known key of a peer in a tree whose root is at `key`."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from translations(value, (*key, str(name)))
    elif (found := translation(key)) is not None:
        yield f"{'.'.join(key)} of {found[1]} is {found[0]} here"
