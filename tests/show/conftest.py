"""Results to show, of random detections."""

from pathlib import Path

import pytest
from helpers import random_detections

from common.evaluate.bootstrap import comparisons, image_weights
from common.evaluate.detections import ModelRun, detection_table
from common.evaluate.evaluation import describe_data, evaluate
from common.evaluate.results import Cost, ValidationRecord, ValidationResults, write_results


@pytest.fixture(scope="module")
def results_file(demo_val, tmp_path_factory) -> Path:
    """A results file of two models with numbers and one that could not be evaluated."""
    cost = Cost(1000, 50.0, 20.0, 4, None, "CPU", "fp32")
    weights, evaluated = image_weights(len(demo_val), 0), []
    for seed, name in enumerate(("first", "second")):
        found = ModelRun(detection_table(random_detections(demo_val, seed), demo_val), demo_val.class_names, cost)
        evaluated.append(evaluate(name, f"{name}.pth", found, demo_val, weights))
    records = [*(e.record for e in evaluated), ValidationRecord("third", "third.pth", error="no such file")]
    pairs = comparisons({e.record.name: e.samples for e in evaluated}, len(demo_val))
    path = tmp_path_factory.mktemp("results") / "validation_results.json"
    write_results(path, ValidationResults({}, describe_data(demo_val, "demo"), records, pairs))
    return path
