# The commands of this project; `make` alone lists them.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
JOBS ?= 2
TORCH ?= 1
CONFIG ?= tiny
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help system setup setup-test setup-study setup-synth train-step resnet18 nightly bench synth fgmp-study \
    check test formal gates verilog lint waves clean setup-fpga fpga setup-integration integration soc energy

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  Variables: CONFIG=tiny|edge|paper, PYTHON=python3.11, JOBS=2, TORCH=0 (no PyTorch for the tests), and'
	@echo '  WIDTH, IMAGE, BATCH, STEPS, SEED, DATA for train-step,'
	@echo '  BLOCK, DEVICE, PACKAGE, SPEED, FREQUENCY, SEED, PACK_ONLY=1 for fpga (CONFIG=edge),'
	@echo '  SET=full|small, BATCH, ONLY, JSON, REPORT, REPORT_ONLY=1, BASELINE, UPDATE=1 for bench (CONFIG=paper, of small tiny),'
	@echo '  LIBERTY, ONLY, JSON, REPORT for synth, ONLY for formal, LIBERTY for gates,'
	@echo '  WIDTH, IMAGE, BATCH, SEED, DATA, RESULTS, SCHEDULER for resnet18,'
	@echo '  LIBERTY, NM, WIDTH, IMAGE, BATCH, DATA, JSON, REPORT for energy (CONFIG=paper),'
	@echo '  WIDTH, IMAGE, BATCH, EPOCHS, RATE, DATA, RESULTS, SCHEDULER for fgmp-study'

