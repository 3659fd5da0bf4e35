# `make demo` and `make test` are all a newcomer needs; each makes .venv when it is missing or stale.
PY := .venv/bin/python
# Huge pages for malloc (glibc): XLA takes its temporaries anew each step, and small pages cost a third of the demo.
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1
IS_NEW := -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
FIND_PYTHON = for p in python3.12 python3 python3.13 python3.14; do \
	if $$p $(IS_NEW); then echo $$p; exit 0; fi; done; \
	echo "no Python >= 3.12 found (tried python3.12, python3, python3.13, python3.14): install one, run make again" >&2; \
	exit 1

.PHONY: demo test check test-long test-times lint docs clean
.DELETE_ON_ERROR:

.venv/core: requirements.txt pyproject.toml
	@{ $(PY) $(IS_NEW) && $(PY) -m pip --version >/dev/null 2>&1; } || { python=$$($(FIND_PYTHON)) && rm -rf .venv && \
	$$python -m venv .venv || { rm -rf .venv; exit 1; }; }
	@echo "installing the core into .venv (about a minute)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(PY) -m pip install --quiet --disable-pip-version-check -e '.[grammar]'
	@touch $@

.venv/test: .venv/core
	@echo "installing the [test] extra into .venv (PyTorch is large: a few minutes)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@# The TPU compiler, for compiling ahead of time; kept off the import path, where JAX would look for a TPU at each start.
	@libtpu=$$($(PY) -c "from importlib.metadata import requires; \
	print(next(r.split(';')[0] for r in requires('jax') if r.startswith('libtpu')))") && \
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/libtpu "$$libtpu" || \
	echo "no libtpu for this machine: tests that compile for TPU will be skipped" >&2
	@touch $@

demo: .venv/core
	@$(PY) experiments/demo.py

# Files go to two workers in the order of tests/conftest.py, the heaviest first. A test that hangs fails after 900 s;
# a worker that crashes ends the run, because xdist would wait for ever for the rest of its file.
TWO := -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 --timeout 900

test: .venv/test
	@$(PY) -m pytest $(TWO) -m "not long"

check: lint
	@$(PY) -m pytest $(TWO) -m "core or not (slow or long)"

# At LLVM's level of optimisation that users have; `test` compiles more quickly (tests/compiled.py).
test-long: .venv/test
	@XLA_FLAGS=--xla_backend_optimization_level=3 $(PY) -m pytest -s -m long

# What each file takes with an empty cache of programs: the order of `test`, and the table of docs/measurements/suite.md.
test-times: .venv/test
	@rm -rf .venv/times .venv/programs
	@JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.venv/programs $(PY) -m pytest $(TWO) -m "not long" --times .venv/times
	@$(PY) tests/timing.py .venv/times

lint: .venv/test
	@$(PY) -m ruff check .
	@$(PY) -m pyrefly check
	@.venv/bin/lint-imports --no-cache

.venv/docs: .venv/core
	@echo "installing the [docs] extra into .venv"
	@$(PY) -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	@touch $@

docs: .venv/docs
	@JAX_PLATFORMS=cpu $(PY) -m sphinx -W --keep-going --quiet -b html docs build/docs
	@echo "the site: build/docs/index.html"

clean:
	rm -rf .venv
