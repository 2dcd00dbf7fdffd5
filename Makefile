# The targets share one virtual environment, but for test-oldest; each installs what it needs first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
OLDEST := .venv-oldest
# What a version of torch or Triton breaks first; TESTS=tests runs all.
TESTS  := tests/ops tests/distributed/test_torchrun.py tests/cohort/test_engines.py tests/learner/test_step.py \
	tests/kernels/test_launch_device.py 'tests/kernels/test_interpreted.py::test_interpreted[test_ops_fusion_step]' \
	tests/run/test_recipe_to_step.py tests/student/test_export.py::test_each_format_gives_the_students_logits
# A file's tests stay together, since what a file builds or trains is built once, and files go in their
# order: xdist's own leaves long files of few tests for the end, where other workers wait.
PYTEST := -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

.PHONY: install demo test test-oldest proofs test-faults bare bench lint docs clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	-$(BIN)/python -m fastokd.ops
	touch $@

demo: install
	$(BIN)/python -m fastokd.demo $(DEMO_FLAGS)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The tests are small, and two threads each would be in the other's way.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m "not proof" tests

# With the oldest torch and Triton that are allowed; of the proofs that kernels compile one of each kind.
test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(PYTEST) -m "not proof" $(TESTS)
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(PYTEST) -m proof \
		-k "sm_90 and ((S3 or S4) and (C1000 or D128) or (64x8x8 or 112x112) and bf16)" tests/proofs

$(OLDEST)/.installed: pyproject.toml constraints.txt constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -v '^torch' constraints.txt | cat - constraints-oldest.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check -c $(OLDEST)/constraints.txt -e '.[test]'
	-$(OLDEST)/bin/python -m fastokd.ops
	touch $@

# PROOFS="sm_90 or gfx942" chooses by name.
proofs: install
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m proof -k "$(PROOFS)" tests

# The site, in build/docs; a warning is an error.
docs: install
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "the site is in build/docs/index.html"

# README's commands and the proofs on a bare machine: no git, no HOME, no caches, no network after the
# install. BARE="--bind /a/mirror proofs" shows it a folder and names targets.
bare:
	$(PYTHON) tests/bare.py $(BARE)

# Three hundred kills, each resumed: minutes to an hour.
test-faults: install
	$(BIN)/python -m tests.faults.kill --kills 300

# Each prints its own table; a quiet machine gives the better figures.
bench: install
	mkdir -p build
	$(BIN)/python -m pytest -q -o addopts= -o python_files='bench_step.py' \
		--benchmark-columns=median,iqr,rounds --benchmark-json=build/steps.json bench
	for claim in $(filter-out bench_step,$(basename $(notdir $(wildcard bench/bench_*.py)))); do \
		$(BIN)/python -m bench.$$claim || exit 1; done

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info
