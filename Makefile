# Each target sets up what it needs. VENV=... chooses another virtual environment, WORKERS=... how
# many test processes.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# What `make test-all` runs: everything that needs no GPU.
# After `make test`, MARKS='slow and not gpu' is the rest.
MARKS ?= not gpu and not distributed and not services and not browser
INSTALLED := $(VENV)/.installed

.PHONY: fuzz demo test test-all faults distributed browser-test services-test slurm engines mutants \
	check docs format ui clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/python -m pipeline recipe=distill

test: $(INSTALLED)  # the default suite
	$(PYTEST)

# PART=K/N takes the K-th of N parts of the test files, from 0.
PART ?= 0/1
test-all: $(INSTALLED)  # the slow ones too
	$(PYTEST) -m "$(MARKS)" --part $(PART)

mutants: $(INSTALLED)  # single-line faults that the default suite must find
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py

faults: $(INSTALLED)  # kills, full disks, servers that answer wrongly; the slow ones too
	$(PYTEST) -m 'faults and not distributed'

distributed: $(INSTALLED)  # ranks on two hosts, kills, partitions; by root, in minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 -m distributed

# Reports as people see them, in Chromium; root on Debian installs it where it is missing.
browser-test: $(INSTALLED)
	command -v chromedriver >/dev/null || \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver; } || \
		echo "no Chromium: its tests are skipped"
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[browser]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 -m browser

# MLflow on PostgreSQL with artifacts on S3, on loopback; root on Debian installs what is missing.
services-test: $(INSTALLED)
	test -n "$$(ls /usr/lib/postgresql/*/bin/initdb 2>/dev/null)" || \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends postgresql; }
	$(BIN)/python -m pip install -q psycopg2-binary
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 -m services

slurm: $(INSTALLED)  # a preempted run on a real Slurm, which it installs; root, Debian
	$(BIN)/python tests/slurm/prove.py

engines:  # job files against the engines' own validators, which it installs
	bash tests/engines/validate.sh $(PYTHON)

check: $(INSTALLED) docs  # format, lint, types, the documentation
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(INSTALLED)  # the site into site/; what leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Thousands of damaged records, files and command lines; COUNT=10000 for a night, SEED=N for others.
COUNT ?= 2000
SEED ?= 0
fuzz: $(INSTALLED)
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m fuzz.run --count $(COUNT) --seed $(SEED)

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

ui: $(INSTALLED)  # an experiment's description links to the view with its core figures
	$(BIN)/mlflow ui --backend-store-uri sqlite:///$(CURDIR)/mlruns/mlflow.db

clean:
	rm -rf .venv dist build site *.egg-info
