"""TRL's GRPOTrainer with any policy loss of lpreg.

    from lpreg.integrations.trl import GRPOTrainer
    GRPOTrainer(model, reward_funcs, args, train_dataset, loss="lp_reg").train()

TRL generates, computes rewards and advantages, and steps; lpreg computes the loss, its selection and its denominator.
Tokens are ranked over a whole generation, and a loss is a mean over all micro-batches of an update, on all ranks.

Legend: B rows of a micro-batch, C response positions (padded), T response tokens that carry loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import trl
from torch import Tensor, nn

from lpreg import Mean, PolicyLoss, ProxyStore, make_loss
from lpreg.advantages import Estimator
from lpreg.integrations._trl_advantages import advantages_of
from lpreg.integrations._trl_batch import Batch, loss_inputs, loss_mask, proxy_rows, select, set_denominator
from lpreg.integrations._trl_checks import check_config, check_trainer, check_version
from lpreg.integrations._trl_entropy import EntropyCoefficient
from lpreg.integrations.causal_lm import add_token_stats, plain_head, spread

check_version()


class GRPOTrainer(trl.GRPOTrainer):
    """TRL's trainer, with `loss` in place of TRL's own loss.

    TRL's features stay: gradient accumulation, several updates per generation (steps_per_generation, num_iterations),
    data-parallel ranks, mixed precision, PEFT, tools, masked truncated responses, and vLLM's importance ratios, which
    multiply the advantages. The LM head is fused with the statistics, so the logits never exist as a whole, unless the
    head is more than a matrix or its weights are sharded (FSDP, DeepSpeed).

    If the method ranks tokens, or updates are off-policy, one forward scores each generation before its first update.
    The method's metrics are logged under `lpreg/`, over the whole update.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: trl.GRPOConfig | None = None,
        *others: Any,
        loss: PolicyLoss | str,
        advantage: str | Estimator | None = None,
        proxy_refresh_steps: int = 25,
        **named: Any,
    ) -> None:
        """The arguments of trl.GRPOTrainer, and:

        loss: the result of `make_loss`, or a method's name for its defaults.
        advantage: an estimator of `lpreg.group_advantages`, such as "maxrl", from the weighted sum of the rewards; None
            leaves the advantages to TRL.
        proxy_refresh_steps: optimizer steps between snapshots of the trained weights, for a loss with
            proxy_source="lagged". Snapshots are not in TRL's checkpoints: a resumed run starts with a new one.

        Raises:
            ValueError: an unknown method, a setting of TRL's own loss, a batch layout or model that is not supported.
        """
        self.policy_loss = make_loss(loss) if isinstance(loss, str) else loss
        if args is not None:
            check_config(args, own_advantages=advantage is not None)
        super().__init__(model, reward_funcs, args, *others, **named)
        updates = self.args.steps_per_generation // self.args.gradient_accumulation_steps * self.num_iterations
        self._off_policy = updates > 1
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        check_trainer(self, self.policy_loss, sharded=sharded)
        policy = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        add_token_stats(policy, fused=not sharded and plain_head(policy))
        self._group = dist.group.WORLD if self.accelerator.num_processes > 1 else None
        self._lagged = _Lagged(self.model, proxy_refresh_steps) if self.policy_loss.proxy_source == "lagged" else None
        if self.policy_loss.next_entropy_coefficient(None, 0.0) is not None:
            self.add_callback(EntropyCoefficient())
        self._advantage = advantage
        self._scores: Batch | None = None
        self._means: dict[str, Mean] = {}

    # ------------------------------------------------------------- a generation

    def _generate_and_score_completions(self, inputs: list[Batch]) -> Batch:
        """TRL's batch, with advantages by the estimator, if one is given, the statistics of the policy that generated
        it, the selection, and another policy's proxy."""
        self._scores = None
        batch: Batch = super()._generate_and_score_completions(inputs)
        if self._advantage is not None:
            batch["advantages"] = self._own_advantages(self._advantage, len(batch["advantages"]))
        if self._scores is None and (self._off_policy or self.policy_loss.selection is not None):
            self._scores = self._score(*_whole(batch), batch["completion_mask"].bool())
        batch |= {f"old_{name}": values for name, values in (self._scores or {}).items()}
        seed = self.args.seed + self.state.global_step
        self._log(select(self.policy_loss, batch, seed=seed, group=self._group))
        if self._lagged is not None:
            self._lagged.refresh_if_due(self.state.global_step)
            with self._lagged.in_place():
                batch |= self._score_proxy(batch)
        elif self._off_policy and self.policy_loss.needs_proxy_kl:
            batch |= self._score_proxy(batch)
        return batch

    def _calculate_rewards(self, *args: Any, **named: Any) -> Tensor:
        """TRL's rewards of all ranks, [N, F], kept for the advantages."""
        self._rewards: Tensor = super()._calculate_rewards(*args, **named)
        return self._rewards

    def _own_advantages(self, estimator: str | Estimator, rows: int) -> Tensor:
        """Returns the advantages of this rank's rows, and puts those of all ranks into TRL's log of completions."""
        generations = self.num_generations if self.model.training else self.num_generations_eval
        everywhere = advantages_of(self._rewards, self.reward_weights, generations, estimator)
        logged = self._logs["advantages"]
        for _ in range(min(len(everywhere), len(logged))):
            logged.pop()
        logged.extend(everywhere.tolist())
        return everywhere[self.accelerator.process_index * rows :][:rows]

    def _get_per_token_logps_and_entropies(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *_: Any, **__: Any
    ) -> tuple[Tensor, None, None]:
        """TRL's pass for old log-probs. The other statistics are kept, so that no second pass is needed."""
        self._scores = self._score(input_ids, attention_mask, attention_mask[:, -logits_to_keep:].bool())
        return self._scores["log_probs"], None, None

    def _score(self, input_ids: Tensor, attention_mask: Tensor, mask: Tensor) -> Batch:
        """Returns log_probs, entropy, log_z and in_filter [B, C] where mask [B, C] holds, otherwise 0."""
        log_z = torch.full_like(mask, self.policy_loss.proxy_source == "old")
        parts = [
            {name: spread(values, here) for name, values in stats.items()}
            for here, stats in self._look(input_ids, attention_mask, mask, log_z_rows=log_z)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _score_proxy(self, batch: Batch) -> Batch:
        """Returns proxy_log_probs [B, C] of the current weights; for the full KL also `proxy`, one store per row."""
        mask, stores, parts = loss_mask(batch), [], []
        asked = {"log_z_rows": spread(proxy_rows(self.policy_loss, batch, mask), mask)}
        if self.policy_loss.needs_proxy_kl:
            asked["proxy_rows"] = asked["log_z_rows"]
        for here, stats in self._look(*_whole(batch), mask, **asked):
            log_q = torch.where(stats["in_filter"], stats["log_probs"] - stats["log_z"], -torch.inf)
            parts.append(spread(log_q, here))
            if "proxy_store" in stats:
                stores += stats["proxy_store"].split(here.sum(1).tolist())
        return {"proxy_log_probs": torch.cat(parts)} | ({"proxy": stores} if stores else {})

    @torch.no_grad()
    def _look(
        self, input_ids: Tensor, attention_mask: Tensor, mask: Tensor, **asked: Tensor
    ) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Yields mask and statistics of some rows at a time. asked: [B, C], see `Wanted`."""
        size = self.args.per_device_train_batch_size if self.model.training else self.args.per_device_eval_batch_size
        for rows in torch.arange(len(mask), device=mask.device).split(size):
            here = mask[rows]
            of_tokens = {name: values[rows][here] for name, values in asked.items()}
            yield here, self._token_stats(self.model, input_ids[rows], attention_mask[rows], here, **of_tokens)

    def _token_stats(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, mask: Tensor, **asked: Any
    ) -> dict[str, Any]:
        """Returns the statistics of the T tokens in mask [B, C]. asked: [T], see `Wanted`."""
        wanted = asked | {
            "mask": mask,
            "targets": input_ids[:, -mask.shape[1] :][mask],
            "temperature": self.temperature,
            "settings": self.policy_loss.token_stats_kwargs(),
        }
        with self.accelerator.autocast():
            stats: dict[str, Any] = model(input_ids=input_ids, attention_mask=attention_mask, wanted_stats=wanted)
        return stats

    # ------------------------------------------------------------- an update

    def _prepare_inputs(self, generation_batch: Any) -> Batch:
        """TRL's next micro-batch. With the first one of an update, the denominator of the whole update is set."""
        inputs: Batch = super()._prepare_inputs(generation_batch)
        place = self._step % self.args.steps_per_generation
        if not self.model.training:
            set_denominator(self.policy_loss, [inputs], self._group)
        elif place % self.args.gradient_accumulation_steps == 0:
            update = self._buffered_inputs[place : place + self.current_gradient_accumulation_steps]
            set_denominator(self.policy_loss, update, self._group)
        return inputs

    def _compute_loss(self, model: nn.Module, inputs: Batch) -> Tensor:
        mask = loss_mask(inputs)
        asked: dict[str, Any] = {"log_z_rows": proxy_rows(self.policy_loss, inputs, mask)}
        if "proxy" in inputs:
            asked["proxy"] = ProxyStore.join(inputs["proxy"])
        stats = self._token_stats(model, *_whole(inputs), mask, **asked)
        given = loss_inputs(
            inputs, mask, stats, off_policy=self._off_policy, entropy_coefficient=self._entropy_coefficient.value
        )
        output = self.policy_loss(given)
        means = {f"lpreg/{name}": mean for name, mean in output.metrics.items()}
        means["lpreg/kept_fraction"] = Mean.of(stats["in_filter"], given.counted)
        means["entropy"] = Mean.of(stats["entropy"], given.counted)
        self._means = {name: self._means[name] + mean if self._means else mean for name, mean in means.items()}
        if self.accelerator.sync_gradients:
            means_of_update = self._over_ranks(self._means)
            self._log(means_of_update)
            self._means = {}
            if self.model.training:
                self._entropy_coefficient.adapt(self.policy_loss, means_of_update["entropy"])
        # The loss is this rank's share of a global mean, but TRL averages gradients over ranks.
        return output.loss * self.accelerator.num_processes

    @property
    def _entropy_coefficient(self) -> EntropyCoefficient:
        """The coefficient that the method adapts. On a resume, transformers may put another object in its place."""
        found = (callback for callback in self.callback_handler.callbacks if isinstance(callback, EntropyCoefficient))
        return next(found, EntropyCoefficient())

    def _over_ranks(self, means: dict[str, Mean]) -> dict[str, float]:
        sums = torch.stack([torch.stack([mean.total, mean.count]) for mean in means.values()])
        if self._group is not None:
            dist.all_reduce(sums, group=self._group)
        return {name: Mean(total, count).value for name, (total, count) in zip(means, sums, strict=True)}

    def _log(self, metrics: dict[str, float]) -> None:
        """Adds metrics, which TRL averages over the steps between two logs."""
        for name, value in metrics.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)


def _whole(batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns prompts and responses together, [B, P + C], and their attention mask."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    return ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)


class _Lagged:
    """A copy of the trained weights from some steps ago, for the proxy."""

    def __init__(self, model: nn.Module, refresh_steps: int) -> None:
        if refresh_steps < 1:
            raise ValueError(f"proxy_refresh_steps must be at least 1, got {refresh_steps}")
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._refresh_steps, self._due = refresh_steps, 0
        self._weights: list[Tensor] = []

    def refresh_if_due(self, step: int) -> None:
        """Copies the weights if the copy is missing or older than the refresh interval."""
        if not self._weights or step >= self._due:
            self._weights = [parameter.detach().clone() for parameter in self._parameters]
            self._due = step + self._refresh_steps

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the copy into the model within the context, for a forward without gradient."""
        now = [parameter.data for parameter in self._parameters]
        try:
            for parameter, weight in zip(self._parameters, self._weights, strict=True):
                parameter.data = weight
            yield
        finally:
            for parameter, weight in zip(self._parameters, now, strict=True):
                parameter.data = weight
