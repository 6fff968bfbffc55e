# The whole vocabulary of this repository; README, .ci/run and buildspec.yml call nothing else.
SHELL := /bin/bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PORT ?= 8080
ARGS ?=
KIND ?= cpu
READY := .venv/.ready
RUN := .venv/bin/python

.PHONY: help setup serve fmt check test test-soak test-models test-server test-gpu bench bench-gpu docs \
        image-cpu image-cuda image-rocm test-image smoke-image

help: ## This list
	@grep -hE '^[a-z -]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(READY) ## Make .venv ready (PYTHON=, TORCH=cpu|cuda|rocm overrule what is found)

$(READY): $(wildcard container/requirements-*.txt) pyproject.toml \
          serving/layers/cpu_kernels.c scripts/setup_env.sh scripts/install_torch.sh
	@scripts/setup_env.sh
	@touch $@

serve: setup ## Serve on 127.0.0.1 (PORT=8080, ARGS="--model-id DIRECTORY ...")
	@exec $(RUN) -m serving --hostname 127.0.0.1 --port $(PORT) $(ARGS)

fmt: setup ## Format, and mend what can be mended
	@$(RUN) -m ruff format
	@$(RUN) -m ruff check --fix

check: setup ## Lint, format, types, import contracts, generated pages, locks
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check
	@$(RUN) -m mypy
	@.venv/bin/lint-imports
	@$(RUN) -m scripts.write_docs --check
	@$(RUN) -m scripts.lock_requirements --check

# Torch's threads must not spin while they wait: tests and the servers they start share the cores.
test test-soak test-models test-server test-gpu: export OMP_WAIT_POLICY ?= passive
# So must those of a server on somebody's desk: beside a browser, spinning makes tokens stutter (docs/operating.md).
serve: export OMP_WAIT_POLICY ?= passive

test: setup ## Every test that this machine can run (ARGS="-k name" narrows)
	@$(RUN) -m pytest $(ARGS)

test-soak: setup ## The long tests, at full scale
	@WEIR_TEST_SCALE=10 $(RUN) -m pytest -m soak --timeout 7200 $(ARGS)

test-models: setup ## Every architecture against transformers, at full scale (ARGS="-k gemma2")
	@WEIR_TEST_SCALE=10 $(RUN) -m pytest -m models $(ARGS)

test-server: setup ## Only the tests that start real servers
	@$(RUN) -m pytest -m server $(ARGS)

test-gpu: setup ## Only the tests that need a GPU
	@if $(RUN) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(RUN) -m pytest -m gpu $(ARGS); else echo "no GPU found: skipped"; fi

bench: setup ## Benchmarks of runner, engine and server on this machine, one after the other
	@$(RUN) -m scripts.bench_step
	@$(RUN) -m scripts.bench_engine
	@$(RUN) -m scripts.bench_server

bench-gpu: setup ## Benchmark of the runner on a GPU, over shapes of 1B and 8B parameters
	@if $(RUN) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(RUN) -m scripts.bench_step --device cuda --shape 1b $(ARGS) && \
	     $(RUN) -m scripts.bench_step --device cuda --shape 8b $(ARGS); \
	else echo "no GPU found: skipped"; fi

docs: setup ## Write the generated pages anew
	@$(RUN) -m scripts.write_docs

image-cpu image-cuda image-rocm: image-%: ## Build weir:cpu, weir:cuda or weir:rocm, and weigh it (BUILD_ARGS=, REPORT_ARGS=)
	@REPORT_ARGS="$(REPORT_ARGS)" scripts/build_image.sh $* $(BUILD_ARGS)

test-image: setup ## Build an image, run it as SageMaker does, ask it, stop it (KIND=cpu, MODEL=DIRECTORY, ARGS="...")
	@REPORT_ARGS="$(REPORT_ARGS)" $(RUN) -m scripts.docker_local --image weir:$(KIND) --build \
	  $(if $(MODEL),--model $(MODEL)) $(ARGS) -- $(BUILD_ARGS)

smoke-image: setup ## The same with the image that is there already
	@$(RUN) -m scripts.docker_local --image weir:$(KIND) --backend engine $(if $(MODEL),--model $(MODEL)) $(ARGS)
