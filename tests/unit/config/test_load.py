"""Files, overrides and names of runs, and the messages about problems."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_rl.config import load_config
from megatron_rl.errors import UserError

QUICKSTART = Path(__file__).parents[3] / "examples/quickstart/countdown.yaml"
MINIMAL_WITHOUT_TRAIN = """\
model: {path: model}
data: {train: train.jsonl}
rollout: {prompts_per_step: 4, samples_per_prompt: 2, max_response_tokens: 8}
reward: {name: countdown}
"""


def error_of(load, *overrides: str, **text: str) -> str:
    with pytest.raises(UserError) as caught:
        load(*overrides, **text)
    return str(caught.value)


def test_quickstart_holds_the_settings_of_the_experiment():
    config = load_config(QUICKSTART, [])
    assert (config.algorithm.name, config.algorithm.proxy_source) == ("lp_reg", "lagged")
    assert config.algorithm.lp_reg.rho == 0.05
    assert [(phase.steps, phase.lr) for phase in config.warm_start.phases] == [(900, 2e-3), (260, 8e-4)]
    assert config.actor.optimizer.lr == 3e-4
    assert config.actor.tensor_parallel == 2
    assert config.evaluation.probes["p_wait_after_no"].after == "no"


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.name=grpo"],
        ["actor.tensor_parallel=1"],
        ["actor.tensor_parallel=1", "actor.pipeline_parallel=2"],
        ["actor.tensor_parallel=1", "actor.data_parallel=2"],
    ],
)
def test_the_quickstart_accepts_these_overrides(overrides):
    load_config(QUICKSTART, overrides)


def test_overrides_apply_in_order_and_are_yaml(load):
    config = load(
        "train.steps=3", "train.steps=5", "actor.optimizer={lr: 1e-4, betas: [0.9, 0.95]}", "data.shuffle=false"
    )
    assert config.train.steps == 5
    assert config.actor.optimizer.lr == 1e-4
    assert config.actor.optimizer.betas == (0.9, 0.95)
    assert config.data.shuffle is False


def test_overrides_of_names_lists_and_unset_sections(load):
    phases = (
        "warm_start={batch_size: 2, phases: [{data: a.parquet, steps: 9, lr: 1}, {data: b.parquet, steps: 9, lr: 1}]}"
    )
    config = load("evaluation.suites.mine=mine.jsonl", phases, "warm_start.phases.1.steps=2", "prepare.task=countdown",
                  "prepare.folder=task")  # fmt: skip
    assert {name: suite.data for name, suite in config.evaluation.suites.items()} == {"mine": Path("mine.jsonl")}
    assert [phase.steps for phase in config.warm_start.phases] == [9, 2]
    assert config.prepare.folder == Path("task")


def test_null_clears_a_key(load):
    text = MINIMAL_WITHOUT_TRAIN + "train: {steps: 4, save_every: 2}\nprepare: {task: countdown, folder: x}\nactor:\n"
    config = load("train.save_every=null", "prepare=null", text=text)
    assert config.train.save_every == 0
    assert config.prepare is None
    assert config.actor.tensor_parallel == 1
    assert "train.steps is missing" in error_of(load, "train.steps=null", text=text)


@pytest.mark.parametrize("word", ["no", "off", "yes", "on", "y", "2024-01-01", "1:30", "0x1F"])
def test_words_that_yaml_1_1_would_convert_stay_text(load, word):
    config = load(f"evaluation={{suites: {{s: s.jsonl}}, probes: {{p: {{after: {word}, token: t}}}}}}")
    assert config.evaluation.probes["p"].after == word


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("1E3", 1000.0), (".5", 0.5), ("2", 2.0), ("1.e2", 100.0)])
def test_forms_of_numbers(load, text, value):
    assert load(f"actor.optimizer.lr={text}").actor.optimizer.lr == value


def test_underscores_in_whole_numbers(load):
    assert load("actor.micro_batch_tokens=16_384").actor.micro_batch_tokens == 16384


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("train.stepz=1", "train.steps"),
        ("rolout.engines=1", "rollout.engines"),
        ("lr=1", "actor.optimizer.lr"),
        ("algorithm.rho=0.1", "algorithm.lp_reg.rho"),
        ("evaluation.probes.p.aftr=no", "evaluation.probes.p.after"),
        ("warm_start.phases.0.step=1", "warm_start.phases.0.steps"),
        ("actor={optimiser: {lr: 1}}", "actor.optimizer"),
    ],
)
def test_an_unknown_override_names_the_nearest_key(load, override, suggestion):
    message = error_of(load, override)
    assert message.startswith(f"override {override}: unknown key ")
    assert message.endswith(f"did you mean {suggestion}?")


def test_a_key_below_a_plain_value(load):
    assert error_of(load, "seed.value=1").endswith("unknown key seed.value; seed takes a whole number >= 0")


def test_unknown_keys_of_the_file_are_all_listed(load):
    message = error_of(load, text=MINIMAL_WITHOUT_TRAIN + "train: {stepz: 1}\nxyzzy: 1\n")
    assert "example.yaml: unknown key train.stepz; did you mean train.steps?" in message
    assert "example.yaml: unknown key xyzzy; known here: run, seed," in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=many", "'many' (text) given; expected a whole number >= 1"),
        ("train.steps=0", "0 (a whole number) given; expected a whole number >= 1"),
        ("train.steps=1.5", "1.5 (a number) given; expected a whole number >= 1"),
        ("train.steps=true", "true (a switch) given; expected a whole number >= 1"),
        ("data.shuffle=1", "1 (a whole number) given; expected true or false"),
        ("rollout.temperature=.nan", "nan (a number) given; expected a number > 0"),
        ("actor.device=tpu", "'tpu' (text) given; expected one of auto, cpu, cuda"),
        ("algorithm.lp_reg.k3_clamp=some", "'some' (text) given; expected a number > 0 or none"),
        ("algorithm.lp_reg.rho=2", "2 (a whole number) given; expected a number > 0 and <= 1"),
        (
            "actor.optimizer.betas=[0, 0, 0]",
            "[0, 0, 0] (a list) given; expected a list of 2 entries, each a number >= 0 and < 1",
        ),
        ("model.path=7", "7 (a whole number) given; expected a path"),
        ("resume=7", "7 (a whole number) given; expected one of never, auto or a path"),
        ("rollout.stop_token_ids=3", "3 (a whole number) given; expected a list of at least one entry"),
        ("data=train.jsonl", "'train.jsonl' (text) given; expected a section with the keys train, template"),
        ("seed={a: 1}", "{'a': 1} (a section) given; expected a whole number >= 0"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_expected(load, override, expected):
    key = override.split("=")[0]
    message = error_of(load, override)
    assert message.startswith(f"override {override}: {key}: {expected}")
    assert "\n" not in message
    assert not re.search("pydantic|Input should|type=", message)


def test_several_wrong_values_are_listed_together_each_with_its_source(load):
    message = error_of(load, "train.steps=x", text=MINIMAL_WITHOUT_TRAIN + "train: {steps: 1}\nactor: {dtype: fp8}\n")
    assert message.splitlines() == [
        "example.yaml: actor.dtype: 'fp8' (text) given; expected one of float32, bfloat16",
        "override train.steps=x: train.steps: 'x' (text) given; expected a whole number >= 1",
    ]


def test_everything_missing_is_listed(load):
    message = error_of(load, text="")
    for key in ("model", "data", "rollout", "reward", "train"):
        assert f"example.yaml: {key} is missing" in message
    assert "train is missing; it needs train.steps (a whole number >= 1)" in message
    assert all(f"rollout.{key} (" in message for key in ("prompts_per_step", "samples_per_prompt"))
    assert "rollout.engine" not in message  # it has a default


@pytest.mark.parametrize("name", ["a b", "a/b", "ä"])
def test_names_that_cannot_be_part_of_a_metric_are_refused(load, name):
    assert "only letters, digits" in error_of(load, f"evaluation.suites={{{name}: x.jsonl}}")


def test_a_name_that_is_not_text_is_refused(load):
    assert "evaluation.suites.24: a name must be text" in error_of(load, "evaluation.suites={24: x.jsonl}")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps", "expected key.path=value"),
        ("=3", "expected key.path=value"),
        ("train..steps=3", "expected key.path=value"),
        ("train.steps=", "nothing after the ="),
        ("train={a: 1", "not valid YAML"),
        ("train={steps: 1, steps: 2}", "the key 'steps' appears twice"),
    ],
)
def test_a_malformed_override_is_refused(load, override, words):
    message = error_of(load, override)
    assert message.startswith(f"override {override}: ")
    assert words in message


def test_an_override_past_the_end_of_a_list(load):
    text = "warm_start={batch_size: 2, phases: [{data: a.parquet, steps: 9, lr: 1}]}"
    assert "warm_start.phases has entries 0 to 0, not 3" in error_of(load, text, "warm_start.phases.3.steps=1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {steps: 1}\ntrain: {steps: 2}\n", "line 2, column 1: the key 'train' appears twice"),
        ("train: [1\n", "not valid YAML: line 2"),
        ("- 1\n", "sections such as"),
        ("x: !!python/object:os.system {}\n", "not valid YAML"),
    ],
)
def test_a_malformed_file_is_refused(load, text, words):
    message = error_of(load, text=text)
    assert message.startswith("example.yaml: ")
    assert words in message


def test_a_missing_or_binary_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such configuration file"):
        load_config(tmp_path / "absent.yaml", [])
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load_config(tmp_path / "binary.yaml", [])


def test_run_name_and_folder_complete_each_other(load):
    fresh = load().run
    assert re.fullmatch(r"example-lp_reg-\d{8}-\d{6}", fresh.name)
    assert fresh.folder == Path("runs") / fresh.name
    assert load("run.name=x").run.folder == Path("runs/x")
    assert load("run.folder=/somewhere/y").run.name == "y"
    both = load("run.name=x", "run.folder=z").run
    assert (both.name, both.folder) == ("x", Path("z"))


def test_resume_auto_takes_the_newest_run_of_the_same_file(load):
    def name() -> str:
        return load("resume=auto").run.name

    assert not Path("runs").exists()
    assert name().startswith("example-lp_reg-2")
    for folder in ("example-20250101-000000", "example-20250301-120000", "example-latest", "other-20260101-000000"):
        Path("runs", folder).mkdir(parents=True)
    Path("runs/example-20270101-000000").touch()
    assert name() == "example-20250301-120000"
    assert load().run.name != "example-20250301-120000"
    assert load("resume=auto", "run.name=mine").run.name == "mine"


def test_the_name_of_a_run_carries_the_method_once(load, tmp_path):
    def name(*overrides: str, stem: str = "example") -> str:
        load()
        file = Path(f"{stem}.yaml")
        file.write_text(Path("example.yaml").read_text())
        return load_config(str(file), overrides).run.name[: -len("-20250101-000000")]

    assert name("algorithm.name=grpo") == "example-grpo"
    assert name("algorithm.name=dppo", "algorithm.with_lp_reg={}") == "example-dppo-with_lp_reg"
    assert name("algorithm.name=mylab.loss:Squared") == "example-Squared"
    assert name(stem="lp_reg_paper_on") == "lp_reg_paper_on"
    assert name("algorithm.name=up", stem="setup") == "setup-up"


def test_resume_auto_takes_the_newest_run_of_the_method(load):
    for folder in ("example-grpo-20250301-120000", "example-lp_reg-20250201-000000", "example-20250101-000000"):
        Path("runs", folder).mkdir(parents=True)
    assert load("resume=auto").run.name == "example-lp_reg-20250201-000000"
    assert load("resume=auto", "algorithm.name=grpo").run.name == "example-grpo-20250301-120000"
    assert load("resume=auto", "algorithm.name=gspo").run.name == "example-20250101-000000"  # of an earlier version


def test_resume_takes_words_or_a_path(load):
    assert load().resume == "never"
    assert load("resume=auto").resume == "auto"
    assert load("resume=runs/a/checkpoints/step_5").resume == Path("runs/a/checkpoints/step_5")


def test_a_suite_is_a_path_or_a_section(load):
    config = load(
        "evaluation.suites={a: a.jsonl, b: {data: b.parquet, temperature: 0.0}}",
        "evaluation.suites.b.samples_per_prompt=16",
        "evaluation.temperature=0.6",
    )
    a, b = (config.evaluation.suites[name].over(config.evaluation) for name in "ab")
    assert (a.data, a.samples_per_prompt, a.temperature) == (Path("a.jsonl"), 8, 0.6)
    assert (b.data, b.samples_per_prompt, b.temperature) == (Path("b.parquet"), 16, 0.0)
    assert "unknown key evaluation.suites.a.temprature; did you mean evaluation.suites.a.temperature?" in error_of(
        load, "evaluation.suites={a: {data: a.jsonl, temprature: 1.0}}"
    )
    assert "evaluation.suites.a.data is missing" in error_of(load, "evaluation.suites={a: {temperature: 1.0}}")
    assert "evaluation.suites.a: 5 (a whole number) given; expected a section" in error_of(
        load, "evaluation.suites={a: 5}"
    )
