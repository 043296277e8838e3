# Two commands do everything: `make reproduce` and `make test`. `make` alone lists the rest.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
LOCK := requirements.lock

.DEFAULT_GOAL := help
.PHONY: help setup reproduce test test-colab smoke lab lock clean python

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install the pinned versions (instant when done already)

reproduce: setup ## run every notebook with the quick profile, print the results (10 minutes)
	$(BIN)/crt reproduce --profile quick

smoke: setup ## the same with the smoke profile: does it all run? (a minute or two)
	$(BIN)/crt reproduce --profile smoke

test: setup ## ruff, then pytest and the committed notebooks (nbval)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile \
		--nbval-lax --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg \
		tests notebooks

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
	.venv-colab/bin/python -P -m pytest -q tests/test_hf.py tests/test_hf_generate.py

lab: setup ## open the notebooks in Jupyter Lab
	$(BIN)/jupyter lab notebooks

# An unfinished install has no stamp and starts from an empty .venv: nothing half-written stays.
$(STAMP): pyproject.toml $(LOCK) | python
	@if [ -e $@ ]; then rm $@; else $(PYTHON) -m venv --clear .venv; fi
	$(BIN)/python -m pip install --disable-pip-version-check -c $(LOCK) -e '.[notebooks,test]'
	@touch $@

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 5))' 2>/dev/null || { \
		echo "Python 3.11.5 or newer is needed; $(PYTHON) is $$($(PYTHON) -V 2>&1)." \
		"Name another one: make setup PYTHON=python3.12" >&2; exit 1; }

# Left out of the lock, because they differ between platforms: torch's companions for a GPU, and
# local version suffixes such as +cpu. What torch asks for on a platform still resolves.
lock: python ## pin the newest versions anew in requirements.lock
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install --quiet 'torch==2.13.0' \
		-e '.[notebooks,test,tensorboard]'
	@{ echo "# The versions everything was tested with, for pip's -c: pip install -c $(LOCK) -e ."; \
	   echo "# Made by 'make lock' ($$(.venv-lock/bin/python -V)); do not edit."; \
	   .venv-lock/bin/python -m pip freeze --all --exclude-editable \
	   | sed -E -e 's/\+[[:alnum:].]+$$//' -e '/^(pip|triton|nvidia-|cuda-)/d' -e '/ @ /d'; \
	 } > $(LOCK).new
	@mv $(LOCK).new $(LOCK)
	@rm -r .venv-lock

clean: ## remove results/quick, results/smoke and the tree's caches (.venv and other results stay)
	rm -rf results/quick results/smoke .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o \
		\( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +
