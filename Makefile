PYTHON ?= python3
EXTRAS ?= cpu,dev
MODEL ?=
CALM ?=
CONFIG ?= deployments/configs/cpu-demo.yaml
PYTEST_ARGS ?=

BIN := .venv/bin
MODEL_OPTION := $(if $(MODEL),--model $(MODEL))

.DEFAULT_GOAL := help
.PHONY: help install demo serve test search lint types tables clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install:  ## make .venv and install everything into it (the targets below do it too)
	@$(PYTHON) scripts/install.py --extras $(EXTRAS)

demo: install  ## two CPU replicas flip between FP16 and FP8 under a burst (MODEL=id or folder, CALM=1)
	@$(BIN)/nestedfp demo --config $(CONFIG) $(MODEL_OPTION) $(if $(CALM),--calm)

serve: install  ## keep the OpenAI-compatible endpoint up until interrupted (MODEL=, CONFIG=)
	@$(BIN)/nestedfp serve --config $(CONFIG) $(MODEL_OPTION)

test: install  ## run the tests (PYTEST_ARGS="-k format")
	@$(BIN)/python -m nestedfp.models >/dev/null
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

search: install  ## look for counterexamples to the property tests, with new examples every time
	@$(BIN)/python -m pytest --hypothesis-profile search --no-header -q \
	    $$(grep -rlE 'import .*(given|RuleBasedStateMachine)' tests) $(PYTEST_ARGS)

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory types

# mypy sees the tree as it is installed: the top-level folders inside the package `nestedfp`.
types:
	@rm -rf build/types && mkdir -p build/types/nestedfp
	@ln -s $(CURDIR)/nestedfp/* build/types/nestedfp/
	@for part in kernels policies deployments loadtests; do ln -s $(CURDIR)/$$part build/types/nestedfp/$$part; done
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml \
	    -p nestedfp.policies -m nestedfp.format -m nestedfp.weight -m nestedfp.linear -m nestedfp.precision \
	    -m nestedfp.models -m nestedfp.cli -p nestedfp.vllm -p nestedfp.deployments -p nestedfp.loadtests

tables: install  ## write the tables of the README and docs/, and the plots, from bench/data
	@$(BIN)/python bench/tables.py
	@$(BIN)/python bench/roofline.py

clean:  ## remove what the targets made, except .venv and the model cache
	rm -rf build out .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
