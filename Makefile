.DEFAULT_GOAL := help
# Python 3.11 where it is there. Another is named, as in `make test PYTHON=python3.12`, and has an environment of its own.
ifdef PYTHON
VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
else
PYTHON := $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
VENV := .venv
endif
PYTHON311 ?= python3.11
BIN := $(VENV)/bin
# One test at a time to whoever is free.
PARALLEL := -n auto --maxschedchunk 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help
help: ## Show this help
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.demo: pyproject.toml hatch_build.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "FleetFed needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

.PHONY: demo
demo: $(VENV)/.demo ## Run a whole fleet on this machine; ARGS="--devices 20 --tiers 2" scales it
	$(BIN)/fleetfed demo $(ARGS)

.PHONY: dev
dev: $(VENV)/.dev ## Set up .venv for work on the code

.PHONY: test
test: $(VENV)/.dev ## Run the default tests
	$(BIN)/python -m pytest $(PARALLEL)

.PHONY: brokers
brokers: ## Unpack RabbitMQ and NATS, which slow tests need, into .brokers; SUITE=trixie for newer ones
	tests/brokers/install.sh $(if $(SUITE),--suite $(SUITE))

.PHONY: test-all
test-all: $(VENV)/.dev ## Run the default, the slow and the container tests
	$(BIN)/python -m pytest $(PARALLEL) -m "not tensorflow and not docker and not emulated"
	$(MAKE) test-docker

# In one process: they share one engine, one set of images and one fleet.
.PHONY: test-docker
test-docker: $(VENV)/.dev ## Run the container tests, which skip where there is no engine
	$(BIN)/python -m pytest -m docker -rs

ARM ?= arm64 armhf

.PHONY: arm
arm: ## Make a Debian for arm64 and one for armhf in .arm, with a device and a gateway (Debian, root)
	for arch in $(ARM); do PYTHON=$(PYTHON) tests/arm/install.sh $$arch || exit; done

.PHONY: test-arm
test-arm: export FLEETFED_PATIENCE ?= 900
test-arm: $(VENV)/.dev ## Run a device and a gateway in there, emulated, in a fleet that is not
	$(BIN)/python -m pytest -m emulated -rs tests/arm

.venv-tf/.ready: pyproject.toml hatch_build.py
	$(PYTHON) -m venv .venv-tf
	.venv-tf/bin/python -m pip install --quiet --editable '.[dev,model]'
	@touch $@

# tflite-runtime has no wheel for a newer Python than 3.11 and needs NumPy 1.
.venv-tflite/.ready: pyproject.toml hatch_build.py
	$(PYTHON311) -m venv .venv-tflite
	.venv-tflite/bin/python -m pip install --quiet --editable . 'numpy<2' 'tflite-runtime==2.14.*' \
		'hypothesis>=6.100' 'pytest>=8.3' 'pytest-asyncio>=0.25' 'pytest-timeout>=2.3'
	@touch $@

.PHONY: test-models
test-models: export FLEETFED_MODEL_CASES := $(CURDIR)/runs/model-cases
test-models: .venv-tf/.ready .venv-tflite/.ready ## Prove the model builder against TensorFlow, on both TFLite runtimes
	rm -rf runs/model-cases
	.venv-tf/bin/python -m pytest -m tensorflow tests/cloud_coordinator/builder
	PYTHONPATH=tests/support .venv-tflite/bin/python -m pytest --noconftest tests/cloud_coordinator/test_zoo.py \
		tests/shared/model/test_card.py tests/shared/model/test_cases.py tests/shared/model/test_interpreter.py \
		tests/shared/model/test_table.py

.PHONY: lint
lint: $(VENV)/.dev ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: types
types: $(VENV)/.dev ## Check types
	$(BIN)/mypy

.PHONY: clean
clean: ## Remove environments and caches
	rm -rf .venv* .hatch .mypy_cache .pytest_cache .ruff_cache .hypothesis dist build
