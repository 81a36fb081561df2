# Two commands to know: `make quickstart` and `make test`. Both install what they need in .venv.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check -q install -c constraints.txt
# One thread per process: trials and tests run side by side, one on each core.
export OMP_NUM_THREADS ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: quickstart test check docs study chaos bench asan clean

quickstart: .venv/installed
	@if [ -f results/quickstart/experiment.yaml ]; then $(BIN)/sgrl resume results/quickstart; \
	else $(BIN)/sgrl sweep tune_configs/quickstart.yaml; fi

test: .venv/installed-for-tests check
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

check: .venv/installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

# The documentation site, in build/site; it needs no network.
docs: .venv/installed-for-tests
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# The studies behind the published figures: hours on two cores.
study: .venv/installed-for-tests
	$(BIN)/python -m pytest -m slow -s --ignore=tests/test_chaos.py

# Sweeps under a random killer on a cluster of three nodes, ten kills of the driver, 500 trials, and
# how busy the slots are: half an hour on two cores, a report at the end.
chaos: .venv/installed-for-tests
	$(BIN)/python -m pytest -m slow -q -s tests/test_chaos.py

# The compiled core under the address sanitizer, which also watches the gaps between its arrays.
asan: .venv/installed-for-tests
	LD_PRELOAD=$$($${CXX:-g++} -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \
	SGRL_CXXFLAGS="-fsanitize=address -g" $(BIN)/python -m pytest -q -s -p no:cacheprovider \
	tests/test_golden_recurrent.py tests/test_golden_feedforward.py tests/test_feedforward.py \
	tests/test_native.py -k "native and not fallback and not compiling"

bench: .venv/installed
	$(BIN)/sgrl bench
	$(BIN)/python benchmarks/speedup.py
	$(BIN)/python benchmarks/backends.py
	$(BIN)/python benchmarks/rllib_overhead.py
	$(BIN)/python benchmarks/mnist.py
	$(BIN)/python benchmarks/expert_network.py
	$(BIN)/python benchmarks/report.py

clean:
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "sgrl needs Python 3.11 or newer; say which with make PYTHON=..."; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	@echo "Installing sgrl in .venv (the first time this takes some minutes)"
	@$(PIP) -e .
	@touch $@

.venv/installed-for-tests: .venv/installed
	@$(PIP) -e ".[test]"
	@touch $@
