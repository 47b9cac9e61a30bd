"""Hub data sets from small parquet files."""

import multiprocessing
import os
import shutil
import signal
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import datasets
import numpy as np
import pytest
from filelock import FileLock
from helpers import data_flags, encoded
from PIL import Image

from common.console import InputError
from common.data import hub
from common.data.readers import Request
from common.data.sources import load_split

BOXES = [[10.0, 20.0, 30.0, 25.0], [40.0, 5.0, 50.0, 29.0]]  # xyxy in images of 60 x 30 pixels
XYWH = [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in BOXES]
CENTRES = [[(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1] for x1, y1, x2, y2 in BOXES]
CATS = datasets.ClassLabel(names=["cat", "dog"])


def picture(number, suffix=".png"):
    return encoded(Image.new("RGB", (60, 30), (number * 9 % 256, 50, 90)), 1, suffix)


def row(number, **parts):
    """A row in the manner of detection-datasets/coco."""
    objects = {"bbox": BOXES, "category": [0, 1], "area": [40.0, 50.0]}
    image = {"bytes": picture(number), "path": None}
    return {"image_id": number, "image": image, "width": 60, "height": 30, "objects": objects} | parts


def parquet(folder, rows, category=CATS, shards=2):
    """The rows as parquet files of row groups of two; `category`: how `objects.category` is declared."""
    for number, part in enumerate(np.array_split(np.arange(len(rows)), shards)):
        data = datasets.Dataset.from_list([rows[i] for i in part])
        if category is not None:
            features = data.features.copy()
            features["objects"]["category"] = datasets.List(category)
            data = data.cast(features)
        path = folder / "data" / f"train-{number:05d}-of-{shards:05d}.parquet"
        data.to_parquet(path, batch_size=2)
    return folder


@pytest.fixture(autouse=True)
def hub_cache(cache):
    datasets.disable_progress_bars()
    return cache / "hub"


def fetch(cache, data, limit, moment=""):
    """What another process does; at a `moment` of the fourth row it dies of SIGKILL."""
    os.environ["DETECTION_CACHE"] = str(cache)
    datasets.disable_progress_bars()
    write_row = hub.write_row

    def write_row_until(row, content, folder, number, header):
        entry = write_row(row, content, folder, number, header)
        if number == 4 and moment:
            if moment == "in an image":
                (folder / "000000000004.jpg").write_bytes(b"half an ima")
            if moment == "in the line":
                with (folder.parent / "journal.jsonl").open("ab") as file:
                    file.write(b'\n{"image": {"id": 4, "file_name": "0000')
            os.kill(os.getpid(), signal.SIGKILL)
        return entry

    hub.write_row = write_row_until
    hub.read_hub(Request(data, "train", limit=limit))


@pytest.fixture(scope="module")
def process():
    """Starts another process that calls `fetch`; the libraries are imported once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["common.data.hub", "pycocotools.cocoeval"])

    def start(*arguments):
        child = context.Process(target=fetch, args=arguments)
        child.start()
        return child

    return start


@pytest.fixture
def twelve(tmp_path):
    return parquet(tmp_path / "twelve", [row(i) for i in range(1, 13)])


@pytest.fixture
def no_stream(monkeypatch):
    """Called, it forbids all streams from then on."""
    return lambda: monkeypatch.setattr(datasets, "load_dataset", None)


def read(folder, limit=0, split="train", box_format="xyxy", **source):
    return load_split(data_flags(folder, limit, box_format=box_format, **source), split)


def ids(data):
    return [p.id for p in data.images]


def contents(data):
    """A data set's images, boxes and notes, without the folders of the images."""
    images = [(p.id, p.width, p.height, p.path.name, p.path.read_bytes()) for p in data.images]
    return images, data.fingerprint(), data.areas.tolist(), data.notes


def test_a_larger_limit_stores_only_what_is_missing_and_the_rest_needs_no_stream(twelve, hub_cache, no_stream):
    whole = contents(read(twelve, 9))
    shutil.rmtree(hub_cache)
    first = read(twelve, 4)
    assert ids(first) == [1, 2, 3, 4] and first.target(0).boxes.tolist() == BOXES
    assert len(list(hub_cache.rglob("*.jpg"))) == 4
    written = [p.path.stat().st_mtime_ns for p in first.images]
    more = read(twelve, 9)
    assert contents(more) == whole and [p.path.stat().st_mtime_ns for p in more.images[:4]] == written
    everything = contents(read(twelve, 99))
    no_stream()
    assert ids(read(twelve, 8)) == list(range(1, 9))
    assert contents(read(twelve, 50)) == contents(read(twelve)) == everything  # the end is remembered


def test_going_on_opens_no_earlier_file_and_changed_files_are_read_anew(twelve, monkeypatch):
    read(twelve, 10)
    folder = hub._cache_of(str(twelve))
    first = twelve / "data" / "train-00000-of-00002.parquet"
    content, times = first.read_bytes(), (first.stat().st_atime_ns, first.stat().st_mtime_ns)
    footer = int.from_bytes(content[-8:-4], "little") + 8
    first.write_bytes(content[:4] + bytes(len(content) - footer - 4) + content[-footer:])  # no row can be read any more
    os.utime(first, ns=times)
    with pytest.raises(InputError, match="broke off"):  # it has changed, though not in length and time
        read(twelve)
    with monkeypatch.context() as patch:
        patch.setattr(hub, "_cache_of", lambda _: folder)  # as if it were the same still
        assert ids(read(twelve)) == list(range(1, 13))
    parquet(twelve, [row(i) for i in range(21, 25)])
    assert ids(read(twelve, 3)) == [21, 22, 23]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["in an image", "before the line", "in the line"])
