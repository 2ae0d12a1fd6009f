# `make demo` and `make test` do everything on a fresh machine: the first target they need makes
# .venv and installs into it, once.
PYTHON ?= python3
RUNS ?= runs
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint rehearse evidence evidence-deep evidence-glyphs bench tables notebooks notebook test-slow test-faults test-slurm test-gpu golden clean

demo: $(INSTALLED)  ## digits under three rules, 4 workers: table and pictures in results/demo/
	$(BIN)/python scripts/demo.py

test: lint  ## the whole suite: ruff, mypy, import-linter, generated tables, pytest
	$(BIN)/python scripts/prepare.py digits
	$(BIN)/pytest -n auto --dist worksteal -m "not slow and not slurm"

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/tables.py --check

rehearse: $(INSTALLED)  ## the main tables at small scale: results/rehearsal/, about half an hour on 2 cores
	$(BIN)/python scripts/rehearse.py

evidence: $(INSTALLED)  ## small networks on which the rules' effect is seen: results/evidence/, under an hour on 2 cores
	$(BIN)/python scripts/simulate.py

evidence-deep: $(INSTALLED)  ## small deep networks under four rules: results/evidence/, about an hour on 2 cores
	$(BIN)/python scripts/deep_evidence.py

evidence-glyphs: $(INSTALLED)  ## the small networks on unseen fonts: results/evidence/; minutes on a GPU, days on a CPU
	$(BIN)/python scripts/prepare.py glyphs
	$(BIN)/python scripts/glyph_evidence.py

bench: $(INSTALLED)  ## all benchmarks that need no GPU: results/bench/, under 20 minutes on 2 idle cores
	$(BIN)/python scripts/bench.py

tables: $(INSTALLED)  ## write results/tables and the generated blocks of README.md and docs/
	$(BIN)/python scripts/tables.py

notebooks: $(INSTALLED)  ## execute notebooks/ in place
	$(BIN)/python scripts/notebooks.py

notebook: $(INSTALLED)  ## notebook 04 on your runs, in Jupyter: make notebook RUNS='runs/a runs/b'
	$(BIN)/python scripts/notebooks.py --runs $(RUNS)
	test -x $(BIN)/jupyter-lab || $(BIN)/pip install --quiet --disable-pip-version-check -e '.[notebook]'
	$(BIN)/jupyter-lab notebooks/own/04_runs.ipynb

test-slow: $(INSTALLED)  ## the long proofs that `make test` leaves out, but for those of faults
	$(BIN)/pytest -n auto --dist worksteal -m slow --ignore tests/faults

test-faults: $(INSTALLED)  ## all faults, with the long loops of kills, crashes and starts; writes results/faults.json
	$(BIN)/pytest -n auto tests/faults --record-faults

test-slurm: $(INSTALLED)  ## jobs on a real Slurm of two nodes, installed where root may; writes results/faults.json
	$(BIN)/pytest tests/slurm --record-faults

test-gpu: $(INSTALLED)  ## on a machine with a GPU; writes results/bench/gpu_*.json
	$(BIN)/pytest tests/gpu

golden: $(INSTALLED)  ## record the golden loss trace anew, after a wanted change
	$(BIN)/pytest tests/golden --record-golden

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; say which: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv: about 6 GB and 3 minutes, once"
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

clean:  ## remove what make made; runs/ and data/ stay
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
