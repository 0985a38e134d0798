# make demo: hide the people in a street photo from the bundled detector, then try the same on the hardened one.
# make test: run the tests.
# make test-quick: those without programs, trainings and browsers, after an edit.
# make docs: the site, into site/.
# make faults: the tests of what docs/promises.md says of kills and faults, then fifty kills at random moments.
# make fuzz: ten minutes of odd files for every reader, other ones each time; then ten of such as reach other code.
# All make .venv and install into it when needed.

PYTHON ?= python3
READY := .venv/.ready

.PHONY: demo test test-quick docs faults fuzz clean

BUS := .venv/lib/python*/site-packages/ultralytics/assets/bus.jpg

# An attack that fails is exit code 1; of the hardened detector, it is what the demo shows.
demo: $(READY)
	.venv/bin/detguard attack $(BUS) --target person --eps 4
	.venv/bin/detguard attack $(BUS) --target person --eps 4 --steps 50 --model detguard-n-hard || test $$? -eq 1

# A thread for each of several processes: most tests start programs, or wait for one core. Each file by one of them:
# what its tests share is made once.
TEST := OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
QUICK := test_*.py cli/test_app.py data/test_dataset.py data/test_sources.py objectives transforms

test: $(READY)
	$(TEST)

test-quick: $(READY)
	$(TEST) $(addprefix tests/,$(QUICK))

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict

# Those that the page names are the fault suite.
PROMISED := grep -o '[a-z_0-9/]*\.py::[a-z_0-9]*' docs/promises.md

faults: $(READY)
	$(TEST) $$($(PROMISED) | sort -u | sed s,^,tests/,)
	OMP_NUM_THREADS=1 .venv/bin/python benchmarks/kills.py --kills 50

fuzz: $(READY)
	DETGUARD_FUZZ_SECONDS=600 .venv/bin/python -m pytest tests/fuzz --tb=line --show-capture=no
	.venv/bin/pip install --quiet atheris
	PYTHONPATH=tests/fuzz DETGUARD_FUZZ_SECONDS=600 .venv/bin/python -m pytest -p guided tests/fuzz --tb=line --show-capture=no

$(READY): pyproject.toml
	test -d .venv || $(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv site .pytest_cache .mypy_cache .ruff_cache .hypothesis
