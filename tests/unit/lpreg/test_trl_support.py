"""TRL features that lpreg's trainer supports, and settings that it refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig

from lpreg import PolicyLoss, make_loss, with_lp_reg, with_reference_kl
from lpreg.integrations._trl_advantages import advantages_of
from lpreg.integrations._trl_batch import loss_inputs, loss_mask
from lpreg.integrations._trl_checks import check_trainer
from lpreg.integrations.causal_lm import Wanted, add_token_stats, plain_head
from lpreg.integrations.trl import GRPOTrainer
from tests.hf_models import hf_model
from tests.tiers import quick_of
from tests.trl_runs import CPU, EQUALLY_LONG, VOCAB, Recorder, reward, run, tiny_model, tokenizer

LP_REG = make_loss("lp_reg", rho=0.4, min_p=0.1)
HEADS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3, tied": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8, "query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 3.0},
}


def model_with(head: str, **changes: Any) -> Any:
    kind = head.split(",")[0]
    return hf_model(kind, noise=0.05, vocab_size=VOCAB, **(HEADS[head] | changes))


@pytest.mark.parametrize("head", HEADS)
def test_only_a_plain_matrix_head_is_fused(head: str) -> None:
    assert plain_head(model_with(head)) == head.startswith("qwen3")
    assert plain_head(model_with(head).to(torch.bfloat16)) == head.startswith("qwen3")


def test_a_soft_cap_is_detected_at_small_logits() -> None:
    model = model_with("gemma2", final_logit_softcapping=1000.0)
    assert not plain_head(model)


@pytest.mark.parametrize("head", HEADS)
def test_statistics_equal_those_of_the_models_own_logits(head: str) -> None:
    model, plain = model_with(head).double(), model_with(head).double()
    add_token_stats(model, fused=plain_head(model))
    ids = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()
    attention = torch.ones_like(ids)
    targets = ids[:, 5:][mask]
    log_z_rows = torch.arange(len(targets)) % 2 == 0
    wanted = Wanted(mask=mask, targets=targets, log_z_rows=log_z_rows, temperature=0.7, settings={"min_p": 0.3})
    seen = model(input_ids=ids, attention_mask=attention, wanted_stats=wanted)

    log_p = torch.log_softmax(plain(ids, attention_mask=attention).logits[:, 4:-1][mask] / 0.7, -1)
    p = log_p.exp()
    inside = p >= 0.3 * p.amax(-1, keepdim=True)
    want = {
        "log_probs": log_p.gather(1, targets[:, None])[:, 0],
        "entropy": -(p * log_p).sum(-1),
        "log_z": torch.where(log_z_rows, (p * inside).sum(-1).log(), 0.0),
        "in_filter": inside.gather(1, targets[:, None])[:, 0],
    }
    for name, value in want.items():
        torch.testing.assert_close(seen[name], value, rtol=1e-7, atol=1e-9)
    (seen["log_probs"].sum() - 2 * seen["log_z"].sum()).backward()
    (want["log_probs"].sum() - 2 * want["log_z"].sum()).backward()
    for (name, got), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)


def gradients(seen: Recorder) -> list[dict[str, torch.Tensor]]:
    return [update.gradient for update in seen.updates]


@pytest.mark.parametrize("head", quick_of(["gemma2", "granite"], ["gemma2"]))
def test_micro_batches_and_activation_checkpointing_do_not_change_the_update(head: str, tmp_path: Path) -> None:
    models = [model_with(head).double() for _ in range(2)]
    want = gradients(run(LP_REG, tmp_path, model=models[0], prompts=EQUALLY_LONG))
    micro = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 6, "gradient_checkpointing": True}
    got = gradients(run(LP_REG, tmp_path, model=models[1], prompts=EQUALLY_LONG, **micro))
    for update, expected in zip(got, want, strict=True):
        assert update.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(update[name], gradient, rtol=1e-5, atol=1e-7)  # norms are fp32


def test_mixed_precision_is_close_to_full_precision(tmp_path: Path) -> None:
    want = gradients(run(LP_REG, tmp_path, model=tiny_model().float()))
    got = gradients(run(LP_REG, tmp_path, model=tiny_model().float(), bf16=True))
    whole = [torch.cat([gradient.flatten() for gradient in updates[0].values()]) for updates in (got, want)]
    assert 0 < (whole[0] - whole[1]).norm() < 0.05 * whole[1].norm()


def test_only_the_adapter_is_trained(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    lagged = make_loss("lp_reg", rho=0.4, min_p=0.1, proxy_source="lagged")
    seen = run(lagged, tmp_path, model=get_peft_model(tiny_model(), lora), proxy_refresh_steps=1)
    first, second = seen.updates
    assert first.gradient and all("lora" in name for name in first.gradient)
    moved = {name for name, weight in second.weights.items() if not torch.equal(weight, first.weights[name])}
    assert moved and moved <= set(first.gradient)


def test_truncated_responses_can_be_masked_even_if_all_are(tmp_path: Path) -> None:
    """The rollouts of these runs never reach a stop token."""
    for loss in (LP_REG, make_loss("gspo"), make_loss("high_entropy")):
        seen = run(loss, tmp_path, mask_truncated_completions=True)
        assert all(bool((gradient == 0).all()) for gradient in seen.updates[0].gradient.values())


def trainer(
    folder: Path, loss: PolicyLoss | str = LP_REG, model: Any = None, advantage: str | None = None, **settings: Any
) -> GRPOTrainer:
    config: dict[str, Any] = {"per_device_train_batch_size": 4, "num_generations": 4, "output_dir": str(folder)}
    return GRPOTrainer(
        tiny_model() if model is None else model,
        reward,
        GRPOConfig(**(CPU | config | settings)),
        Dataset.from_dict({"prompt": EQUALLY_LONG}),
        eval_dataset=Dataset.from_dict({"prompt": EQUALLY_LONG[:4]}),
        processing_class=tokenizer(),
        loss=loss,
        advantage=advantage,
    )


def test_evaluation_reports_a_loss_and_the_methods_metrics(tmp_path: Path) -> None:
    seen = trainer(tmp_path, per_device_eval_batch_size=8, max_completion_length=4).evaluate()
    assert torch.isfinite(torch.tensor(seen["eval_loss"]))
    assert 0.3 < seen["eval_lpreg/below_delta_fraction"] <= 0.5 and 0 < seen["eval_lpreg/delta"] < 1


def test_metrics_are_those_of_the_whole_update(tmp_path: Path) -> None:
    whole = run(LP_REG, tmp_path, steps=1).metrics[0]
    cut = run(LP_REG, tmp_path, steps=1, per_device_train_batch_size=3, gradient_accumulation_steps=4).metrics[0]
    names = [name for name in whole if name.startswith("lpreg/") or name in ("entropy", "loss", "grad_norm")]
    assert len(names) == 14
    assert {name: cut[name] for name in names} == pytest.approx({name: whole[name] for name in names}, rel=1e-7)
    assert 0 < whole["lpreg/selected_fraction"] < whole["lpreg/below_delta_fraction"] < 0.45


def test_importance_ratios_multiply_the_advantages() -> None:
    batch = {
        "completion_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "tool_mask": torch.tensor([[1, 1, 1], [1, 0, 1]]),
        "advantages": torch.tensor([2.0, -1.0]),
        "denominator": 4,
    }
    mask = loss_mask(batch)
    stats = {"log_probs": torch.zeros(4)}
    per_token = batch | {"importance_sampling_ratio": torch.tensor([[1.0, 0.5, 9.0], [2.0, 9.0, 0.0]])}
    assert loss_inputs(per_token, mask, stats, off_policy=False).advantages.tolist() == [2.0, 1.0, -2.0, 0.0]
    per_row = batch | {"importance_sampling_ratio": torch.tensor([[0.5], [2.0]])}
    inputs = loss_inputs(per_row, mask, stats, off_policy=False)
    assert inputs.advantages.tolist() == [1.0, 1.0, -2.0, -2.0]
    assert inputs.sequence_ids is not None and inputs.sequence_ids.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "grpo", "beta": 0.1}, r"GRPOConfig: beta, loss_type: settings of TRL's own loss"),
        ({"epsilon_high": 0.28}, r"epsilon_high: settings of TRL's own loss.*make_loss\('clip_higher'"),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 3}, "steps_per_generation is 3; it must be a mul"),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2}, "steps_per_generation is 2; it must be a mul"),
        ({"advantage": "maxrl", "scale_rewards": "none"}, "scale_rewards: settings of TRL's own advantages"),
        ({"loss": "lpreg"}, "'lpreg' is not a method; did you mean 'lp_reg'"),
        ({"loss": with_reference_kl(LP_REG, coefficient=0.1)}, "not one with reference_kl around it"),
        ({"model": hf_model("qwen3_moe", vocab_size=VOCAB)}, r"auxiliary loss.*router_aux_loss_coef=0\.0"),
    ],
)
def test_unsupported_settings_and_models_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **settings)


def test_another_release_series_of_trl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import trl

    from lpreg.integrations._trl_checks import check_version

    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.raises(ImportError, match=r"written for TRL 1\.16\.x, not for 1\.17\.0"):
        check_version()


@pytest.mark.parametrize("loss", quick_of(["lp_reg", "gspo"], ["lp_reg"]))
def test_a_short_training_raises_the_reward(loss: str, tmp_path: Path) -> None:
    """The model generates: the test uses TRL's own rollouts, rewards, optimizer and logs."""

    def low_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(token < 20 for token in ids) / len(ids) for ids in completion_ids]

    settings = {"max_completion_length": 6, "learning_rate": 1e-2, "optim": "adamw_torch"}
    seen = run(loss, tmp_path, rollout_func=None, reward=low_ids, per_device_train_batch_size=24, steps=25, **settings)
    rewards = [metrics["reward"] for metrics in seen.metrics if "reward" in metrics]
    assert len(rewards) == 25
    assert sum(rewards[:3]) / 3 < 0.6 and sum(rewards[-3:]) / 3 > 0.9


