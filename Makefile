# make sweep: install, run a real grid on the embedded data with Ray, print the table, write Parquet and one HTML report.
# make test:  install, check, run the tests.
# make check: install, look for what ruff and mypy find.
# make test-fast: install, check, run the tests that take seconds and start no Ray.
# make report: install, make one page of all committed results (build/report.html) and run the notebooks (build/notebooks).
# make docs:  install, write the API reference to build/docs.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# By name: a package with __all__ does not show its modules.
MODULES = $(shell find zeroflow -name '*.py' ! -name __main__.py | sed 's|/__init__.py||; s|\.py$$||; s|/|.|g' | sort)

# Many processes import the same: what one has compiled, the next one reads, whatever the shell around says.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: sweep test test-fast check report docs clean

sweep: $(VENV)/installed
	$(BIN)/python sweeps/full_grid.py --grid sweeps/quick.yaml --results runs/quick

test: $(VENV)/installed-test check
	$(BIN)/python -m pytest --numprocesses 3 --dist worksteal

test-fast: $(VENV)/installed-test check
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not long and not slow and not ray"

check: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

report: $(VENV)/installed-notebooks
	$(BIN)/zeroflow report $(patsubst %/trials,%,$(wildcard results/*/trials)) results/trajectories -o build/report.html
	PLOTLY_RENDERER=notebook $(BIN)/jupyter nbconvert --execute --to html --output-dir build/notebooks notebooks/*.ipynb

docs: $(VENV)/installed-docs
	$(BIN)/python -W "ignore:Error parsing type annotation" -W "ignore:Found" -W "ignore:The module specification" \
		-W "ignore:Cannot determine" -m pdoc --docformat google --no-show-source \
		--output-directory build/docs $(MODULES)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Most of what is installed is never imported: what is, is compiled once, before several processes want it at once.
$(VENV)/installed: $(VENV)/bin/python setup.cfg pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -e .
	$(BIN)/python -c "import ray.train, ray.tune, timm, zeroflow.trial.trial"
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

$(VENV)/installed-notebooks: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[notebooks]"
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
