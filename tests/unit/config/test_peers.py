"""Keys of other trainers get the right key of ours in the error."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_rl.config.keys import is_known
from megatron_rl.config.peers import PEERS, translation
from megatron_rl.errors import UserError

ENTRIES = [(peer, key, ours) for peer, keys in PEERS.items() for key, ours in keys.items()]


@pytest.mark.parametrize(("peer", "key", "ours"), ENTRIES, ids=lambda value: str(value))
def test_every_entry_names_a_key_of_ours(peer: str, key: str, ours: str) -> None:
    assert is_known(tuple(ours.split(".")))
    if peer == "verl":
        assert not is_known(tuple(key.split("."))) or key == ours
    found = translation(tuple(key.split(".")))
    assert found is not None and (found[0] == ours or peer not in found[1])


def test_the_keys_of_trl_are_those_of_its_configuration() -> None:
    trl = pytest.importorskip("trl")
    fields = {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    assert set(PEERS["TRL"]) - fields == set()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("num_generations=4", "num_generations of TRL is rollout.samples_per_prompt here"),
        ("rollout.n_samples_per_prompt=4", "of slime and OpenRLHF is rollout.samples_per_prompt here"),
        ("--rollout.max_new_tokens=4", "of OpenRLHF is rollout.max_response_tokens here"),
        ("algo.kl.init_coef=0.1", "of OpenRLHF is algorithm.reference_kl.coefficient here"),
        ("trainer.total_epochs=1", "of verl is train.steps here"),
        ("actor_rollout_ref.rollout.gpu_memory_utilization=0.5", "of verl is rollout.server.arguments here"),
        ("generate_max_len=4", "generate_max_len of OpenRLHF is rollout.max_response_tokens here"),
        ("actor_rollout_ref.rollout.n=4", "of verl is rollout.samples_per_prompt here"),
        ("data.train_batch_size=4", "data.train_batch_size of verl is rollout.prompts_per_step here"),
        ("algorithm.kl_ctrl.kl_coef=0.1", "of verl is algorithm.reference_kl.coefficient here"),
        ("trainer.total_training_steps=4", "of verl is train.steps here"),
        ("--kl-loss-coef=0.1", "of slime is algorithm.reference_kl.coefficient here"),
        ("global_batch_size=4", "global_batch_size of slime is train.updates_per_rollout here"),
        ("micro_train_batch_size=4", "micro_train_batch_size of OpenRLHF is actor.micro_batch_tokens here"),
        ("gradient_accumulation_steps=4", "of TRL is actor.micro_batch_tokens here"),
        ("algorithm.beta=0.1", "did you mean algorithm.lp_reg.beta?; algorithm.beta of TRL is algorithm.reference_kl"),
    ],
)
def test_an_override_with_the_key_of_a_peer(load, override: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load(override)
    assert words in str(caught.value)


def test_a_file_in_the_form_of_a_peer_names_each_key(load) -> None:
    with pytest.raises(UserError) as caught:
        load(text="actor_rollout_ref: {rollout: {n: 8}, actor: {optim: {lr: 1e-6}}}\ntrainer: {nnodes: 2}\n")
    message = str(caught.value)
    for ours in ("rollout.samples_per_prompt", "actor.optimizer.lr", "cluster.nodes"):
        assert f"of verl is {ours} here" in message