def test_a_killed_run_goes_on_as_if_never_interrupted(process, twelve, hub_cache, monkeypatch, moment):
    whole = contents(read(twelve, 6))
    shutil.rmtree(hub_cache)
    child = process(hub_cache.parent, str(twelve), 6, moment)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    existing = {path.name: path.stat().st_mtime_ns for path in hub_cache.rglob("*.jpg")}
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", None)
        assert contents(read(twelve, 3))[0] == whole[0][:3]
    more = read(twelve, 6)
    assert contents(more) == whole and len(read(twelve)) == 12
    assert all(p.path.stat().st_mtime_ns == existing[p.path.name] for p in more.images[:3])


@pytest.mark.slow
def test_of_processes_at_the_same_time_one_fetches_and_the_others_wait(process, twelve, hub_cache):
    children = [process(hub_cache.parent, str(twelve), limit) for limit in (7, 11, 11)]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    lines = next(hub_cache.rglob("journal.jsonl")).read_text().splitlines()
    assert sum('"file_name"' in line for line in lines) == 11
    assert contents(read(twelve, 11))[0] == [(i, 60, 30, f"{i:012d}.jpg", picture(i)) for i in range(1, 12)]


def test_who_waits_for_another_process_says_so(twelve, hub_cache, caplog):
    caplog.set_level("INFO")
    read(twelve, 3)
    folder = next(hub_cache.glob("twelve-*/train"))
    with ThreadPoolExecutor(1) as pool, FileLock(folder / "lock"):
        waiting = pool.submit(read, twelve, 5)
        while "waiting for another process" not in caplog.text:
            assert not waiting.done()
            time.sleep(0.01)
        assert len(list((folder / "images").iterdir())) == 3
    assert ids(waiting.result()) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("objects", "box_format", "names"),
    [
        ({"bbox": XYWH, "category": [0, 1]}, "xywh", ("cat", "dog")),
        ({"bbox": CENTRES, "category": [0, 1]}, "cxcywh", ("cat", "dog")),
        ({"bbox": BOXES, "label": [5, 7]}, "xyxy", ("5", "7")),
        ({"bbox": BOXES, "categories": ["cat", "dog"]}, "xyxy", ("cat", "dog")),
        ([{"bbox": BOXES[0], "label": "cat"}, {"bbox": BOXES[1], "label": "dog"}], "xyxy", ("cat", "dog")),
    ],
)
def test_what_hub_data_sets_differ_in(tmp_path, objects, box_format, names):
    rows = [{"image": {"bytes": picture(i), "path": None}, "objects": objects} for i in range(4)]
    data = read(parquet(tmp_path / "some", rows, CATS if "category" in objects else None), box_format=box_format)
    assert data.class_names == names and ids(data) == [1, 2, 3, 4] and data.notes == () and not data.own_ids
    assert np.allclose(data.boxes, XYWH * 4, atol=1e-3) and np.allclose(data.areas, [100, 240] * 4)
    assert data.labels.tolist() == [0, 1] * 4 and not data.crowd.any()


