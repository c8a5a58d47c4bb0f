# Everything a reader or a contributor does, one word each.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
READY   = $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help install reproduce test site notebooks bench export clean

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): settings.ini pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all,dev]"
	$(BIN)/python -m ipykernel install --prefix=$(VENV) --name python3 > /dev/null 2>&1
	@touch $@

install: $(READY) ## Create .venv and install the pinned environment

reproduce: $(READY) ## Run every experiment on data that needs no download; writes results/ and report/index.html
	$(BIN)/ddcl reproduce --profile quick

test: $(READY) ## Run all checks: notebooks, pytest, notebooks and README in step with the package
	$(BIN)/python docs/check.py
	$(BIN)/nbdev-test --n-workers 1
	$(BIN)/python -m pytest -rs

site: $(READY) ## Build the documentation site into _docs/
	sh docs/vendor.sh
	$(BIN)/python docs/build.py

notebooks: $(READY) ## Open the notebooks in JupyterLab, in the right environment
	$(BIN)/jupyter lab nbs

bench: $(READY) ## Measure time and memory beside the alternatives, some 20 minutes; writes results/bench/
	$(BIN)/ddcl bench

export: $(READY) ## Write the package and the README from the notebooks, and clean the notebooks
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/python docs/build.py --readme

clean: ## Remove what was built (the environment and the results stay)
	rm -rf _proc _docs _site_src build dist report .pytest_cache
