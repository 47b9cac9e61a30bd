"""Labels that detections doubt."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import truth_as_detections

from common.evaluate.detections import detection_table
from common.evaluate.label_check import doubtful_labels

BOX = 5  # of the data set


def removed(data):
    kept = np.arange(len(data.labels)) != BOX
    starts = data.starts - (data.starts > BOX)
    return replace(data, starts=starts, **{k: getattr(data, k)[kept] for k in ("boxes", "labels", "crowd", "areas")})


def swapped(data):
    return replace(data, labels=np.where(np.arange(len(data.labels)) == BOX, (data.labels + 1) % 10, data.labels))


def moved(data):
    shift = np.zeros_like(data.boxes)
    shift[BOX, 0] = data.boxes[BOX, 2] / 2
    return replace(data, boxes=data.boxes + shift)


FAULTS = {"no label": removed, "another class": swapped, "another box": moved, "not found": lambda data: data}


@pytest.mark.parametrize(("kind", "plant"), FAULTS.items(), ids=FAULTS)
def test_a_planted_fault_is_the_only_doubt(kind, plant, demo_val):
    data, table = plant(demo_val), detection_table(truth_as_detections(demo_val), demo_val)
    table = table.select(np.arange(len(table)) != BOX) if kind == "not found" else table
    (doubt,) = doubtful_labels(table, data)
    owner = demo_val.images[demo_val.image_of_box()[BOX]]
    name, box = demo_val.class_names[demo_val.labels[BOX]], demo_val.boxes[BOX].tolist()
    assert (doubt["kind"], doubt["image_id"], doubt["file"]) == (kind, owner.id, owner.path.name)
    assert doubt["doubt"] == 0.5 if kind == "not found" else doubt["doubt"] > 0.8
    assert doubt.get("detected", name) == name and doubt.get("detected_box", box) == pytest.approx(box, abs=1e-3)
    assert ("label" in doubt) == (kind != "no label") and ("score" in doubt) == (kind != "not found")


def test_crowds_and_unsure_detections_are_no_doubt(demo_val):
    found = truth_as_detections(demo_val)
    unsure = [*found, *(replace(f, boxes=f.boxes * 0.3, scores=f.scores * 0.01) for f in found)]
    assert doubtful_labels(detection_table(unsure, demo_val), demo_val) == []
    crowd = np.arange(len(demo_val.labels)) == BOX
    assert doubtful_labels(detection_table(found, demo_val), replace(demo_val, crowd=crowd)) == []
