# `make book` and `make test` each work first, alone, on a fresh clone with Python 3.11+; see README.md.
PYTHON ?= python3
BIN = .venv/bin
# Theory pages are compared output by output; a page with a .smoke.yaml trains, and runs at smoke size.
TRAINED = $(patsubst %.smoke.yaml,%.ipynb,$(wildcard notebooks/*/*.smoke.yaml))
THEORY = $(filter-out $(TRAINED),$(wildcard notebooks/*/*.ipynb))

.PHONY: book test nbval benchmarks clean

book: $(BIN)/.ready
	$(BIN)/repro book

test: $(BIN)/.ready
	$(BIN)/python -m pytest -q --durations=5 tests --ignore=tests/benchmarks
	$(MAKE) nbval

nbval: $(BIN)/.ready
	$(BIN)/python -m pytest -q --nbval -p no:cacheprovider -p tests.nbval_compare $(THEORY)
	$(BIN)/repro smoke
	REPRO_TIER=smoke $(BIN)/python -m pytest -q --nbval-lax -p no:cacheprovider -p tests.nbval_compare _build/smoke

benchmarks: $(BIN)/.ready
	$(BIN)/python -m pytest -q -s tests/benchmarks

# Set up once; again when the list of packages changes. The mark is written last, so a broken set-up is repeated.
$(BIN)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, found " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	# an oracle of the attacks' tests; alone, because it asks for visdom, whose source no longer builds
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps adv-lib==0.2.8
	touch $@

clean:
	rm -rf _build