def test_the_box_format_must_be_given_unless_it_is_known(twelve, hub_cache, no_stream):
    counts = r"24 boxes are written.*xywh \(0 fit their images\), --box-format xyxy \(24 fit.*cxcywh \(0 fit"
    with pytest.raises(InputError, match=counts):
        read(twelve, box_format="")
    shutil.copytree(next(hub_cache.glob("twelve-*")), hub_cache / "detection-datasets--coco")
    no_stream()
    assert read("detection-datasets/coco", box_format="").boxes[:2].tolist() == XYWH
    with pytest.raises(InputError, match="--sample-seed has no effect on hub data set"):
        read(twelve, sample_seed=1)


def test_string_ids_are_numbered_crowds_kept_and_fractions_refused(tmp_path):
    objects = {"bbox": BOXES, "category": [0, 1], "iscrowd": [1, 0]}
    data = read(parquet(tmp_path / "some", [row(0, image_id=f"beach_{i}", objects=objects) for i in range(4)]))
    assert ids(data) == [1, 2, 3, 4] and data.crowd.tolist() == [True, False] * 4
    objects["bbox"] = (np.array(BOXES) / [60, 30, 60, 30]).tolist()
    with pytest.raises(InputError, match="write them in pixels"):  # whatever --box-format says
        read(parquet(tmp_path / "other", [row(i, objects=objects) for i in (1, 2)]))


def test_the_names_of_coco_get_its_ids(tmp_path):
    names = ["person", "bicycle", *(f"class {i}" for i in range(76)), "hair drier", "toothbrush"]
    rows = [row(i, objects={"bbox": BOXES, "category": [0, 79]}) for i in (4, 2)]
    data = read(parquet(tmp_path / "some", rows, datasets.ClassLabel(names=names)))
    assert len(data.category_ids) == 80 and data.category_ids[10:13] == (11, 13, 14) and ids(data) == [4, 2]
    assert [data.category_ids[label] for label in data.labels] == [1, 90, 1, 90]


def test_n_rows_are_n_usable_images_and_what_is_wrong_with_the_others_is_counted(tmp_path, caplog):
    odd = {"bbox": [[1.0, 2.0], [5.0, 5.0, float("nan"), 9.0], BOXES[0]], "category": [0, 0, -1], "area": [1.0] * 3}
    rows = [
        row(1),
        row(2, image={"bytes": b"no image", "path": None}),
        row(3, objects={"bbox": BOXES, "category": [0], "area": None}),
        row(4, image=None),
        row(6, image_id=None),
        row(7, objects=odd),
        row(8, objects=None),
        row(9, width=None, height=None, image={"bytes": picture(9, ".jpg"), "path": "a.jpeg"}),
        row(10, width=61),
    ]
    folder = parquet(tmp_path / "some", rows, shards=1)
    first = contents(read(folder, 3))
    assert [number for number, *_ in first[0]] == [1, 7, 8]
    for _ in range(2):  # likewise from the cache
        caplog.clear()
        data = read(folder)
        assert ids(data) == [1, 7, 8, 9] and len(data.labels) == 4
        assert (data.images[-1].path.suffix, data.images[-1].width) == (".jpeg", 60)
        for note in (
            "left out 2 images that cannot be read (row 2, row 4)",
            "left out 2 rows without image_id, or with columns of other lengths in objects (row 3, row 5)",
            "left out 2 boxes that are not four finite numbers (000000000007.jpg)",
            "left out 1 boxes of a class that is not listed (000000000007.jpg)",
            "left out 1 images of another size than annotated (row 9)",
        ):
            assert note in caplog.text
    assert contents(read(folder, 3)) == first  # what the cache has beyond them is not told of
    with pytest.raises(InputError, match="refused by --strict"):
        read(folder, strict=True)
    with pytest.raises(InputError, match="two images have the id 1"):
        read(parquet(tmp_path / "twice", [row(1), row(1)]))


