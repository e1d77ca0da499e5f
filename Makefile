# make test, make demo: each sets up .venv by itself (once) and runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: test demo bench lint format stubs clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $(STAMP)

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

demo: $(STAMP)
	$(BIN)/peftfx demo $(ARGS)

bench: $(STAMP)
	$(BIN)/python benchmarks/core.py
	$(BIN)/python -m benchmarks.zoo
	$(BIN)/python benchmarks/large.py
	$(BIN)/python benchmarks/coda.py
	$(BIN)/python -m benchmarks.compile
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/additive.py
	$(BIN)/python -m benchmarks.combine
	$(BIN)/python -m benchmarks.faults

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

stubs: $(STAMP)
	$(BIN)/python -m peftfx.stubs

clean:
	rm -rf $(VENV) build dist *.egg-info
