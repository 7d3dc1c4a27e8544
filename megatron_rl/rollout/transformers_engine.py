"""The embedded engine: plain Hugging Face transformers, batched, one prefill a prompt, finished rows retired early."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from megatron_rl.observability import heartbeat
from megatron_rl.rollout.stored import as_stored
from megatron_rl.types import FinishReason, Generation, SamplingParams
from megatron_rl.weight_sync.checksums import Checksums, compare, sha256
from megatron_rl.weight_sync.transport import FolderUpdate, WeightUpdate

# A cache copy costs about as much as a decode step: retire rows once a fifth of the batch has finished.
RETIRE_BELOW = 0.8
MAX_ROWS = 512


class TransformersEngine:
    """Implements `RolloutEngine` in this process."""

    def __init__(self, model_folder: Path, device: str, dtype: str) -> None:
        self.device = torch.device(device)
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(
            model_folder, dtype=getattr(torch, dtype), attn_implementation="sdpa", local_files_only=True
        ).to(self.device)
        self.model.eval()
        for parameter in self.model.parameters():
            # Out of the mapped file: its offsets are no alignment, on which the last bits of a product depend.
            parameter.data = parameter.data.clone()
        self.version = 0
        self.paused = False

    def start(self) -> None:
        """Nothing to wait for: the model is loaded."""

    def close(self) -> None:
        """Nothing outlives this process."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Generation]]:
        """See `RolloutEngine`. Prompts of one length share a batch, so nothing is padded."""
        if self.paused:
            raise RuntimeError("the engine is paused: resume() it before asking for responses")
        by_length: dict[int, list[int]] = defaultdict(list)
        for i, prompt in enumerate(prompts):
            by_length[len(prompt)].append(i)
        generator = torch.Generator(device=self.device).manual_seed(sampling.seed)
        results: list[list[Generation]] = [[] for _ in prompts]
        per_batch = max(1, MAX_ROWS // sampling.n)
        for indices in by_length.values():
            for start in range(0, len(indices), per_batch):
                chosen = indices[start : start + per_batch]
                tokens = torch.tensor([list(prompts[i]) for i in chosen], device=self.device)
                generations = self._generate_batch(tokens, sampling, generator)
                for slot, i in enumerate(chosen):
                    results[i] = generations[slot * sampling.n : (slot + 1) * sampling.n]
        return results

    @torch.inference_mode()
    def _generate_batch(
        self, prompts: Tensor, sampling: SamplingParams, generator: torch.Generator
    ) -> list[Generation]:
        """prompts [P, L] -> P * n generations, prompt-major."""
        rows = prompts.shape[0] * sampling.n
        tokens = torch.zeros(rows, sampling.max_tokens, dtype=torch.int64, device=self.device)
        log_probs = torch.zeros(rows, sampling.max_tokens, device=self.device)
        lengths = torch.full((rows,), sampling.max_tokens, device=self.device)
        stopped = torch.zeros(rows, dtype=torch.bool, device=self.device)
        stop_ids = torch.tensor(sampling.stop_token_ids, dtype=torch.int64, device=self.device)

        cache = DynamicCache(config=self.model.config)
        logits = self.model(prompts, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        cache.batch_repeat_interleave(sampling.n)
        logits = logits.repeat_interleave(sampling.n, 0)
        active = torch.arange(rows, device=self.device)  # which output row each row of the batch is
        for position in range(sampling.max_tokens):
            if position % 64 == 0:
                heartbeat.say(f"{len(active)} responses, token {position} of {sampling.max_tokens} at most")
            chosen, chosen_log_probs = _sample(logits, sampling.temperature, generator)
            running = ~stopped[active]
            tokens[active, position] = chosen
            log_probs[active, position] = chosen_log_probs
            finished = running & torch.isin(chosen, stop_ids)
            lengths[active[finished]] = position + 1
            stopped[active[finished]] = True
            keep = (~stopped[active]).nonzero().squeeze(-1)
            if len(keep) == 0 or position + 1 == sampling.max_tokens:
                break
            if len(keep) < RETIRE_BELOW * len(active):
                active, chosen = active[keep], chosen[keep]
                cache.batch_select_indices(keep)
            logits = self.model(chosen[:, None], past_key_values=cache, use_cache=True).logits[:, -1]
        return self._generations(tokens, log_probs, lengths, stopped)

    def _generations(self, tokens: Tensor, log_probs: Tensor, lengths: Tensor, stopped: Tensor) -> list[Generation]:
        generations = []
        for ids, lps, length, stop in zip(
            tokens.tolist(), log_probs.tolist(), lengths.tolist(), stopped.tolist(), strict=True
        ):
            reason: FinishReason = "stop" if stop else "length"
            generations.append(Generation(ids[:length], lps[:length], reason, self.version))
        return generations

    @torch.no_grad()
    def update_weights(self, update: WeightUpdate) -> None:
        """See `RolloutEngine`. In place: the model's own tensors are overwritten, none is allocated."""
        if not isinstance(update, FolderUpdate):
            raise TypeError("the embedded engine takes weights from a folder only")
        own, taken = as_stored(self.model.state_dict()), set()
        for name, tensor in update.tensors():
            if name not in own:
                raise KeyError(f"weight update {update.version} has {name}, which the engine's model has not")
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
        held = {name: sha256(tensor) for name, tensor in own.items() if name not in self._tied}
        return compare(sent.plain, held, version)

    @property
    def _tied(self) -> set[str]:
        """Names of tensors that are another's."""
        return set(getattr(self.model, "all_tied_weights_keys", None) or ())

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def health(self) -> int:
        return self.version


def _sample(logits: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """logits [B, V] -> tokens [B] and their log-probs [B]; temperature 0 is greedy, its log-probs those at 1."""
    log_p = torch.log_softmax(logits.float() / (temperature or 1.0), -1)
    if temperature == 0:
        chosen = log_p.argmax(-1)
    else:
        # The exponential race: argmin of E / p is a draw from p; one pass, cheaper than multinomial.
        noise = torch.empty_like(log_p).exponential_(generator=generator)
        chosen = (log_p - noise.log()).argmax(-1)
    return chosen, log_p.gather(-1, chosen[:, None]).squeeze(-1)
