"""The embedded engine: plain Hugging Face transformers, in batches, with one prefill per prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from megatron_rl.models.fused_experts import as_stored
from megatron_rl.rollout.engines.interface import EngineLaunch, RolloutEngine, response_of
from megatron_rl.rollout.engines.transformers.batch import Batch
from megatron_rl.types import Response, SamplingParams
from megatron_rl.utils import heartbeat
from megatron_rl.weight_sync.checksums import Checksums, compare
from megatron_rl.weight_sync.digest_queue import digests
from megatron_rl.weight_sync.transport import FolderUpdate, WeightUpdate

RETIRE_BELOW = 0.8
"""Share of unfinished rows below which finished rows are taken out of the batch. Copying the cache for that costs about
as much as a decode step."""
MAX_ROWS = 512
"""Largest number of rows in a batch."""


class TransformersEngine(RolloutEngine):
    """Implements `RolloutEngine` in this process."""

    def __init__(self, model_folder: Path, device: str, dtype: str) -> None:
        self.device = torch.device(device)
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(
            model_folder,
            dtype=getattr(torch, dtype),
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
        ).to(self.device)
        self.model.eval()
        for parameter in self.model.parameters():
            # Copied from the mapped file, which is not aligned: the last bits of a product depend on the alignment.
            parameter.data = parameter.data.clone()
        self.version = 0
        self.paused = False

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        partial: Sequence[Sequence[Response]] = (),
        min_groups: int | None = None,
    ) -> list[list[Response]]:
        """See `RolloutEngine`. Groups of similar length share a batch, so that there is little padding."""
        if self.paused:
            raise RuntimeError("the engine is paused: resume() it before requesting responses")
        generator = torch.Generator(device=self.device).manual_seed(sampling.seed)
        nothing = response_of([], [], "abort", self.version)
        groups = [list(partial[i]) if partial and partial[i] else [nothing] * sampling.n for i in range(len(prompts))]
        lengths = [len(prompt) + max(map(len, group)) for prompt, group in zip(prompts, groups, strict=True)]
        order = sorted(range(len(prompts)), key=lambda i: lengths[i])
        per_batch, complete = max(1, MAX_ROWS // sampling.n), 0
        for start in range(0, len(order), per_batch):
            chosen = order[start : start + per_batch]
            share = None
            if min_groups is not None:
                share = math.ceil(min_groups * (start + len(chosen)) / len(order)) - complete
            batch = Batch([prompts[i] for i in chosen], [groups[i] for i in chosen], sampling, self.device)
            self._sample_batch(batch, sampling, generator, share)
            complete += batch.complete
            for i, group in zip(chosen, batch.responses(self.version), strict=True):
                groups[i] = group
        return groups

    @torch.inference_mode()
    def _sample_batch(
        self, batch: Batch, sampling: SamplingParams, generator: torch.Generator, min_groups: int | None
    ) -> None:
        """Samples until all rows are complete, or until `min_groups` of the batch's groups are."""
        if not batch.rows:
            return
        stops = torch.tensor(sampling.stop_token_ids, dtype=torch.int64, device=self.device)
        prefixes, mask, lengths = batch.prefixes()
        cache = DynamicCache(config=self.model.config)
        logits = self._forward(prefixes, cache, mask, None if mask is None else (mask.cumsum(1) - 1).clamp(min=0))
        if (repeats := batch.rows // len(prefixes)) > 1:
            cache.batch_repeat_interleave(repeats)
            logits, lengths = logits.repeat_interleave(repeats, 0), lengths.repeat_interleave(repeats, 0)
            mask = None if mask is None else mask.repeat_interleave(repeats, 0)
        active, limits = torch.arange(batch.rows, device=self.device), batch.limits  # `active`: rows not yet retired
        running, chosen, position = limits > 0, active, 0
        batch.end(active[~running], 0, running[~running])
        while running.any() and (min_groups is None or batch.complete < min_groups):
            if position % 64 == 0:
                heartbeat.notify(f"{len(active)} responses, {position} tokens of {sampling.max_tokens} at most")
            if position:
                if mask is not None:
                    mask = torch.cat([mask, mask.new_ones(len(active), 1)], 1)
                positions = None if mask is None else lengths[:, None] + position - 1
                logits = self._forward(chosen[:, None], cache, mask, positions)
            chosen, log_probs = _sample(logits, sampling.temperature, generator)
            batch.tokens[active, position], batch.log_probs[active, position] = chosen, log_probs
            position += 1
            stopped = torch.isin(chosen, stops)
            ended = running & (stopped | (limits == position))
            batch.end(active[ended], position, stopped[ended])
            running = running & ~ended
            if running.sum() < RETIRE_BELOW * len(active):
                active, chosen, limits, lengths = (values[running] for values in (active, chosen, limits, lengths))
                cache.batch_select_indices(running.nonzero().squeeze(-1))
                mask, running = None if mask is None else mask[running], running[running]
        batch.abort(active[running], position)

    def _forward(self, tokens: Tensor, cache: DynamicCache, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        """Logits [rows, V] after the last token. mask [rows, tokens so far]: 0 for padding; None: there is none."""
        logits: Tensor = self.model(
            tokens,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            attention_mask=mask,
            position_ids=positions,
        ).logits[:, -1]
        return logits

    @torch.no_grad()
    def update_weights(self, update: WeightUpdate) -> None:
        """See `RolloutEngine`. Overwrites the model's own tensors, and allocates none."""
        if not isinstance(update, FolderUpdate):
            raise TypeError("the embedded engine takes weights from a folder only")
        self.model.to(self.device)  # if its memory was released
        own, taken = as_stored(self.model.state_dict()), set()
        for name, tensor in update.tensors():
            if name not in own:
                raise KeyError(f"weight update {update.version} has {name}, which the engine's model lacks")
            if own[name].shape != tensor.shape:
                shapes = f"{list(tensor.shape)}, the engine's model {list(own[name].shape)}"
                raise ValueError(f"weight update {update.version} has {name} as {shapes}")
            own[name].copy_(tensor)
            taken.add(name)
        missing = set(own) - taken - self._tied
        if missing:
            raise KeyError(f"weight update {update.version} leaves out {sorted(missing)[:5]}")
        self.version = update.version

    def verify_weights(self, version: int, sent: Checksums) -> int:
        own = as_stored(self.model.state_dict())
        held = digests((name, tensor) for name, tensor in own.items() if name not in self._tied)
        return compare(sent.plain, held, version)

    @property
    def _tied(self) -> set[str]:
        """Names of tensors that share the memory of another."""
        return set(getattr(self.model, "all_tied_weights_keys", None) or ())

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def release_memory(self) -> None:
        """See `RolloutEngine`."""
        self.pause()
        self.model.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def health(self) -> int:
        return self.version


def launch_engine(launch: EngineLaunch) -> TransformersEngine:
    return TransformersEngine(launch.model_folder, launch.device, launch.dtype)


def _sample(logits: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Samples from logits [B, V]: tokens [B] and their log-probs [B]. At temperature 0 the choice is greedy, and
    log-probs are those at temperature 1."""
    log_p = torch.log_softmax(logits.float() / (temperature or 1.0), -1)
    if temperature == 0:
        chosen = log_p.argmax(-1, keepdim=True)
    else:
        # One random number per row, in double precision: a single one loses rare tokens of a large vocabulary.
        below = log_p.exp().cumsum(-1, dtype=torch.float64)
        drawn = torch.rand(len(below), 1, generator=generator, dtype=torch.float64, device=below.device)
        chosen = torch.searchsorted(below, drawn * below[:, -1:], right=True).clamp(max=below.shape[-1] - 1)
    return chosen.squeeze(-1), log_p.gather(-1, chosen).squeeze(-1)
