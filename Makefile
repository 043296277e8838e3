# Two commands do everything: `make reproduce` and `make test`. `make` alone lists the rest.
PYTHON ?= python3
UV ?= $(shell command -v uv 2>/dev/null)
BIN := .venv/bin
LOCK := requirements.lock

# A processor without AVX-512 and bf16, as most laptops have, on one that has them.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 DNNL_MAX_CPU_ISA=AVX2 \
	MKL_ENABLE_INSTRUCTIONS=AVX2
NUMERICAL := $(patsubst %,tests/%.py,core/test_batches core/test_checkpoint core/test_device \
	core/test_evaluate core/test_layers core/test_loss core/test_model core/test_optim \
	core/test_schedule core/test_train core/test_updates audit/test_accounting audit/test_audit \
	audit/test_causality audit/test_checks audit/test_compare audit/test_sampled cached/test_memory cached/test_step exits/test_decode exits/test_exits exits/test_gate \
	exits/test_perloop exits/test_trace hf/test_baselines bench/test_benchstep bench/test_quantize \
	core/test_recipe_options runs/test_runs)

# What is installed is compiled when it is first imported, and then kept.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup reproduce results test test-time test-clients test-avx2 test-colab faults soak smoke lab docs front lock clean python

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/notebooks.installed ## make .venv, install the pinned versions (by uv if there is one)

reproduce: setup ## run every notebook with the quick profile, print the results (6 minutes on two slow cores, the installation apart)
	$(BIN)/crt reproduce --profile quick --jobs 2

results: setup ## list what of results/ is missing or stale, and make it (hours; goes on)
	$(BIN)/crt results

smoke: setup ## the same with the smoke profile: does it all run? (a minute or two)
	$(BIN)/crt reproduce --profile smoke --jobs 2

test: .venv/notebooks,test.installed ## ruff, the house plan, types, then pytest and the committed notebooks (nbval)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile \
		--nbval-lax --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg \
		tests notebooks

test-time: .venv/notebooks,test.installed ## how long that takes, for crt doctor: results/tests.csv
	$(BIN)/python tests/time_tests.py

test-clients: .venv/notebooks,test,clients,onnx,trackers.installed ## with PEFT, TRL, minicons, ONNX, TensorBoard, trackio, W&B, jupytext
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/hf tests/core/test_trackers.py \
		tests/book/test_elsewhere.py

test-avx2: .venv/notebooks,test.installed ## the numerical tests as on a processor with AVX2 only
	$(AVX2) OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile \
		$(NUMERICAL)

test-colab: python ## every notebook with Colab's versions and crt_lib from a wheel (7 minutes)
	$(PYTHON) -m venv --clear .venv-colab
	rm -rf dist
	.venv-colab/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	.venv-colab/bin/python -m pip install --quiet -r tests/colab.txt
	.venv-colab/bin/python tests/run_as_colab.py --set-up
	.venv-colab/bin/python -m pip install --quiet --force-reinstall --no-deps dist/*.whl
	.venv-colab/bin/python -m pip install --quiet dist/*.whl
	.venv-colab/bin/python -m pip check
	.venv-colab/bin/python tests/run_as_colab.py
	.venv-colab/bin/python -m pip install --quiet pytest hypothesis
	.venv-colab/bin/python -P -m pytest -q tests/hf/test_hf.py tests/hf/test_hf_generate.py

faults: .venv/notebooks,test.installed ## kill, damage and lie to every command: tests/faults/README.md (20 minutes on two slow cores)
	$(BIN)/python tests/faults/page.py

soak: .venv/notebooks,test.installed ## two hours of generation and a long training: is memory flat? (3 hours)
	$(BIN)/python tests/faults/page.py --soak 2

lab: .venv/notebooks,lab.installed ## open the notebooks in Jupyter Lab
	$(BIN)/jupyter lab notebooks

docs: .venv/notebooks,docs.installed ## the API, the pages and the notebooks as HTML in site/, links checked
	$(BIN)/python docs/make_site.py site

front: setup ## write version and address of pyproject.toml wherever else they stand
	$(BIN)/python docs/make_front.py

# `make reproduce` installs the extra notebooks, `make test` also test: .venv/EXTRAS.installed.
# An unfinished installation starts again from an empty .venv: nothing half-written stays.
.venv/%.installed: pyproject.toml $(LOCK) | python
	@if [ -e .venv/unfinished ] || [ ! -x $(BIN)/python ]; then \
		$(PYTHON) -m venv --clear .venv; fi
	@touch .venv/unfinished
	@$(WATCH) $(INSTALL) -c $(LOCK) -e '.[$*]'
	@rm .venv/unfinished && touch $@

# uv takes the build of torch that fits: without a GPU not the gigabytes of CUDA.
ifneq ($(UV),)
export UV_TORCH_BACKEND ?= auto
INSTALL = $(UV) pip install --python $(BIN)/python
else
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --no-compile
endif

# While the command after it runs: what is in .venv. On a terminal only where that has changed.
WATCH = (cd .venv/lib/python*/site-packages; t=0; before=; \
	while sleep 5 >/dev/null 2>&1 && kill -0 $$$$ 2>/dev/null; do \
		t=$$((t + 5)); now="$$(ls -d *.dist-info | wc -l) packages"; \
		if [ ! -t 1 ] || [ "$$now" != "$$before" ]; then \
			echo "  $$t s: $$now installed, the last $$(basename $$(ls -td *.dist-info | head -n 1) .dist-info)"; fi; \
		before=$$now; done) & trap "kill $$!" EXIT;

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 5))' 2>/dev/null || { \
		echo "Python 3.11.5 or newer is needed; $(PYTHON) is $$($(PYTHON) -V 2>&1)." \
		"Name another one: make setup PYTHON=python3.12" >&2; exit 1; }

# Left out of the lock, because they differ between platforms: torch's companions for a GPU, and
# local version suffixes such as +cpu. What torch asks for on a platform still resolves.
lock: python ## pin the newest versions anew in requirements.lock
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install --quiet 'torch==2.13.0' \
		-e '.[notebooks,test,lab,clients,onnx,trackers]'
	@{ echo "# The versions everything was tested with, for pip's -c: pip install -c $(LOCK) -e ."; \
	   echo "# Made by 'make lock' ($$(.venv-lock/bin/python -V)); do not edit."; \
	   .venv-lock/bin/python -m pip freeze --all --exclude-editable \
	   | sed -E -e 's/\+[[:alnum:].]+$$//' -e '/^(pip|triton|nvidia-|cuda-)/d' -e '/ @ /d'; \
	 } > $(LOCK).new
	@mv $(LOCK).new $(LOCK)
	@rm -r .venv-lock

clean: ## remove site/, results/quick, results/smoke and the tree's caches (.venv and other results stay)
	rm -rf site results/quick results/smoke .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path ./.venv -prune -o \
		\( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +
