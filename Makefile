# Everything a newcomer needs: `make serve` and `make test`. Both set up what they use.
# They take the newest vLLM that we support and this Python allows; `VLLM=0.26.0 make test` takes
# another, in an environment of its own.
PYTHON ?= python3
VLLM ?=
VENV ?= .venv$(addprefix -,$(VLLM))
PIP = $(VENV)/bin/python -m pip
SUPPORTED = $(shell sed -n 's/^vllm = \["vllm\(.*\)"\]$$/\1/p' pyproject.toml)
# The tests of Ray run with the one vLLM that it is installed for; with others they are skipped.
RAY = $(if $(filter 0.26.0,$(VLLM)),$(comma)ray-vllm-0-26)
comma = ,
MODEL ?= models/tiny
KV_COMPRESS ?= ratio=8
# CUDA kernels take minutes to compile: by default only where a GPU is.
export KVCOMPRESS_BUILD ?= $(if $(shell command -v nvidia-smi),auto,$(if $(shell command -v c++),cpu,none))
HOST ?= 127.0.0.1
PORT ?= 8000

# Of wheels for others: compiled for all GPUs where nvcc is, whether or not this machine has one.
WHEEL_KERNELS ?= $(if $(shell command -v nvcc),cuda,cpu)
DIST ?= dist

.PHONY: vllm install serve test engine releases wheel distributions check docs format clean

# vLLM brings its own torch, so it comes first; our extension is then built against that torch.
$(VENV)/.vllm: pyproject.toml
	@$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info[:2] <= (3, 13), "Python 3.10 to 3.13 is needed; set PYTHON="'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "Cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@command -v c++ >/dev/null || echo "No C++ compiler: the PyTorch references will run. On Debian and Ubuntu: apt install g++"
	$(PIP) install --quiet --upgrade pip "setuptools>=77,<82" wheel ninja
	$(PIP) install --quiet --upgrade "vllm$(if $(VLLM),==$(VLLM),$(SUPPORTED))"
	@touch $@

$(VENV)/.installed: $(VENV)/.vllm setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*)
	$(PIP) install --quiet --no-build-isolation --editable ".[test,langchain$(RAY)]"
	@touch $@

# The part of `make install` that takes longest and touches nothing in this folder but $(VENV).
vllm: $(VENV)/.vllm

install: $(VENV)/.installed

serve: install
	VLLM_WORKER_MULTIPROC_METHOD=fork $(VENV)/bin/vllm serve $(MODEL) --kv-compress $(KV_COMPRESS) --served-model-name $(notdir $(MODEL)) \
		--host $(HOST) --port $(PORT) --enforce-eager $(ARGS)

# `make test ARGS="tests/ops -k select"` runs a part of them, `make test WORKERS=2` two files at a time.
WORKERS ?=
test: install
	$(VENV)/bin/python -m pytest $(if $(WORKERS),-n $(WORKERS)) $(ARGS)

# Does compression work with this vLLM? A minute; `make test` is thorough.
engine: install
	$(VENV)/bin/python -m tests.releases.engine
	$(VENV)/bin/python -m pytest tests/integration/test_hooks.py

# The same with every release that we support: needs 30 GB and an hour. `RELEASES="0.27.1 0.30.0"`.
releases: install
	$(VENV)/bin/python -m tests.releases.run $(RELEASES)

# dist/ gets the source distribution and a wheel that runs on other machines (docs/install.md).
wheel: install
	$(MAKE) distributions

# What `make wheel` does once its tools are there. auditwheel finds out on which systems it runs.
distributions:
	rm -rf build/lib* build/bdist* $(DIST)
	KVCOMPRESS_BUILD=$(WHEEL_KERNELS) $(VENV)/bin/python -m build --no-isolation --sdist --wheel --outdir $(DIST)/here .
	PATH="$(abspath $(VENV))/bin:$$PATH" $(VENV)/bin/python -m auditwheel repair --plat auto \
		--exclude "libtorch*" --exclude "libc10*" --wheel-dir $(DIST) $(DIST)/here/*.whl
	mv $(DIST)/here/*.tar.gz $(DIST)
	rm -r $(DIST)/here
	@ls -l $(DIST)

check: install
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# docs/ as a site in site/; fails on a broken link. Needs no vLLM.
docs:
	@test -x .venv-docs/bin/mkdocs || { $(PYTHON) -m venv .venv-docs && \
		.venv-docs/bin/python -m pip install --quiet "mkdocs-material>=9.6,<10"; }
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet --strict --config-file .ci/mkdocs.yml

format: install
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/clang-format -i $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

clean:
	rm -rf .venv .venv-* .releases build dist site *.egg-info kvcompress_vllm/*.so