def test_wrappers_that_trl_cannot_keep_are_refused() -> None:
    trainer: Any = SimpleNamespace()
    with pytest.raises(ValueError, match="not one with reference_kl around it"):
        check_trainer(trainer, with_lp_reg(with_reference_kl(make_loss("grpo"), coefficient=0.1)), sharded=False)


def test_advantages_may_be_those_of_lpreg(tmp_path: Path) -> None:
    """Rewards are (0, 1, 2, 3) for every prompt, so maxrl's advantages are (R - 1.5) / 1.5."""

    def places(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(place % 4) for place in range(len(completion_ids))]

    seen = run("grpo", tmp_path, steps=1, reward=places, advantage="maxrl", shuffle_dataset=False)
    batch = seen.updates[0].micro_batches[0]
    assert sorted(batch["advantages"].tolist()) == pytest.approx(sorted([-1.0, -1 / 3, 1 / 3, 1.0] * 3))


def test_a_response_without_a_reward_is_no_part_of_its_group() -> None:
    nothing = float("nan")
    rewards = torch.tensor([[1.0, 0.0], [0.0, nothing], [nothing, nothing], [0.0, 4.0], [nothing, 0.0], [1.0, 1.0]])
    found = advantages_of(rewards, torch.tensor([1.0, 0.5]), 3, "dr_grpo")
    assert found.tolist() == pytest.approx([0.5, -0.5, 0.0, 2 - 3.5 / 3, -3.5 / 3, 1.5 - 3.5 / 3])


