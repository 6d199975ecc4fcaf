# `make help` lists the targets. Everything is installed into .venv; nothing outside this folder is touched.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY := 1
# Modules are compiled as they are first imported: most never are, and to compile all of them was 34 of 85 s of installing.
# Where Python is told to keep no such files, every import would compile anew: there pip does it.
PIP := --quiet --disable-pip-version-check $(if $(PYTHONDONTWRITEBYTECODE),,--no-compile)

.PHONY: help install demo test test-kill test-rounding test-slurm gpu gpu-wheels lint site unlock clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

install: .venv/.installed ## install into .venv, and nothing else

demo: .venv/.installed ## install, run the whole pipeline on the embedded model, hold its numbers against the expected ones
	$(BIN)/snakemake --configfile config/demo.yaml
	@echo "report: $(CURDIR)/results/demo/report.html"
	-$(BIN)/python -m oacore verify config/demo.yaml

test: .venv/.installed-dev ## install and run all tests, two files at a time
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-kill: .venv/.installed-dev ## kill every long stage four times, at random moments
	HF_HUB_OFFLINE=1 OA_KILLS=4 $(BIN)/python -m pytest tests/workflow/test_kill.py

unlock: ## after a killed run: CONFIG=my-model.yaml; refused while that run, or a job of it, is alive
	$(BIN)/snakemake --unlock --configfile $(or $(CONFIG),config/demo.yaml)

test-slurm: .venv/.installed-slurm ## bring up a SLURM of two nodes on this machine and run a pipeline on it (as root, on Debian)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/slurm

test-rounding: .venv/.installed-dev ## the numeric tests and the tiny run as other CPUs round, with two threads; SELECT="..." for some of it
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/rounding --numprocesses 2 -k "$(SELECT)"

gpu: ## right, and how fast, on a GPU: PYTHON has torch and triton; the rest is there, or in .gpu-wheels; writes docs/gpu/
	if [ -d .gpu-wheels ]; then $(PYTHON) -m pip install $(PIP) --no-index --no-deps --upgrade --target .gpu-wheels/site .gpu-wheels/*.whl; fi
	PYTHONPATH=$(CURDIR)/.gpu-wheels/site $(PYTHON) tests/bench/gpu_report.py

# What a machine with PyTorch's own image lacks. Not all that transformer_lens names: what it imports.
WHEELS := transformer-lens|datasets|dill|multiprocess|pydantic|pydantic_core|annotated-types|typing_extensions|typing-inspection|h5py|safetensors

gpu-wheels: .venv/.installed ## what `make gpu` needs on a machine without network (Python 3.12, x86-64), into .gpu-wheels: take the folder along
	rm -rf .gpu-wheels && mkdir .gpu-wheels
	$(BIN)/pip freeze --exclude-editable | grep -E '^($(WHEELS))==' > .gpu-wheels/names.txt
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
		$(addprefix --platform=,manylinux_2_28_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64) \
		--requirement .gpu-wheels/names.txt --dest .gpu-wheels
	du -sh .gpu-wheels

lint: .venv/.installed-dev ## format check, lint, types, workflow lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check Snakefile workflow/rules
	$(BIN)/snakemake --lint

site: .venv/.installed-dev ## the documentation as a web site, .site/html
	rm -rf .site && mkdir -p .site/pages
	git ls-files -z README.md CHANGELOG.md config docs kernels/README.md | xargs -0 cp --parents -t .site/pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build # not --quiet, with which strict sees no warnings

clean: ## remove what was installed, cached and computed here
	rm -rf .venv .site cache results .snakemake *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(PIP) --constraint constraints.txt --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/pip install $(PIP) --constraint constraints.txt --editable '.[dev]'
	@touch $@

.venv/.installed-slurm: .venv/.installed-dev
	$(BIN)/pip install $(PIP) --constraint constraints.txt --editable '.[slurm]'
	@touch $@