def test_a_fault_of_this_machine_is_not_kept(twelve, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(InputError, match="Too many open files"):
        patch.setattr(Image, "open", Mock(side_effect=OSError(24, "Too many open files")))
        read(twelve, 2)
    assert ids(read(twelve, 2)) == [1, 2]


def test_no_row_can_name_a_file_outside_the_data_set(tmp_path):
    folder, secret = tmp_path / "some", f"{tmp_path}/secret.png"
    folder.mkdir()
    for path in (tmp_path / "secret.png", folder / "own.png"):
        path.write_bytes(picture(1))
    for path in (tmp_path / "secret.zip", folder / "own.zip"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(secret, "a.png")
    paths = [secret, f"file://{secret}", f"{folder}/../secret.png", f"zip://a.png::{tmp_path}/secret.zip"]
    paths += ["secret.png", f"http://a::{folder}/own.png", f"simplecache::{secret}"]
    paths += [f"{folder}/own.png", f"zip://a.png::{folder}/own.zip"]
    rows = [row(i, image={"bytes": None, "path": path}) for i, path in enumerate(paths, 1)]
    data = read(parquet(folder, rows, shards=1))
    assert ids(data) == [8, 9] and "left out 7 images that cannot be read" in " ".join(data.notes)


def test_what_is_no_detection_set_or_breaks_off_is_refused_in_a_line(twelve, tmp_path):
    rows = [{"image": {"bytes": picture(i), "path": None}, "label": i} for i in range(2)]
    with pytest.raises(InputError, match=r"is no detection set: .*, but image, label"):
        read(parquet(tmp_path / "other", rows, None))
    with pytest.raises(InputError, match="has no val split: it has train: push one"):
        read(twelve, split="val")
    second = twelve / "data" / "train-00001-of-00002.parquet"
    second.write_bytes(second.read_bytes()[:100])
    with pytest.raises(InputError, match=r"broke off: .*; what came before is kept") as caught:
        read(twelve)
    assert "\n" not in str(caught.value) and ids(read(twelve, 6)) == [1, 2, 3, 4, 5, 6]


def test_without_network(hub_cache, twelve):
    begin = time.monotonic()
    with pytest.raises(InputError, match="cannot fetch the hub data set some/other") as caught:
        read("some/other", 3)
    assert time.monotonic() - begin < 3 and "\n" not in str(caught.value)
    expected = contents(read(twelve, 4))
    shutil.move(next(hub_cache.glob("twelve-*")), hub_cache / "some--set")
    assert contents(read("some/set", 4)) == expected
    with pytest.raises(InputError, match=r"request no more images than .*some--set has, or delete it"):
        read("some/set", 5)


@pytest.mark.real
@pytest.mark.parametrize("split, limit", [("train", 0), ("train", 40), ("val", 8)])
def test_the_hub_copy_is_the_same_as_coco_itself(assets, split, limit):
    found = read(assets / "hub-sample", limit, split)
    whole = read(assets / "coco-subset", 0, split, box_format="")
    assert len(found) == (limit or 64) and found.notes == ()
    index = {image.id: i for i, image in enumerate(whole.images)}
    coco = whole.select(np.array([index[key] for key in ids(found)]))
    single = ~coco.crowd  # the hub has no crowds
    assert (found.category_ids, found.class_names) == (coco.category_ids, coco.class_names)
    assert np.allclose(found.boxes, coco.boxes[single], atol=0.02) and not found.crowd.any()
    assert (found.labels == coco.labels[single]).all() and np.allclose(found.areas, coco.areas[single], atol=1)
    assert [p.path.read_bytes() for p in found.images] == [p.path.read_bytes() for p in coco.images]
