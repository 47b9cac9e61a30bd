"""The generated scenes."""

import filecmp
import json

import numpy as np

from common.data.demo import CATEGORY_IDS, draw_scene, make_demo, visible_boxes


def test_demo_is_the_same_from_the_same_seed(demo, tmp_path):
    make_demo(tmp_path / "again", train=12, val=6, seed=1)
    make_demo(tmp_path / "other", train=12, val=6, seed=2)
    name = "annotations/instances_train2017.json"
    assert filecmp.cmp(demo / name, tmp_path / "again" / name, shallow=False)
    assert not filecmp.cmp(demo / name, tmp_path / "other" / name, shallow=False)
    assert filecmp.cmp(demo / "train2017/000007.jpg", tmp_path / "again/train2017/000007.jpg", shallow=False)


def test_demo_boxes_enclose_the_visible_parts(demo):
    content = json.loads((demo / "annotations" / "instances_train2017.json").read_text())
    assert {a["category_id"] for a in content["annotations"]} <= set(CATEGORY_IDS)
    for seed in range(20):
        scene = draw_scene(np.random.default_rng(seed))
        assert 1 <= len(scene.labels) <= 6
        for index, ((x, y, width, height), area, _) in enumerate(visible_boxes(scene)):
            inside = scene.owner[y : y + height, x : x + width] == index
            assert area == inside.sum() == (scene.owner == index).sum()
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            assert area >= 0.5 * scene.full_areas[index]
