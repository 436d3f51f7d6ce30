# make serve: set up everything and serve the tiny model, disaggregated, on this machine
# make test:  set up everything and run all checks and tests
.PHONY: serve test check setup lock clean

serve:
	@scripts/setup engine-cpu
	.venv/bin/python -m launch +recipe=tiny_disagg

test:
	@scripts/setup test
	@$(MAKE) --no-print-directory check
	.venv/bin/python -m pytest

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
