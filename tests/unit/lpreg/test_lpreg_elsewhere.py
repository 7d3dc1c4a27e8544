"""The code of docs/use-lpreg-elsewhere.md runs, and a policy loss for verl equals the method."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lpreg import make_loss, with_correction
from lpreg.integrations.verl import VerlLoss, policy_loss
from lpreg.losses.registry import METHODS
from tests.dense_methods import DEFINITIONS, Batch

PAGE = Path(__file__).parents[3] / "docs" / "use-lpreg-elsewhere.md"
LOOP, TRL, VERL = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_the_loop_of_the_page_learns(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(compile(LOOP, str(PAGE), "exec"), names)
    assert names["rewards"][0] < 0.2 and names["rewards"][-1] > 0.5
    assert capsys.readouterr().out.startswith("mean reward: 0.")


@pytest.mark.parametrize("name", METHODS)
def test_the_loop_of_the_page_works_with_any_method(name: str) -> None:
    code = re.sub(r'make_loss\("lp_reg", rho=0.05\)', f'make_loss("{name}")', LOOP).replace("range(200)", "range(3)")
    assert f'make_loss("{name}")' in code
    exec(compile(code, str(PAGE), "exec"), {})


def test_the_trl_example_of_the_page_makes_a_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    from tests.trl_runs import tiny_model, tokenizer

    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("model")
    tokenizer().save_pretrained("model")
    names = {"model": "model", "reward_funcs": len, "dataset": Dataset.from_dict({"prompt": ["1 2 > 3 :"] * 8})}
    on_cpu = TRL.replace("    GRPOConfig(", '    GRPOConfig(use_cpu=True, report_to="none", ')
    exec(compile(on_cpu, str(PAGE), "exec"), names)
    assert names["trainer"].policy_loss.settings.kl_estimator == "full"  # type: ignore[attr-defined]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, VerlLoss]:
    """The part of verl.trainer.ppo.core_algos that registers a loss."""
    losses: dict[str, VerlLoss] = {}

    def register_policy_loss(name: str) -> Any:
        return lambda function: losses.setdefault(name, function)

    for name in ("verl", "verl.trainer", "verl.trainer.ppo", "verl.trainer.ppo.core_algos"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["verl.trainer.ppo.core_algos"], "register_policy_loss", register_policy_loss, False)
    return losses


def test_the_verl_example_of_the_page_registers_a_loss(registry: dict[str, VerlLoss]) -> None:
    exec(compile(VERL, str(PAGE), "exec"), {})
    assert registry.keys() == {"lpreg_cispo"} and callable(registry["lpreg_cispo"])


POSSIBLE = {
    "grpo": "token-mean",
    "grpo, mean of sequences": "seq-mean-token-mean",
    "dr. grpo": "seq-mean-token-sum-norm",
    "clip_higher": "token-mean",
    "dual_clip": "token-mean",
    "gspo": "seq-mean-token-mean",
    "cispo": "token-mean",
    "dppo, tv": "token-mean",
    "dppo, kl": "token-mean",
    "drpo": "token-mean",
    "sapo": "seq-mean-token-mean",
    "up": "token-mean",
    "vespo": "token-mean",
}
ROWS, LENGTH, VOCAB = 8, 5, 9


def padded_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(ROWS, LENGTH, VOCAB, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([5, 1, 3, 2, 4, 5, 2, 3])
    return {
        "old_logits": old,
        "logits": old + 0.6 * torch.randn(ROWS, LENGTH, VOCAB, generator=generator, dtype=torch.float64),
        "targets": torch.randint(VOCAB, (ROWS, LENGTH), generator=generator),
        "advantages": torch.randn(ROWS, 1, generator=generator, dtype=torch.float64).expand(ROWS, LENGTH),
        "response_mask": torch.arange(LENGTH) < lengths[:, None],
    }


def as_verl_calls(loss: VerlLoss, agg_mode: str, ranks: int, micro_batches: int) -> tuple[float, Tensor]:
    """The loss and gradient over logits of a mini-batch whose rows lie on ranks that average gradients: each calls the
    loss by keyword, with the counts of the whole mini-batch."""
    data = padded_batch()
    logits = data["logits"].requires_grad_()
    mask = data["response_mask"]
    counts = {"dp_size": ranks, "batch_num_tokens": int(mask.sum()), "global_batch_size": ROWS}
    config = SimpleNamespace(global_batch_info=counts | {"loss_scale_factor": None})
    total = 0.0
    for rows in torch.arange(ROWS).split(ROWS // (ranks * micro_batches)):
        of_targets = [
            torch.log_softmax(values[rows], -1).gather(2, data["targets"][rows, :, None])[..., 0]
            for values in (logits, data["old_logits"])
        ]
        value, metrics = loss(
            old_log_prob=of_targets[1],
            log_prob=of_targets[0],
            advantages=data["advantages"][rows],
            response_mask=mask[rows],
            loss_agg_mode=agg_mode,
            config=config,
            rollout_is_weights=None,
        )
        (value / ranks).backward()
        total += float(value.detach()) / ranks
        assert metrics and all(name.startswith("actor/") and isinstance(x, float) for name, x in metrics.items())
    assert logits.grad is not None
    return total, logits.grad


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 1), (1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("name", POSSIBLE)
def test_the_verl_loss_equals_the_method_over_the_global_batch(name: str, ranks: int, micro_batches: int) -> None:
    loss, definition = DEFINITIONS[name]
    got, gradient = as_verl_calls(policy_loss(loss), POSSIBLE[name], ranks, micro_batches)

    data = padded_batch()
    logits, mask = data["logits"].requires_grad_(), data["response_mask"]
    want = definition(
        Batch(
            logits=logits[mask],
            old_logits=data["old_logits"][mask],
            lagged_logits=data["old_logits"][mask],
            targets=data["targets"][mask],
            advantages=data["advantages"][mask],
            mask=torch.ones(int(mask.sum()), dtype=torch.bool),
            sequence_ids=torch.arange(ROWS)[:, None].expand(ROWS, LENGTH)[mask],
            update=torch.ones(int(mask.sum()), dtype=torch.bool),
        ),
        False,
    )
    assert got == pytest.approx(float(want.detach()), rel=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(want, logits)[0])


def test_verls_importance_weights_multiply_the_advantages() -> None:
    ones = torch.ones(2, 3)
    weights = torch.tensor([[1.0, 2.0, 0.0], [0.5, 1.0, 1.0]])
    loss = policy_loss(make_loss("grpo"))
    assert float(loss(ones, ones, ones, ones, rollout_is_weights=weights)[0]) == pytest.approx(-float(weights.mean()))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in {loss.split(",")[0] for loss in POSSIBLE}])
def test_methods_that_need_more_than_verl_provides_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} needs more than log-probs.*possible are grpo, clip_higher"):
        policy_loss(make_loss(name))
    with pytest.raises(ValueError, match="verl has correction of its own"):
        policy_loss(with_correction(make_loss("grpo"), weights="truncated"))


def test_verls_settings_must_agree_with_the_method() -> None:
    ones = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"gspo as set up is a seq-mean-token-mean: set actor\.loss_agg_mode"):
        policy_loss(make_loss("gspo"))(ones, ones, ones, ones)
    config = SimpleNamespace(global_batch_info={"dp_size": 2})
    with pytest.raises(ValueError, match=r"global_batch_info must hold the counts of the global batch"):
        policy_loss(make_loss("grpo"))(ones, ones, ones, ones, config=config)
