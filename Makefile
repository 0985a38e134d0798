# make demo: hide the people in a street photo from the bundled detector. make test: run the tests.
# Both make .venv and install into it when needed.

PYTHON ?= python3
READY := .venv/.ready

.PHONY: demo test clean

demo: $(READY)
	.venv/bin/detguard attack .venv/lib/python*/site-packages/ultralytics/assets/bus.jpg --target person --eps 4

test: $(READY)
	.venv/bin/python -m pytest

$(READY): pyproject.toml
	test -d .venv || $(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
