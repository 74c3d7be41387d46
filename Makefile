# make train [ARGS='--preset=... --...']   pretrain (the built-in demo without data of one's own), then evaluate
# make test                                lint and run the tests
# make check                               lint and the tests that train nothing: under a minute
# All make the virtual environment .venv first, and again when a requirements file has changed.

PYTHON ?= python3
ARGS ?=

.PHONY: train test check lint

train: .venv/installed
	cd code && ../.venv/bin/python cli.py train --evaluate_after=True --knn_raw_pixels=True $(ARGS)

test: lint
	cd code && OMP_NUM_THREADS=1 ../.venv/bin/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder tests

QUICK = $(addprefix tests/test_, metric.py label_free.py config.py optimizer.py crops.py decode.py augmentation.py \
	checkpoint_format.py dataset_layouts.py list_runs.py figures.py)

check: lint
	cd code && OMP_NUM_THREADS=1 ../.venv/bin/python -m pytest -q -n auto --dist loadfile -k "not (run_state_changes or undecodable_file_names or with_small_range or trains_evaluates_and_infers or print_nothing_from_c or without_permission)" $(QUICK)

lint: .venv/installed-tests
	.venv/bin/ruff check code && .venv/bin/ruff format --check code
	! grep -rnE "# fmt: (skip|off)" code --include=*.py

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-tests: .venv/installed code/tests/requirements.txt code/requirements-extra.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r code/tests/requirements.txt
	touch $@