# Programs that pip cannot install.
system:
	@missing=(); \
	for program in g++ perl; do command -v $$program > /dev/null || missing+=($$program); done; \
	if ! command -v $(PYTHON) > /dev/null; then missing+=(python3 python3-venv); \
	elif ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	    echo 'LNPU needs Python 3.11 or newer, $(PYTHON) is' "$$($(PYTHON) --version)": 'set PYTHON=' >&2; exit 1; \
	elif ! $(PYTHON) -c 'import ensurepip, venv' 2> /dev/null; then missing+=(python3-venv); fi; \
	if (($${#missing[@]})); then \
	    echo "missing: run \`apt-get install $${missing[*]}\` (or your system's equivalent)" >&2; exit 1; \
	fi

setup: system $(VENV)/.setup ## Make .venv with everything that train-step needs
setup-test: system $(VENV)/.setup-test ## Add what the tests need
setup-integration: setup $(VENV)/.setup-integration ## Add PeakRDL and FuseSoC: for integration, soc, and some tests
setup-study: setup $(VENV)/.setup-study ## Add PyTorch and Dask: for resnet18, fgmp-study, and some tests
setup-fpga: setup $(VENV)/.setup-fpga ## Add Yosys and nextpnr: for fpga
setup-synth: setup $(VENV)/.setup-synth ## Add Yosys: for synth and energy

$(BIN)/python:
	@echo 'making $(VENV)'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.setup: pyproject.toml | system $(BIN)/python
	@echo 'installing LNPU and what it needs into $(VENV)'
	@$(PIP) --editable .
	@touch $@

$(VENV)/.setup-test: pyproject.toml $(VENV)/.setup
	@echo 'installing the test tools into $(VENV)'
	@$(PIP) --editable '.[test]'
	@$(BIN)/python -c 'import find_libpython, sys; sys.exit(not find_libpython.find_libpython())' || \
	    { echo "cocotb needs Python's shared library: run \`apt-get install libpython3-dev\`" >&2; exit 1; }
	@touch $@

EXTRAS := integration study synth fpga
$(EXTRAS:%=$(VENV)/.setup-%): $(VENV)/.setup-%: pyproject.toml $(VENV)/.setup
	@echo 'installing what `setup-$*` adds into $(VENV)'
	@$(PIP) --editable '.[$*]'
	@touch $@

option = $(if $($(1)),--$(2) '$($(1))')

train-step: setup ## Run training steps on the simulated chip and check them bit for bit
	@$(BIN)/lnpu train-step $(call option,CONFIG,config) $(call option,WIDTH,width) $(call option,IMAGE,image) \
	    $(call option,BATCH,batch) $(call option,STEPS,steps) $(call option,SEED,seed) $(call option,DATA,data)

# CONFIG is tiny for the other targets; here its default is the command's: paper, tiny for the small set.
bench: setup ## Measure cycles of single operations against the peak, compare with benchmarks/baseline.json
	@$(BIN)/lnpu bench $(if $(filter-out file,$(origin CONFIG)),$(call option,CONFIG,config)) $(call option,SET,set) \
	    $(call option,BATCH,batch) $(call option,ONLY,only) $(call option,JSON,json) $(call option,REPORT,report) \
	    $(call option,BASELINE,baseline) $(if $(UPDATE),--update-baseline) $(if $(REPORT_ONLY),--report-only)

energy: setup-synth ## Energy of events in gates, and of a training step with FGMP and without
	@$(BIN)/lnpu energy $(if $(filter-out file,$(origin CONFIG)),$(call option,CONFIG,config)) \
	    $(call option,LIBERTY,liberty) $(call option,NM,nm) $(call option,WIDTH,width) $(call option,IMAGE,image) \
	    $(call option,BATCH,batch) $(call option,DATA,data) $(call option,JSON,json) $(call option,REPORT,report)

# The configuration is `paper` unless it was asked for another one.
resnet18 nightly: CONFIG := $(if $(filter file,$(origin CONFIG)),paper,$(CONFIG))

resnet18: setup-study ## Run every operation of a full-size ResNet-18 step on `paper`, bit for bit
	@$(BIN)/lnpu replay $(call option,CONFIG,config) $(call option,WIDTH,width) $(call option,IMAGE,image) \
	    $(call option,BATCH,batch) $(call option,SEED,seed) $(call option,DATA,data) \
	    $(call option,RESULTS,results) $(call option,SCHEDULER,scheduler) --json build/reports/resnet18.json

nightly: setup-study ## Run an operation of each layer shape of ResNet-18 for 224x224 images, likewise
	@$(BIN)/lnpu replay $(call option,CONFIG,config) --image 224 --stem imagenet --acc-bits 100 --batch 1 --distinct \
	    $(call option,SEED,seed) $(call option,DATA,data) \
	    $(call option,RESULTS,results) $(call option,SCHEDULER,scheduler) --json build/reports/nightly.json

synth: setup-synth ## Area and critical paths of CONFIG in a cell library (osu018, or LIBERTY=), by block
	@$(BIN)/lnpu synth $(call option,CONFIG,config) $(call option,LIBERTY,liberty) $(call option,ONLY,only) \
	    $(call option,JSON,json) $(call option,REPORT,report)

fgmp-study: setup-study ## Train a network in FP32, FP16, FP8 and FGMP and compare accuracy and size
	@$(BIN)/lnpu fgmp-study $(call option,DATA,data) $(call option,WIDTH,width) $(call option,IMAGE,image) \
	    $(call option,BATCH,batch) $(call option,EPOCHS,epochs) $(call option,RATE,rate) \
	    $(call option,RESULTS,results) $(call option,SCHEDULER,scheduler)

# The configuration is `edge` unless it was asked for another one.
fpga: CONFIG := $(if $(filter file,$(origin CONFIG)),edge,$(CONFIG))

fpga: setup-fpga ## Synthesise, place and route `edge` for an ECP5-85k: utilisation and clock
	@$(BIN)/lnpu fpga $(call option,CONFIG,config) $(call option,BLOCK,block) $(call option,DEVICE,device) $(call option,PACKAGE,package) \
	    $(call option,SPEED,speed) $(call option,FREQUENCY,frequency) $(call option,SEED,seed) \
	    $(if $(PACK_ONLY),--pack-only)

check: setup-test
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet || { $(BIN)/ruff format --check; exit 1; }
	@$(BIN)/mypy --no-error-summary
	@echo 'ruff and mypy: passed'

# Without PyTorch and Dask the tests that need them are skipped.
test: setup-test setup-integration setup-fpga ## Run ruff, mypy and all tests
	@if [[ '$(TORCH)' != 0 ]]; then $(MAKE) setup-study || echo 'no PyTorch: the tests with it are skipped'; fi
	@$(MAKE) check
	@$(BIN)/python -m pytest -v -n $(JOBS) --no-header $(if $(TEST),'$(TEST)')

formal: setup-test ## Prove properties of the blocks with Yosys' SAT engine: all, or ONLY='NAME ...'
	@$(BIN)/python -m verif.formal $(ONLY)

gates: setup-test ## Run the testbenches of PE, encoder and decoder on their netlists in LIBERTY (default: osu018)
	@GATES=1 $(if $(LIBERTY),LIBERTY='$(LIBERTY)') $(BIN)/python -m pytest -v --no-header verif/tests/test_gate_level.py

verilog: setup ## Write the Verilog of CONFIG to rtl/CONFIG
	@$(BIN)/python -m lnpu.verilog '$(CONFIG)'

integration: setup-integration ## Write the Verilog of CONFIG with the C header and the HTML of its registers
	@$(BIN)/lnpu integration $(call option,CONFIG,config)

soc: setup-integration ## Run training steps from a C program on the example system, bit for bit
	@$(BIN)/lnpu soc $(call option,CONFIG,config) $(call option,BATCH,batch) $(call option,STEPS,steps) $(call option,SEED,seed)

lint: check ## Run ruff, mypy, Verilator's lint and Yosys' checks on CONFIG
	@$(BIN)/python -m lnpu.verilog '$(CONFIG)' --directory 'build/lint/$(CONFIG)' --lint

waves: setup-test ## Run one test with waveforms: make waves TEST=verif/tests/test_pe.py
	@[[ -n '$(TEST)' ]] || { echo 'usage: make waves TEST=verif/tests/test_x.py[::test_y]' >&2; exit 1; }
	@mkdir -p build && touch build/.waves
	@status=0; WAVES=1 $(BIN)/python -m pytest -v --no-header '$(TEST)' || status=$$?; \
	files=$$(find build \( -name '*.vcd' -o -name '*.fst' \) -newer build/.waves); \
	if [[ -n "$$files" ]]; then printf 'waveforms, for GTKWave or Surfer:\n%s\n' "$$files"; \
	else echo 'this test wrote no waveforms'; fi; \
	exit $$status

clean: ## Remove what was built (.venv stays)
	@rm -rf build .pytest_cache .mypy_cache .ruff_cache
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
