# Two habits: `make serve` and `make test`. Both make the virtual environment first, from nothing but Python and pip.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
PACKAGES := $(addprefix -p leyden.,server engine models kernels configs benchmarks.load)
# Where PyTorch publishes builds without CUDA: smaller by gigabytes, and preferred where there is no GPU.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_SOURCE := $(if $(shell command -v nvidia-smi),,--retries 0 --timeout 10 --extra-index-url $(TORCH_CPU_INDEX))
TORCH := PyTorch $(if $(shell command -v nvidia-smi),with CUDA (about 3 GB),without CUDA (about 0.2 GB))
PIP := $(PYTHON) -m pip --python $(BIN)/python --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: help install serve test test-all clients lint format bench clean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/' | expand -t 12

install: $(BIN)/.installed  ## make the virtual environment

$(BIN)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Leyden needs Python 3.11 or newer; make PYTHON=python3.11")'
	$(PYTHON) -m venv --without-pip $(VENV)
	@echo "Downloading $(TORCH) into $(VENV): some minutes without a word"
	@$(PIP) $(TORCH_SOURCE) torch pip
	@echo "Downloading what else Leyden and its tests need (about 0.3 GB)"
	@$(PIP) -e '.[dev]'
	@echo "Installed: 'source $(BIN)/activate' puts leyden on the PATH"
	@touch $@

serve: install  ## serve the embedded model (ARGS="..." for anything `leyden serve` takes)
	@exec $(BIN)/leyden serve $(ARGS)

test: install  ## the test suite, about 16 minutes on two cores (ARGS="..." for pytest)
	$(BIN)/pytest $(ARGS)

test-all: install  ## with the slow ones
	$(BIN)/pytest -m '' $(ARGS)

clients:  ## an environment with clients that others wrote, for `pytest -m slow tests/clients`
	$(PYTHON) -m venv --without-pip .venv-clients
	@echo "Downloading the clients and what they need, $(TORCH) among it, into .venv-clients"
	@$(PYTHON) -m pip --python .venv-clients/bin/python --disable-pip-version-check install --quiet $(TORCH_SOURCE) \
		torch transformers accelerate 'lm-eval[api]' langchain-openai 'litellm!=1.82.7,!=1.82.8' instructor guidellm
	-npm install --silent --prefix .venv-clients openai

lint: install  ## ruff, format check, types, layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p $(VENV)/checkout && ln -sfn $(CURDIR) $(VENV)/checkout/leyden
	MYPYPATH=$(VENV)/checkout $(BIN)/mypy $(PACKAGES)  # by the package's name: a folder may have any
	$(BIN)/pytest -q tests/test_layering.py

format: install  ## rewrite the sources as ruff likes them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## measure a served model on this machine
	$(BIN)/leyden bench $(or $(ARGS),http)

clean:  ## remove what was made
	rm -rf $(VENV) .venv-clients build dist profile *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
