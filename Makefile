# Everything starts here, in a virtual environment of its own (.venv), made when it is first needed.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint native bench wheel clean

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CODE := compiler passes plugins training
TESTED := $(CODE) tests examples benchmarks
NATIVE := $(wildcard plugins/*/*.h plugins/*/*.cpp)
ARGS ?=
BENCH ?= ffsplit

# The build backend runs in an environment of its own; pip before 25.3 pins it by the first, later ones by the second.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/demo.stamp  ## Compile MiniLM, check it and time it against its dense self
	$(PY) examples/demo/demo.py $(ARGS)

test: $(VENV)/dev.stamp  ## Run the tests (ARGS="-k workload" passes options to pytest)
	$(PY) -m pytest $(ARGS)

lint: $(VENV)/dev.stamp $(CODE:%=build/mypy/trimtab/%)  ## Check style, format and types, and the Dockerfile
	$(PY) -m ruff check $(TESTED)
	$(PY) -m ruff format --check $(TESTED)
	$(PY) -m mypy
	if [ -x $(VENV)/bin/hadolint ]; then $(VENV)/bin/hadolint Dockerfile; fi

native: $(VENV)/dev.stamp  ## Compile the native kernels into plugins/, where they are found before the installed ones
	cmake -S . -B build/native -DCMAKE_BUILD_TYPE=Release
	cmake --build build/native
	cp build/native/trimtab_ops.* plugins/

bench: $(VENV)/dev.stamp  ## Run benchmarks/$(BENCH).py (BENCH=ffsplit ARGS=--json)
	$(PY) benchmarks/$(BENCH).py $(ARGS)

wheel: $(VENV)/dev.stamp  ## Build the wheel into dist/, and see that it works when installed
	rm -rf dist build/wheel
	$(PY) -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(PY) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --no-deps dist/trimtab-*.whl
	# The dependencies are those of .venv: its site-packages follow those of the new environment, where trimtab is found first.
	$(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > "$$(build/wheel/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/dependencies.pth"
	cd build && wheel/bin/python -c "import trimtab.compiler, trimtab.passes, trimtab.plugins, trimtab.training"
	cd build && wheel/bin/trimtab --help > /dev/null && wheel/bin/trimtab passes

clean:  ## Remove what these commands made
	rm -rf $(VENV) build dist plugins/trimtab_ops.* demo-build .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/demo.stamp: pyproject.toml constraints.txt CMakeLists.txt $(NATIVE) | $(PY)
	$(PY) -m pip install --quiet --editable ".[demo]"
	touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt CMakeLists.txt $(NATIVE) | $(PY)
	$(PY) -m pip install --quiet --editable ".[dev]"
	touch $@ $(VENV)/demo.stamp

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "trimtab needs Python 3.10 or later: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# mypy does not see that the folder passes/ is the package trimtab.passes; these links tell it.
build/mypy/trimtab/%:
	mkdir -p $(@D)
	ln -sfn $(CURDIR)/$* $@
