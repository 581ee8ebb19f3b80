# Two commands to know: `make demo` and `make test`. Both set .venv up first; PYTHON=... chooses the interpreter.
.DEFAULT_GOAL := help
.PHONY: help demo test lint bench mutants validate coverage-published lock clean
BIN := .venv/bin

help:
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 28

.venv/ready: requirements.lock pyproject.toml tools/setup
	@PYTHON="$(PYTHON)" tools/setup

demo: .venv/ready ## forecast the article's two profiles, write out/report.html
	@$(BIN)/python tools/demo.py

test: .venv/ready lint ## lint, types, import rules, then all tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/ready ## ruff, mypy --strict and import-linter
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-timings | tail -n 3

bench: .venv/ready ## speed of the simulator beside its goals, about two minutes
	@$(BIN)/python tools/bench_sim.py

mutants: .venv/ready ## plant off-by-ones in the simulator; every one must be caught
	@$(BIN)/python tools/mutants.py

lock: .venv/ready ## write requirements.lock anew, at the newest versions pyproject.toml allows
	@$(BIN)/uv pip compile pyproject.toml --quiet --group dev --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" --upgrade -o requirements.lock

clean: ## remove .venv and everything written
	rm -rf .venv out .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
