# `make demo` and `make test` need Python 3.11 or newer and nothing else: each makes .venv and installs what it needs.
BIN := .venv/bin
RUN := demo-village

.PHONY: help demo test lint types imports size tests soak table table-quant bench bench-peers clean

help: ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /	/' | expand -t 14

.venv/.run: pyproject.toml constraints.txt scripts/setup.sh $(wildcard native/*.?pp) native/CMakeLists.txt
	@scripts/setup.sh run

.venv/.dev: .venv/.run
	@scripts/setup.sh dev

demo: .venv/.run ## fine-tune the default model on the sample data, and compare it with its base
	@if [ -d runs/$(RUN)/checkpoints ] && [ ! -d runs/$(RUN)/adapter ]; then \
		set -x; $(BIN)/deltaw train --resume $(RUN); \
	else \
		set -x; rm -rf runs/$(RUN); \
		$(BIN)/deltaw train examples/village/train.jsonl --config examples/village/train.yaml --name $(RUN); \
	fi
	$(BIN)/deltaw eval $(RUN) examples/village/val.jsonl --metrics facts --compare 5 --max-new-tokens 40
	@echo "Talk to it: $(BIN)/deltaw chat $(RUN)"

test: .venv/.dev lint types imports size tests ## everything that must hold at each commit

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.dev
	$(BIN)/mypy

imports: .venv/.dev
	$(BIN)/lint-imports --no-logo

size: .venv/.dev
	$(BIN)/python scripts/size.py

tests: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --cov --cov-report=term

soak: .venv/.dev ## half an hour of everything at once on the server (MINUTES=30); two minutes of it are in make test
	DELTAW_SOAK_MINUTES=$(or $(MINUTES),30) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s tests/web/test_soak.py

table: .venv/.dev ## every technique for a minute, three seeds: docs/results.md
	$(BIN)/python benchmarks/table.py

table-quant: .venv/.dev ## every format and technique of a packed base: docs/results.md
	$(BIN)/python benchmarks/formats.py

bench: .venv/.dev .venv-peers/.peers ## speed and memory beside the peers', JSON and pictures in runs/: docs/performance.md
	for question in speed rows drift step growth techniques roofline; do \
		$(BIN)/python benchmarks/$$question.py --out $(or $(OUT),runs) || exit 1; \
	done

.venv-peers/.peers: pyproject.toml constraints.txt scripts/setup.sh
	@scripts/setup.sh peers

bench-peers: .venv-peers/.peers ## install what the benchmarks measure deltaw beside

clean: ## remove what was installed and built
	rm -rf .venv .venv-peers build dist *.egg-info
