# make demo    set up, train a language model on real text, watched and steered, ending in a report
# make demo-recommender   set up, train a recommender with and without text and normalisation, side by side, and compare
# make test    set up, run the tests, in two processes (JOBS=2)
# make check   lint and types
# make matrix  every callback under every strategy and precision, written to docs/compatibility.md

PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
READY := .venv/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo demo-recommender test check matrix lock clean

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"evolute needs Python 3.11 or newer; {sys.executable} is {v.major}.{v.minor}. Name another: make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --progress-bar off -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: setup
	$(BIN)/evolute fit --config llm/pretrain

demo-recommender: setup
	$(BIN)/evolute data ml-100k
	@folder=runs/recommender-$$(date +%Y%m%d-%H%M%S); export OMP_NUM_THREADS=1; \
	$(BIN)/evolute fit --config recommender/plain --run $$folder/plain > /dev/null & other=$$!; \
	$(BIN)/evolute fit --config recommender/tf_llmer --run $$folder/tf_llmer && wait $$other && \
	$(BIN)/evolute report $$folder/plain $$folder/tf_llmer --out $$folder/report.html

test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --no-loadscope-reorder

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

matrix: setup
	OMP_NUM_THREADS=1 EVOLUTE_MATRIX=all $(BIN)/pytest tests/callbacks/test_matrix.py

# The lock is what this environment holds, without local build tags (torch 2.13.0+cpu is torch 2.13.0 elsewhere).
lock:
	$(BIN)/python -m pip freeze --exclude-editable --all | grep -vE '^(pip|evolute)(==| @)' | sed -E 's/\+cpu$$//' > requirements.lock

clean:
	rm -rf .venv build dist *.egg-info
