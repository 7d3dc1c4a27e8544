"""Tokens that a configuration names: those that end a response, and those of probes."""

from __future__ import annotations

from typing import Any

from megatron_rl.config import Config
from megatron_rl.data.tokenizer import single_token, stop_token_ids
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.hf_format import read_config


def check_tokens(config: Config, tokenizer: Any) -> tuple[tuple[int, ...], dict[str, tuple[int, int]]]:
    """Returns the ids that end a response, and the ids (preceding token, measured token) of every probe.

    Raises UserError for a text that is not one token, and for an id that the model does not have.
    """
    path = config.model.path
    stops = stop_token_ids(tokenizer, path, config.rollout.stop_token_ids)
    probes = {
        name: (
            single_token(tokenizer, probe.after, f"evaluation.probes.{name}.after"),
            single_token(tokenizer, probe.token, f"evaluation.probes.{name}.token"),
        )
        for name, probe in config.evaluation.probes.items()
    }
    vocabulary = Architecture.from_hf(read_config(path)).vocabulary
    named = {"rollout.stop_token_ids" if config.rollout.stop_token_ids else "the end tokens of the model folder": stops}
    named |= {f"evaluation.probes.{name}": ids for name, ids in probes.items()}
    for where, ids in named.items():
        if max(ids) >= vocabulary:
            raise UserError(
                f"{where}: {max(ids)} is no token id of the model, which has {vocabulary} (vocab_size in "
                f"{path / 'config.json'})"
            )
    return stops, probes
