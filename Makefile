# make demo   install into .venv and take the digit 3 out of a model of handwritten digits
# make test   the test suite (at most 10 minutes on 2 cores)
# make check  make test, the full matrix and all mutations, style, types and an installed wheel (at most 30 minutes)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check style wheel clean

demo: $(VENV)/demo
	$(BIN)/diffsteer remove digits --concept 3

test: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not full"

check: $(VENV)/dev style
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
	$(MAKE) wheel

style: $(VENV)/dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

# Build a wheel, install it outside the checkout, and run the main job from there.
wheel: $(VENV)/dev
	rm -rf build/wheel && $(BIN)/python -m build --quiet --wheel --no-isolation --outdir build/wheel
	rm -rf build/outside && $(PYTHON) -m venv build/outside
	build/outside/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt build/wheel/*.whl
	cd build/outside && bin/diffsteer remove digits --concept 3 --samples 32 --steps 10 --out out
	test -s build/outside/out/report.html

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable .
	touch $@

$(VENV)/dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build out
