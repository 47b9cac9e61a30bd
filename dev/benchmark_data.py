"""Time and memory that reading and checking all of COCO takes: 118,287 images and 860,001 boxes.

  python -m dev.benchmark_data

The annotations are generated, polygons included, in the form and number of instances_train2017.json. The image files
are empty: decoding them, once for all runs, is not part of it.
"""

import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from common.data.readers import Request, read_coco

IMAGES, BOXES, CLASSES, POINTS = 118_287, 860_001, 80, 40
WIDTH, HEIGHT = 64, 48


def generate(folder: Path) -> Path:
    """The annotation file, with its images in `folder`/train2017."""
    rng = np.random.default_rng(0)
    (folder / "train2017").mkdir()
    images = []
    for number in range(1, IMAGES + 1):
        name = f"{number:012d}.jpg"
        (folder / "train2017" / name).touch()
        images.append({"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT, "license": 1})
    corners = rng.random((BOXES, 2)) * (WIDTH / 2, HEIGHT / 2)
    boxes = np.concatenate([corners, 1 + rng.random((BOXES, 2)) * 20], axis=1).round(2).tolist()
    owners, classes = rng.integers(1, IMAGES + 1, BOXES).tolist(), rng.integers(1, CLASSES + 1, BOXES).tolist()
    polygon = [rng.random(2 * POINTS).round(2).tolist()]
    annotations = [
        {"id": i, "image_id": owner, "category_id": k, "bbox": b, "area": 9.5, "iscrowd": 0, "segmentation": polygon}
        for i, (owner, k, b) in enumerate(zip(owners, classes, boxes, strict=True), 1)
    ]
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, CLASSES + 1)]
    path = folder / "annotations" / "instances_train2017.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = multiprocessing.get_context("spawn").Process(target=generate, args=(folder,))
        process.start()
        process.join()  # in a separate process, so that its memory is not measured
        size = (folder / "annotations" / "instances_train2017.json").stat().st_size
        began = time.perf_counter()
        data = read_coco(Request(str(folder), "train")).check()
        seconds = time.perf_counter() - began
        print(f"{len(data)} images, {len(data.labels)} boxes, a file of {size / 1e6:.0f} MB: {seconds:.1f} s")
        print(f"peak memory, libraries included: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")
