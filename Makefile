# Every target sets itself up in .venv first, from requirements.txt: nothing needs to be installed by hand
# but Python 3.11 or newer, git and make. `make` alone lists the targets.

PYTHON ?= python3
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := bitlib chapters tools tests conftest.py

.DEFAULT_GOAL := help
.PHONY: help book pdf serve test notebooks export demo status lint format bench clean

help: ## list the targets
	@echo "make TARGET, where TARGET is one of"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

book: $(READY) ## build the site from the executed notebooks, warnings as errors
	$(BIN)/python tools/stamp.py
	$(BIN)/python tools/pair.py
	$(BIN)/python tools/vendor.py
	$(BIN)/jupyter-book build . -W -n --keep-going -q
	@echo "The book is at $(CURDIR)/_build/html/index.html; make serve shows it in a browser."

pdf: book ## print the whole book into _build/book.pdf, and check its pages
	$(BIN)/python tools/pdf.py

serve: book ## build the site and serve it on this machine only (PORT=8000)
	@echo "The book is at http://127.0.0.1:$(PORT)/ until you press Ctrl-C."
	@$(BIN)/python -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html

test: book ## run everything: unit tests, book mechanics, the site in a browser, every notebook
	@status=0; \
	$(BIN)/python -m pytest --durations=10 || status=1; \
	$(BIN)/python -m pytest --nbval chapters --durations=10 || status=1; \
	exit $$status

notebooks: export ## execute the notebooks whose code, modules or data changed
	$(BIN)/python tools/pair.py
	$(BIN)/python tools/execute.py

demo: $(READY) ## fine-tune and export the demo's network, and draw the still pictures
	$(BIN)/python tools/demo.py
	$(BIN)/python tools/stills.py

status: $(READY) ## measure the runtime and memory of every chapter, for the status page
	$(BIN)/python tools/status.py

export: $(READY) ## write bitlib/ from the chapters
	$(BIN)/python tools/stamp.py
	$(BIN)/python tools/export.py

lint: $(READY) ## ruff check and ruff format --check
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

format: $(READY) ## let ruff fix and format what it can
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(READY) ## measure the speed of bitlib on this machine
	@for script in tests/bench/*.py; do \
		test -e $$script || { echo "There are no benchmarks in tests/bench yet."; exit 0; }; \
		echo "$$script"; $(BIN)/python $$script || exit 1; \
	done

clean: ## remove the built site and the caches (.venv stays)
	rm -rf _build dist build .pytest_cache .ruff_cache .hypothesis
	find bitlib tools tests chapters -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is older than requirements.txt or pyproject.toml after either changed; then pip brings .venv into line.
$(READY): requirements.txt pyproject.toml
	@command -v $(PYTHON) > /dev/null || test -x $(BIN)/python || { \
		echo "There is no $(PYTHON) here. Install Python 3.11 or newer, or name yours: make PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(BIN)/python || { $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is $$($(PYTHON) -V 2>&1), but the book needs 3.11 or newer: make PYTHON=/path/to/python" >&2; exit 1; }; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(VENV) holds $$($(BIN)/python -V 2>&1), but the book needs 3.11 or newer: remove $(VENV), then make again" >&2; exit 1; }
	$(PIP) install $(if $(CI),--quiet --progress-bar off) -r requirements.txt
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@
