# Two commands to know: `make demo` and `make test`. Both set .venv up first; PYTHON=... chooses the interpreter.
.DEFAULT_GOAL := help
.PHONY: help demo test lint bench mutants validate ablation recovery client advice calibration real-vllm plan-coverage picture lock clean
BIN := .venv/bin

help:
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

.venv/ready: requirements.lock pyproject.toml tools/setup
	@PYTHON="$(PYTHON)" tools/setup

demo: .venv/ready ## forecast the article's two profiles, write out/report.html
	@$(BIN)/python tools/demo.py

test: .venv/ready lint ## lint, types, import rules, then all tests
	OPENBLAS_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/ready ## ruff, mypy --strict and import-linter
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-logo

bench: .venv/ready ## print the speeds: the simulator, the load generator, the stand-in
	@for program in tools/bench_*.py; do $(BIN)/python $$program || exit; done

mutants: .venv/ready ## plant off-by-ones in batcher and replica; every one must be caught
	@$(BIN)/python tools/mutants.py

validate: .venv/ready ## hold forecasts against the measured runs in data/ and fits against known truths, or RUNS=FOLDER against FIT=FOLDER
ifdef RUNS
	@$(BIN)/python tools/validate.py --fit $(FIT) --runs $(RUNS)
else
	@failed=0; for program in check_fit check_bands validate check_irreducible; do $(BIN)/python tools/$$program.py || failed=1; done; exit $$failed
endif

ablation: .venv/ready ## remove one mechanism of the statistical model after the other: which pay? (FIT=FOLDER RUNS=FOLDER: on those)
	@$(BIN)/python tools/ablation.py $(if $(RUNS),--fit $(FIT) --runs $(RUNS))

recovery: .venv/ready ## calibrate made-up articles, and measure what is assumed: is the truth in the band as often as it should be?
	@failed=0; for program in check_takeoff_readings check_network_latency check_published check_fit_check; do $(BIN)/python tools/$$program.py || failed=1; done; exit $$failed

client: .venv/ready ## keep the load generator from its core: does what it sees of the stand-in shift the fitted step times?
	@$(BIN)/python tools/check_client.py

advice: .venv/ready ## follow the advice on what to measure next on the stand-in; is it better than chance?
	@$(BIN)/python tools/check_advice.py

calibration: .venv/ready ## fit the article's figures anew, for the shipped scenarios
	@$(BIN)/servecast calibrate llama2-70b -o scenarios/shipped/data/llama2-70b.calibration.json

real-vllm: .venv/ready ## the whole loop on a real vLLM on this CPU (minutes, several GB); VLLM_ENV=FOLDER if it is installed
	@$(BIN)/python tools/real_vllm.py

plan-coverage: .venv/ready ## plan for simulated truths: does a plan keep what it promises?
	@$(BIN)/python tools/plan_coverage.py

picture: .venv/ready ## draw the pictures of the README and docs anew
	@$(BIN)/python tools/picture.py && $(BIN)/python tools/picture_chunking.py

lock: .venv/ready ## write requirements.lock anew, at the newest versions pyproject.toml allows
	@$(BIN)/uv pip compile pyproject.toml --quiet --group dev --universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
		--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" --upgrade -o requirements.lock

clean: ## remove .venv and everything written
	rm -rf .venv out .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
