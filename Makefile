# Each target sets up what it needs; `make help` lists them.
.DEFAULT_GOAL := help
.PHONY: help demo serve test test-all check format bench requirements clean

BIN := .venv/bin
# Options of what a target runs, such as ARGS="--port 9000" of `chandlery serve`.
ARGS ?=
# Tests run in two processes beside each other, and those of one group (tests/conftest.py) in the same.
TOGETHER := --numprocesses 2 --dist loadgroup --no-loadscope-reorder

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## start a registry, pull an image that doesn't exist yet, and run its programs
	@scripts/setup serve
	@$(BIN)/chandlery demo

serve: ## serve images at localhost:8080 until Ctrl-C; their data is kept in .data
	@scripts/setup serve
	@CHANDLERY_DATA_DIR=$${CHANDLERY_DATA_DIR:-.data} $(BIN)/chandlery serve $(ARGS)

test: ## run the tests that a change needs, real Nix included; some minutes
	@scripts/setup develop
	@$(BIN)/pytest $(TOGETHER) -m "not slow and not end_to_end" $(ARGS)

test-all: ## run every test, those with real clients included, which need root
	@scripts/setup develop
	@$(BIN)/pytest $(TOGETHER) $(ARGS)

check: ## types, lint, format
	@scripts/setup develop
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: ## format the code
	@scripts/setup develop
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: ## measure, beside a peer
	@scripts/setup bench
	@$(BIN)/python -m benchmarks $(ARGS)

requirements: ## pin the newest versions of what pyproject.toml asks for
	@scripts/setup develop
	@$(BIN)/pip-compile --quiet --upgrade --generate-hashes --strip-extras --allow-unsafe --no-emit-index-url \
		--no-emit-find-links --no-header --extra build --output-file requirements/serve.txt pyproject.toml
	@$(BIN)/pip-compile --quiet --upgrade --generate-hashes --strip-extras --allow-unsafe --no-emit-index-url \
		--no-emit-find-links --no-header --extra build --extra dev --extra otel --constraint requirements/serve.txt \
		--output-file requirements/develop.txt pyproject.toml

clean: ## remove .venv and .data
	@[ ! -d .data ] || chmod -R u+w .data
	@rm -rf .venv .data