ADAPTED = {"coefficient": 0.01, "target": 4.0, "step": 0.004}


def coefficients(seen: Recorder) -> list[float]:
    return [row["lpreg/entropy_coefficient"] for row in seen.metrics if "lpreg/entropy_coefficient" in row]


@pytest.mark.parametrize("target", [4.0, 0.5])
def test_the_entropy_coefficient_follows_the_entropy_of_each_whole_update(target: float, tmp_path: Path) -> None:
    """The entropy of this model is about 3.9: below the first target, above the second."""
    loss = make_loss("entropy_bonus", **(ADAPTED | {"target": target}))
    micro = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
    seen = run(loss, tmp_path, steps=4, **micro)
    entropies = [row["entropy"] for row in seen.metrics if "entropy" in row]
    expected, coefficient = [], None
    for entropy in entropies:
        expected.append(0.01 if coefficient is None else coefficient)
        coefficient = loss.next_entropy_coefficient(coefficient, entropy)
    assert len(set(expected)) > 1 and coefficients(seen) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("restored", [False, True])
def test_a_resumed_run_goes_on_with_the_adapted_coefficient(restored: bool, tmp_path: Path) -> None:
    """Also if transformers restores callbacks, and puts another object in the place of the trainer's own."""
    settings = {"save_strategy": "steps", "save_steps": 2, "restore_callback_states_from_checkpoint": restored}
    whole = coefficients(run(make_loss("entropy_bonus", **ADAPTED), tmp_path / "whole", steps=4, **settings))
    assert whole == pytest.approx([0.01, 0.014, 0.018, 0.022]), "the entropy stays below the target"
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    again = run(
        make_loss("entropy_bonus", **ADAPTED),
        tmp_path / "again",
        steps=4,
        resume_from_checkpoint=checkpoint,
        **settings,
    )
    assert coefficients(again)[-2:] == pytest.approx(whole[2:])
