.PHONY: quality style test demo bench notebooks

quality: ## what the linter finds
	python -m ruff check .
	python -m ruff format --check .

style: ## mends what the linter can
	python -m ruff check --fix .
	python -m ruff format .

test:
	python -m pytest

demo:
	python -m hf_spec_ensemble.demo

bench: ## of the embedded models; asks the Hub for GSM8K
	python -m hf_spec_ensemble.bench

notebooks: ## executes them and stores their outputs
	python notebooks/execute.py
