"""The recipes load, fit their GPUs, have the published settings, and give clean batch scripts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_rl.cli import main
from megatron_rl.cluster.slurm import write_script
from megatron_rl.config import Config, load_config
from megatron_rl.plan.assumptions import Assumptions
from megatron_rl.plan.plan import Plan
from megatron_rl.plan.setup import Setup
from megatron_rl.utils.hardware import GPUS
from tests.unit.plan.conftest import MODELS

ROOT = Path(__file__).parents[3]
RECIPES = sorted(
    path.relative_to(ROOT) for path in (ROOT / "examples/recipes").glob("*/*.yaml") if path.name != "base.yaml"
)
ON = {"lp_reg_reference_on", "lp_reg_paper_on", "grpo_on", "entropy_bonus_on", "high_entropy_on"}
METHODS_OFF = ("lp_reg_reference", "lp_reg_paper", "grpo", "gspo", "clip_higher", "kl_cov", "high_entropy")
OFF = {f"{name}_off" for name in METHODS_OFF}


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def read(recipe: Path) -> Config:
    model = "Qwen3-14B-Base" if "14b" in str(recipe) else "Qwen2.5-32B"
    return load_config(recipe, [f"model.path={MODELS / model}"])


def test_every_run_of_the_papers_table_has_a_recipe() -> None:
    for model in ("qwen3-14b", "qwen2.5-32b"):
        names = {recipe.stem for recipe in RECIPES if recipe.parent.name == model}
        assert names >= ON | OFF
    assert {read(recipe).cluster.nodes for recipe in RECIPES} == {4, 8}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_fits_with_room_to_spare_and_uses_every_gpu(recipe: Path) -> None:
    config = read(recipe)
    limit = config.rollout.max_response_tokens
    for mean in (limit / 3, 0.7 * limit):
        plan = Plan(Setup.of(config, GPUS["h100"], Assumptions(mean_prompt=200, mean_response=mean)))
        assert plan.problems == []
        assert max(rank.peak for rank in plan.actor) < 0.9 * plan.setup.gpu.memory
        assert not any("not used" in remark for remark in plan.remarks)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_dry_run_and_plan_find_nothing_wrong(
    recipe: Path, inputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs `train --dry-run` and `plan` as on a login node, with a model folder without weights."""
    model = MODELS / ("Qwen3-14B-Base" if "14b" in str(recipe) else "Qwen2.5-32B")
    shutil.copy(model / "config.json", inputs[0].removeprefix("model.path="))
    assert main(["train", str(recipe), "--dry-run", *inputs]) == 0
    output = capsys.readouterr()
    assert "nothing wrong found" in output.err and "\\boxed{}" in output.err
    assert (
        "# not checked: weights: " in output.err and "Assistant: Let me solve this step by step.\n<think>" in output.err
    )
    assert main(["plan", str(recipe), "--json", *inputs]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides with files: a tokenizer of bytes, a few rows of DAPO-Math-17k, and rows of AIME for every suite."""
    folder = tmp_path_factory.mktemp("inputs")
    inner = Tokenizer(
        models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="!").save_pretrained(folder / "model")
    published = ROOT / "tests/fixtures/published"
    suites = ("aime24", "aime25", "math500", "minerva", "olympiadbench")
    given = [f"evaluation.suites.{name}.data={published / 'aime_2024_verl.parquet'}" for name in suites]
    return [f"model.path={folder / 'model'}", f"data.train={published / 'dapo.parquet'}", *given]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_has_the_published_settings(recipe: Path) -> None:
    config = read(recipe)
    rollout, optimizer, train = config.rollout, config.actor.optimizer, config.train
    assert (rollout.prompts_per_step, rollout.samples_per_prompt, rollout.max_response_tokens) == (256, 8, 8192)
    assert (config.data.max_prompt_tokens, config.data.long_prompts) == (2048, "truncate_left")
    assert rollout.temperature == 1.0
    assert (config.data.template, config.reward.name, config.actor.dtype) == ("zero", "math", "bfloat16")
    assert (optimizer.betas, config.evaluation.every) == ((0.9, 0.999), 8)
    assert train.keep_best and train.keep_best.metric == "eval/macro_mean/avg"
    assert (optimizer.lr, optimizer.weight_decay, optimizer.clip_grad, optimizer.schedule) == (1e-6, 0, 1.0, "constant")
    assert train.updates_per_rollout == (8 if "_off" in recipe.stem else 1)
    assert train.steps == (1005 if "14b" in str(recipe) else 800)
    assert config.algorithm.reference_kl.coefficient == 0 and config.algorithm.overlong.buffer_tokens == 0
    assert recipe.stem.startswith(config.algorithm.name)
    if config.algorithm.name == "lp_reg":
        assert config.algorithm.lp_reg.rho == (0.01 if "14b" in str(recipe) else 0.005)
        assert config.algorithm.preset in recipe.stem
        # The preset `reference` selects within a micro-batch, so that the published size matters.
        assert (config.actor.micro_batch_tokens == 30720) == (config.algorithm.preset == "reference")
    if config.algorithm.name == "kl_cov":
        assert config.algorithm.kl_cov.share == 2e-3


def test_shellcheck_finds_nothing_in_the_batch_script_of_any_recipe(tmp_path: Path) -> None:
    scripts = [
        write_script(recipe, [], output=tmp_path / f"{recipe.parent.name}-{recipe.stem}.sbatch", seeds=None)
        for recipe in RECIPES
    ]
    done = subprocess.run([Path(sys.executable).with_name("shellcheck"), *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
