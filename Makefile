# Each target makes its own environment: nothing but Python 3.10 or newer is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart test test-baselines test-lowest lint format bench clean

quickstart: $(VENV)/installed  ## train and compare losses on generated data, in under 5 minutes on 2 cores
	HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		recipes/sft_msl.py --output_dir outputs/quickstart

test: $(VENV)/installed $(VENV)/deepspeed test-baselines  ## the whole suite, offline
	HF_HUB_OFFLINE=1 CI=1 $(BIN)/pytest -n 2 --dist loadfile

test-baselines: $(VENV)-baselines/installed  ## tests of baselines and distillation: RecTools needs older NumPy and pandas than the rest
	HF_HUB_OFFLINE=1 CI=1 $(VENV)-baselines/bin/pytest tests/test_baselines.py tests/test_distill.py

test-lowest:  ## the whole suite with the oldest versions that pyproject.toml admits
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed  ## speed and memory beside the references, into outputs/bench
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/run.py

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) torch
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev]"
	touch $@

$(VENV)/deepspeed: $(VENV)/installed  # ZeRO-3 is tested on two CPU processes
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable ".[deepspeed]"
	touch $@

$(VENV)-baselines/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)-baselines
	$(VENV)-baselines/bin/pip install --quiet --constraint $(CONSTRAINTS) torch
	$(VENV)-baselines/bin/pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev,baselines]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-baselines .venv-lowest .venv-lowest-baselines outputs build *.egg-info .pytest_cache .ruff_cache .hypothesis
