# make run    set up .venv, then train the quickstart (about two minutes)
# make test   set up .venv, then run all tests
# make checks lint, types, and the fast tests
# make slurm  install what the tests of Slurm and of ssh bring up (Debian, as root)

PYTHON ?= python3
BIN := .venv/bin
# A worker for each core, files whole: what a file's tests share is brought up once.
WORKERS ?= -n auto --dist loadfile --no-loadscope-reorder

.PHONY: run test checks lint slurm clean
run: .venv/.ready
	$(BIN)/bigtrain launch configs/quickstart.yaml --restart

test: .venv/.ready
	$(BIN)/python -m pytest $(WORKERS) -m "not alone"
	$(BIN)/python -m pytest tests/cluster -m alone

checks: lint
	$(BIN)/python -m pytest $(WORKERS) -m "not cluster"

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slurm:
	apt-get -qq update
	DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
		slurmctld slurmd slurm-client munge iproute2 openssh-server openssh-client

# constraints.txt pins what is installed; pyproject.toml says what the package needs.
.venv/.ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "bigtrain needs Python 3.10 or newer; make PYTHON=python3.12 ... takes another one")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
