# One command each: `make run` serves, `make test` tests. Everything else is here too.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Exact versions for everything that is installed, build tools included.
PIP := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet

.DEFAULT_GOAL := help
.PHONY: help run test test-slow test-faults convert evaluate test-gpu check format proto bench settings attention-page demo demo-detector demo-segmenter screenshots image-test

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 15

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.runtime

run: $(VENV)/.runtime ## install what is needed and serve the demo models
	@exec $(BIN)/dat-serve

test: $(VENV)/.dev ## install what is needed and run the tests, but for those of the next two
	$(BIN)/python -m pytest -m 'not slow and not faults' --numprocesses 2 --dist loadfile

test-slow: $(VENV)/.dev ## run the tests that take long and break rarely
	$(BIN)/python -m pytest -m slow --timeout 900 --numprocesses 2 --dist loadfile

test-faults: $(VENV)/.dev ## [SOAK=seconds] [CROWD=seconds]: kills, crowds, storms and a soak, which take minutes
	$(BIN)/python -m pytest -m faults -rP --timeout 600 --numprocesses 0 \
		--soak-seconds $(or $(SOAK),60) --crowd-seconds $(or $(CROWD),30)

convert: $(VENV)/.runtime ## CHECKPOINT=… OUT=….safetensors [OPTIONS=…]: one file with all that is known of a model
	@$(BIN)/dat-serve convert --checkpoint '$(CHECKPOINT)' --out '$(OUT)' $(OPTIONS)

evaluate: $(VENV)/.runtime ## DATA=… [OPTIONS=…]: accuracy on a folder with one subfolder for each class
	@$(BIN)/dat-serve evaluate --data '$(DATA)' $(OPTIONS)

test-gpu: $(VENV)/.dev ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

check: $(VENV)/.dev ## lint, types, generated files up to date
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(MAKE) --no-print-directory proto settings attention-page
	git diff --exit-code -- service/pb docs/settings.md service/playground/page/docs/attention.html
	shellcheck .ci/run bench/*.sh deploy/*.sh

format: $(VENV)/.dev ## format and fix the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

proto: $(VENV)/.dev ## regenerate the gRPC stubs
	$(BIN)/python -m grpc_tools.protoc -Iservice/pb=proto/dat/v1 -Iservice/pb=proto/inference \
		--python_out=. --pyi_out=. --grpc_python_out=. service/pb/dat.proto service/pb/inference.proto

settings: $(VENV)/.dev ## regenerate the table of settings in docs/settings.md
	$(BIN)/python -m service.settings.table docs/settings.md

attention-page: $(VENV)/.dev ## regenerate the page that servers have of docs/attention.md
	$(BIN)/python -m deploy.attention_page

bench: $(VENV)/.dev ## measure the engine, the server, detectors and segmenters, results in bench/results
	$(BIN)/python -m bench.engine
	$(BIN)/python -m bench.growth
	$(BIN)/python -m bench.server
	$(BIN)/python -m bench.detector
	$(BIN)/python -m bench.segmenter

demo: $(VENV)/.dev ## train the demo classifier anew and measure it
	$(BIN)/python -m demo.train
	$(BIN)/python -m demo.evaluate

demo-detector: $(VENV)/.dev ## train the demo detector anew, from the demo classifier, and measure it
	$(BIN)/python -m demo.detection.train
	$(BIN)/python -m demo.detection.evaluate

demo-segmenter: $(VENV)/.dev ## train the demo segmenter anew, from the demo detector
	$(BIN)/python -m demo.segmentation.train

screenshots: $(VENV)/.dev ## take the pictures of the playground in the README anew
	$(BIN)/python -m tests.browser.screenshots

image-test: ## [DEVICE=cuda]: build the container image and run it, without a Docker engine
	bash deploy/image_test.sh $(DEVICE)
