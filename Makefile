# make serve: set up everything and serve the tiny model, disaggregated, on this machine
# make test:  set up everything and run all checks and tests
# make nightly: set up everything and run the tests that take minutes each
.PHONY: serve test nightly check setup lock clean

serve:
	@scripts/setup engine-cpu
	.venv/bin/python -m launch +recipe=tiny_disagg

test:
	@scripts/setup test
	@$(MAKE) --no-print-directory check
	.venv/bin/python -m pytest

nightly:
	@scripts/setup test
	.venv/bin/python -m pytest -m nightly

check:
	.venv/bin/ruff check --output-format concise
	.venv/bin/ruff format --check --quiet
	.venv/bin/mypy

setup:
	@scripts/setup test

lock:
	@scripts/lock

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
