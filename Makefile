# Two commands to know: `make quickstart` and `make test`. Both install what they need in .venv.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check -q install -c constraints.txt
# One thread per process: trials and tests run side by side, one on each core.
export OMP_NUM_THREADS ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: quickstart test check docs tutorials study chaos thousands bench asan dist test-dist clean

quickstart: .venv/installed
	@$(BIN)/python examples/quickstart.py

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

# Run the notebooks, a few minutes; the site then shows what came out of them.
tutorials: $(patsubst docs/%,build/%,$(wildcard docs/tutorials/*.ipynb))

build/tutorials/%.ipynb: docs/tutorials/%.ipynb .venv/installed-for-tests
	rm -rf build/tutorials/$* && mkdir -p build/tutorials/$* && cp $< build/tutorials/$*
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/jupyter-execute --inplace build/tutorials/$*/$*.ipynb
	mv build/tutorials/$*/$*.ipynb $@

# The studies behind the published figures: hours on two cores.
study: .venv/installed-for-tests
	$(BIN)/python -m pytest -m slow -s --ignore=tests/test_chaos.py --ignore=tests/test_thousands.py --ignore=tests/test_wheel.py

# Sweeps under a random killer on a cluster of three nodes, ten kills of the driver, 500 trials, and
# how busy the slots are: half an hour on two cores, a report at the end.
chaos: .venv/installed-for-tests
	$(BIN)/python -m pytest -m slow -q -s tests/test_chaos.py

# Ten thousand trials, and fifty nodes that come and go, with a report at the end: half an hour or so
# on two cores and 16 GB that have nothing else to do. SGRL_TRIALS and SGRL_NODES make it smaller.
thousands: .venv/installed-for-tests
	$(BIN)/python -m pytest -m slow -q -s tests/test_thousands.py

# The compiled core under the address sanitizer, which also watches the gaps between its arrays. It
# finds how to throw, as torch does where a test wants an error, in a C++ library that is there first.
asan: .venv/installed-for-tests
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 SGRL_CXXFLAGS="-fsanitize=address -g" $(BIN)/python -m pytest -q -s -p no:cacheprovider \
	tests/test_golden_recurrent.py tests/test_golden_feedforward.py tests/test_feedforward.py \
	tests/test_native.py tests/test_native_rnn.py -k "native and not fallback and not compiling"

# dist/: an sdist, and of it a wheel for this machine and for each of the others that there is a
# cross compiler for (as Debian names them). The same bytes again from the same commit and compiler.
WHEELS := x86_64 aarch64
dist: .venv/installed-for-tests
	rm -rf dist
	@export SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct); set -e; umask 022; \
	$(BIN)/python setup.py -q sdist; \
	for machine in $(WHEELS); do \
	if [ $$machine = $$(uname -m) ] || command -v $$machine-linux-gnu-g++ >/dev/null; then \
	SGRL_WHEEL=$$machine $(BIN)/pip -q wheel --no-deps --no-build-isolation --no-index -w dist dist/*.tar.gz; \
	else echo "no wheel for $$machine: there is no $$machine-linux-gnu-g++"; fi; done; ls dist

# Builds them anew, installs the wheel in a fresh environment and trains there without a compiler.
test-dist: .venv/installed-for-tests
	$(BIN)/python -m pytest -m slow -q tests/test_wheel.py

bench: .venv/installed
	$(BIN)/sgrl bench
	$(BIN)/python benchmarks/speedup.py
	$(BIN)/python benchmarks/backends.py
	$(BIN)/python benchmarks/core_builds.py
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
