"""Hub data sets from small parquet files, and random samples of all kinds of data sets."""

import io
import multiprocessing
import os
import shutil
import signal
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers import data_flags, write_voc, write_yolo
from PIL import Image

from common.console import InputError
from common.data import hub
from common.data.hub import COCO_IDS, hub_split
from common.data.sources import load_split

BOXES = [[10.0, 20.0, 30.0, 25.0], [40.0, 5.0, 50.0, 29.0]]  # xyxy in images of 60 x 30 pixels
CATS = datasets.ClassLabel(names=["cat", "dog"])


def png(number, kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (60, 30), (number * 9 % 256, 50, 90)).save(file, kind)
    return file.getvalue()


def row(number, **parts):
    """A row in the manner of detection-datasets/coco."""
    objects = {"bbox": BOXES, "category": [0, 1], "area": [40.0, 50.0]}
    image = {"bytes": png(number), "path": None}
    return {"image_id": number, "image": image, "width": 60, "height": 30, "objects": objects} | parts


def parquet(folder, rows, category=None, split="train", shards=2):
    """The rows as parquet files of row groups of two; `category`: how `objects.category` is declared."""
    for number, part in enumerate(np.array_split(np.arange(len(rows)), shards)):
        data = datasets.Dataset.from_list([rows[i] for i in part])
        if category is not None:
            features = data.features.copy()
            features["objects"]["category"] = datasets.List(category)
            data = data.cast(features)
        path = folder / "data" / f"{split}-{number:05d}-of-{shards:05d}.parquet"
        data.to_parquet(path, batch_size=2)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    return tmp_path / "cache" / "hub"


def fetch(cache, data, limit, seed=-1, moment=""):
    """What another process does; at a `moment` of the fourth row it dies of SIGKILL."""
    os.environ["DETECTION_CACHE"] = str(cache.parent)
    datasets.disable_progress_bars()
    hub.SHUFFLE_BUFFER = 4
    write, store = hub.atomic_write, hub._store_row

    def write_until(path, *rest):
        if path.name == "000000000004.png" and moment == "in an image":
            path.write_bytes(b"half an ima")
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, *rest)

    def store_until(row, content, folder, number, *rest):
        entry = store(row, content, folder, number, *rest)
        if number == 4 and moment == "in the line":
            with (folder.parent / "rows.jsonl").open("ab") as file:
                file.write(b'{"id": 4, "file_name": "0000')
        if number == 4 and moment in ("before the line", "in the line"):
            os.kill(os.getpid(), signal.SIGKILL)
        return entry

    hub.atomic_write, hub._store_row = write_until, store_until
    hub_split(data, "train", ("train",), limit, seed)


@pytest.fixture(scope="module")
def process():
    """Starts another process that calls `fetch`; the libraries are imported once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["common.data.hub", "common.evaluate.coco_metrics", "pycocotools.cocoeval"])

    def start(cache, data, *rest):
        child = context.Process(target=fetch, args=(cache, str(data), *rest))
        child.start()
        return child

    return start


@pytest.fixture
def twelve(tmp_path):
    return parquet(tmp_path / "twelve", [row(i) for i in range(1, 13)], CATS)


@pytest.fixture
def no_stream(monkeypatch):
    """Called, it forbids all streams from then on."""

    def forbid():
        monkeypatch.setattr(datasets, "load_dataset", None)

    return forbid


def read(folder, limit=0, split="train", **source):
    return load_split(data_flags(folder, limit, **source), split)


def ids(data):
    return [p.id for p in data.images]


def contents(data):
    """A data set's images, boxes and notes, without the folders of the images."""
    images = [(p.id, p.width, p.height, p.path.name, p.path.read_bytes()) for p in data.images]
    return images, data.fingerprint(), data.areas.tolist(), data.notes


@pytest.mark.parametrize("seed", [-1, 3])
def test_a_larger_limit_stores_only_what_is_missing(twelve, cache, monkeypatch, seed):
    monkeypatch.setattr(hub, "SHUFFLE_BUFFER", 4)
    whole = read(twelve, 9, sample_seed=seed)
    expected = contents(whole)
    shutil.rmtree(cache)
    first = read(twelve, 4, sample_seed=seed)
    assert ids(first) == ids(whole)[:4] and first.image_boxes(0)[0].tolist() == BOXES
    assert len(list(cache.rglob("*.png"))) == 4
    written, stored = [p.path.stat().st_mtime_ns for p in first.images], []
    store = hub._store_row
    monkeypatch.setattr(hub, "_store_row", lambda *arguments: stored.append(1) or store(*arguments))
    more = read(twelve, 9, sample_seed=seed)
    assert contents(more) == expected and len(stored) == 5
    assert [p.path.stat().st_mtime_ns for p in more.images[:4]] == written


def test_going_on_in_the_order_of_the_files_opens_no_earlier_file(twelve):
    read(twelve, 10)
    first = twelve / "data" / "train-00000-of-00002.parquet"
    content, times = first.read_bytes(), (first.stat().st_atime_ns, first.stat().st_mtime_ns)
    footer = int.from_bytes(content[-8:-4], "little") + 8
    first.write_bytes(content[:4] + bytes(len(content) - footer - 4) + content[-footer:])  # no row can be read any more
    os.utime(first, ns=times)  # by name, size and time it is the same data set still
    with pytest.raises(InputError):
        read(twelve, 7, sample_seed=1)
    assert ids(read(twelve)) == list(range(1, 13))


@pytest.mark.parametrize("seed", [-1, 5])
def test_what_the_cache_holds_needs_no_stream_and_the_end_is_remembered(twelve, no_stream, seed):
    eight, three = (ids(read(twelve, limit, sample_seed=seed)) for limit in (8, 3))
    assert eight[:3] == three
    whole = contents(read(twelve, 99, sample_seed=seed))
    in_order = ids(read(twelve, sample_seed=seed))
    no_stream()
    assert ids(read(twelve, 8, sample_seed=seed)) == eight
    assert contents(read(twelve, 12, sample_seed=seed)) == contents(read(twelve, 50, sample_seed=seed)) == whole
    assert ids(read(twelve, sample_seed=seed)) == in_order == sorted(p[0] for p in whole[0]) == list(range(1, 13))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "seed"), [("in an image", -1), ("before the line", -1), ("in the line", -1), ("in the line", 3)]
)
def test_a_killed_run_goes_on_as_if_never_interrupted(process, twelve, cache, monkeypatch, moment, seed):
    monkeypatch.setattr(hub, "SHUFFLE_BUFFER", 4)
    whole = contents(read(twelve, 6, sample_seed=seed))
    shutil.rmtree(cache)
    child = process(cache, twelve, 6, seed, moment)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    existing = {path.name: path.stat().st_mtime_ns for path in cache.rglob("*.png")}
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", None)
        assert contents(read(twelve, 3, sample_seed=seed))[0] == whole[0][:3]
    more = read(twelve, 6, sample_seed=seed)
    assert contents(more) == whole
    assert all(p.path.stat().st_mtime_ns == existing[p.path.name] for p in more.images[:3])
    assert len(read(twelve)) == 12


@pytest.mark.slow
def test_of_processes_at_the_same_time_one_fetches_and_the_others_wait(process, twelve, cache):
    children = [process(cache, twelve, limit) for limit in (7, 11, 11)]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    lines = next(cache.rglob("rows.jsonl")).read_text().splitlines()
    assert sum('"file_name"' in line for line in lines) == 11
    assert contents(read(twelve, 11))[0] == [(i, 60, 30, f"{i:012d}.png", png(i)) for i in range(1, 12)]


def test_who_waits_for_another_process_says_so(twelve, cache, capfd):
    read(twelve, 3)
    folder = next(cache.glob("twelve-*/train"))
    with ThreadPoolExecutor(1) as pool, FileLock(folder / "lock"):
        waiting = pool.submit(read, twelve, 5)
        while "waiting for another process" not in capfd.readouterr().out:
            assert not waiting.done()
            time.sleep(0.01)
        assert len(list((folder / "images").iterdir())) == 3
    assert ids(waiting.result()) == [1, 2, 3, 4, 5]


def test_files_that_were_changed_are_read_anew(twelve):
    read(twelve, 3)
    parquet(twelve, [row(i) for i in range(21, 25)], CATS)
    assert ids(read(twelve, 3)) == [21, 22, 23]


@pytest.mark.slow
def test_a_sample_is_the_same_every_time_and_another_by_each_seed(process, twelve, cache, monkeypatch):
    monkeypatch.setattr(hub, "SHUFFLE_BUFFER", 4)
    drawn = [ids(read(twelve, 6, sample_seed=seed)) for seed in (0, 1, 2)]
    assert all(len(set(sample)) == 6 for sample in drawn)
    assert len({tuple(sample) for sample in [*drawn, range(1, 7)]}) == 4
    shutil.rmtree(cache)
    assert ids(read(twelve, 3, sample_seed=1)) == drawn[1][:3]
    assert ids(read(twelve, 6, sample_seed=1)) == drawn[1]
    shutil.rmtree(cache)
    child = process(cache, twelve, 6, 1)
    child.join()
    assert child.exitcode == 0
    monkeypatch.setattr(datasets, "load_dataset", None)
    assert ids(read(twelve, 6, sample_seed=1)) == drawn[1]


def test_every_row_is_drawn_about_as_often(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "SHUFFLE_BUFFER", 8)
    folder = parquet(tmp_path / "thirty", [row(i) for i in range(30)], CATS, shards=3)
    stream = datasets.load_dataset(str(folder), streaming=True)["train"].select_columns(["image_id"])
    counts = np.zeros(30)
    for seed in range(60):
        counts[[row["image_id"] for row in hub._shuffled(stream, seed).take(10)]] += 1
    assert counts.min() > 7 and counts.max() < 33  # 20 expected, give or take 3.7


def test_samples_of_other_data_sets(demo, demo_val, server, tmp_path):
    write_yolo(demo_val, tmp_path / "yolo")
    write_voc(demo_val, tmp_path / "voc" / "train", tmp_path / "voc" / "train")
    write_voc(demo_val, tmp_path / "voc" / "val", tmp_path / "voc" / "val")
    explicit = {f"{split}_{part}": str(demo / place) for split in ("train", "val") for part, place in (
        ("json", f"annotations/instances_{split}2017.json"), ("images_dir", f"{split}2017"))}  # fmt: skip
    sources = [(demo, {}), ("none", explicit), (tmp_path / "yolo", {}), (tmp_path / "voc", {}), ("coco-official", {})]
    for data, parts in sources:
        whole = ids(read(data, **parts))
        server.requested.clear()
        samples = [ids(read(data, 3, sample_seed=seed, **parts)) for seed in (0, 0, 1, 2, 3)]
        assert samples[0] == samples[1] and len({tuple(sample) for sample in samples}) > 2
        for sample in samples:
            assert len(sample) == 3 and sample == [key for key in whole if key in sample]
        assert ids(read(data, sample_seed=1, **parts)) == whole
        assert set(samples[0]) < set(ids(read(data, 5, sample_seed=0, **parts)))
    both = [[ids(read(tmp_path / "yolo", 3, split, sample_seed=s)) for s in range(3)] for split in ("train", "val")]
    assert both[0] != both[1]  # of the same images, drawn apart


def test_of_official_coco_only_the_sample_is_fetched(server, tmp_path):
    sample = ids(read("coco-official", 2, sample_seed=4))
    fetched = sorted(name for name in server.requested if name.endswith(".jpg"))
    assert fetched == [f"train2017/{key:012d}.jpg" for key in sample]
    listed = tmp_path / "ids.txt"
    listed.write_text("train 36\ntrain 285\ntrain 9\ntrain 42\n")
    sample = ids(read("coco-official", 2, sample_seed=4, image_ids=str(listed)))
    assert len(sample) == 2 and sample == [key for key in (36, 285, 9, 42) if key in sample]


XYWH = [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in BOXES]
NORMALISED = (np.array(BOXES) / [60, 30, 60, 30]).tolist()
AS_LIST = [{"bbox": box, "label": name} for box, name in zip(BOXES, ("cat", "dog"), strict=True)]


@pytest.mark.parametrize(
    "objects, printed",
    [
        ({"bbox": XYWH, "category": [0, 1]}, "boxes read as xywh: 0 of 8 fit as xyxy, 8 of 8 fit as xywh"),
        ({"bbox": NORMALISED, "category": [0, 1], "area": [0.1, 0.2]}, "read as normalised coordinates"),
        ({"bbox": BOXES, "label": [5, 7]}, "numbers and no names: class 5, class 7"),
        ({"bbox": BOXES, "categories": ["cat", "dog"]}, "boxes read as xyxy: 8 of 8 fit as xyxy, 0 of 8 fit as xywh"),
        (AS_LIST, "boxes read as xyxy"),
    ],
)
def test_what_hub_data_sets_differ_in(tmp_path, capsys, objects, printed):
    rows = [{"image": {"bytes": png(i), "path": None}, "objects": objects} for i in range(4)]
    declared = CATS if "category" in objects else None
    data = read(parquet(tmp_path / "some", rows, declared), 4)
    names = ("class 5", "class 7") if "label" in objects else ("cat", "dog")
    assert data.class_names == names and ids(data) == [1, 2, 3, 4] and data.notes == ()
    for index in range(4):
        boxes, labels, crowd = data.image_boxes(index)
        assert torch.allclose(boxes, torch.tensor(BOXES), atol=1e-3)
        assert labels.tolist() == [0, 1] and not crowd.any()
    assert data.areas[:2] == pytest.approx([100, 240])
    assert printed in capsys.readouterr().out


def test_the_box_format_may_be_given(twelve, capsys):
    wrong = read(twelve, 2, box_format="xywh")
    assert wrong.boxes[:2].tolist() == BOXES
    assert "read as" not in capsys.readouterr().out
    assert read(twelve, 2, box_format="xyxy").fingerprint() == read(twelve, 2).fingerprint() != wrong.fingerprint()


@pytest.mark.parametrize("normalised", [False, True])
def test_boxes_by_their_centres(tmp_path, capsys, normalised):
    """Images are of 60 x 30 pixels. The second box of each would also fit as xywh."""
    boxes = np.array([[50.0, 20.0, 16.0, 18.0], [20.0, 10.0, 8.0, 6.0]]) / ([60, 30, 60, 30] if normalised else 1)
    parquet(tmp_path / "some", [row(i, objects={"bbox": boxes.tolist(), "category": [0, 0]}) for i in (1, 2)], CATS)
    data = read(tmp_path / "some", 1)
    assert np.allclose(data.boxes, [[42, 11, 16, 18], [16, 7, 8, 6]])
    assert "boxes read as cxcywh: 0 of 2 fit as xyxy, 1 of 2 fit as xywh, 2 of 2" in capsys.readouterr().out


def test_one_box_format_for_all_splits(tmp_path, capsys):
    folder = tmp_path / "some"
    for split, box in (("train", [40.0, 20.0, 15.0, 8.0]), ("val", [5.0, 5.0, 25.0, 20.0])):
        parquet(folder, [row(i, objects={"bbox": [box], "category": [0]}) for i in (1, 2)], CATS, split)
    unknown = read(folder, 2, "val").image_boxes(0)[0].tolist()
    assert unknown == [[5, 5, 25, 20]] and "2 of 2 fit as xyxy, 2 of 2 fit as xywh" in capsys.readouterr().out
    assert read(folder, 2).image_boxes(0)[0].tolist() == [[40, 20, 55, 28]]
    assert read(folder, 2, "val").image_boxes(0)[0].tolist() == [[5, 5, 30, 25]]
    assert read(folder, 2, "val", sample_seed=1).image_boxes(0)[0].tolist() == [[5, 5, 30, 25]]
    assert read(folder, 2, "val", box_format="xyxy").image_boxes(0)[0].tolist() == unknown


def test_string_ids_are_numbered_and_crowds_kept(tmp_path):
    objects = {"bbox": BOXES, "category": [0, 1], "iscrowd": [1, 0]}
    rows = [row(0, image_id=f"beach_{i}", objects=objects) for i in range(4)]
    data = read(parquet(tmp_path / "some", rows, CATS))
    assert ids(data) == [1, 2, 3, 4] and data.crowd.tolist() == [True, False] * 4


def test_the_names_of_coco_get_its_ids(tmp_path):
    names = list(COCO_IDS)
    objects = {"bbox": BOXES, "category": [names.index("person"), names.index("toothbrush")]}
    data = read(parquet(tmp_path / "some", [row(i, objects=objects) for i in (4, 2)], datasets.ClassLabel(names=names)))
    assert data.category_ids == tuple(COCO_IDS.values()) and ids(data) == [4, 2]
    assert [data.category_ids[label] for label in data.labels] == [1, 90, 1, 90]


def test_what_is_wrong_with_rows_is_counted(tmp_path, capsys):
    two = {"bbox": BOXES, "category": [0], "area": None}
    odd = {"bbox": [[1.0, 2.0], [5.0, 5.0, float("nan"), 9.0], BOXES[0]], "category": [0, 0, -1], "area": [1.0]}
    rows = [
        row(1),
        row(2, image={"bytes": b"no image", "path": None}),
        row(3, objects=two),
        row(4, image=None),
        row(1, width=60),
        row(6, image_id=None),
        row(7, objects=odd),
        row(8, objects=None),
        row(9, width=None, height=None, image={"bytes": png(9, "JPEG"), "path": None}),
        row(10, width=61),
    ]
    folder = parquet(tmp_path / "some", rows, CATS, shards=1)
    for _ in range(2):  # likewise from the cache
        data = read(folder)
        assert ids(data) == [1, 7, 8, 9] and len(data.labels) == 4
        assert data.images[-1].path.suffix == ".jpg" and data.images[-1].width == 60
        printed = capsys.readouterr().out
        for note in (
            "left out 1 rows that have not as many boxes as categories (row 3)",
            "left out 2 rows without an image in the data set or without their image_id (row 4, row 6)",
            "left out 1 rows with the image_id of an earlier one (row 5)",
            "left out 2 objects without a box (000000000007.png)",
            "left out 1 boxes of a category that is not listed (000000000007.png)",
            "left out 1 images that cannot be read (000000000002.jpg)",
            "left out 1 images of another size than annotated (000000000010.png)",
        ):
            assert note in printed
    with pytest.raises(InputError, match="refused by --strict"):
        read(folder, strict=True)


def test_images_beside_the_metadata(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    lines = []
    for i in range(3):
        (folder / f"{i}.png").write_bytes(png(i))
        lines.append(f'{{"file_name": "{i}.png", "objects": {{"bbox": {XYWH}, "categories": [0, 1]}}}}\n')
    (folder / "metadata.jsonl").write_text("".join(lines))
    for limit in (2, 3):
        _, images, notes = hub_split(str(folder), "train", ("train",), limit)
        assert [p.read_bytes() for p in sorted(images.iterdir())] == [png(i) for i in range(limit)] and not notes
    _, images, notes = hub_split(str(folder), "train", ("train",), 3, 7)
    assert sorted(p.read_bytes() for p in images.iterdir()) == sorted(png(i) for i in range(3)) and not notes


def test_no_row_can_name_a_file_outside_the_data_set(tmp_path):
    folder = tmp_path / "some"
    for path in (tmp_path / "secret.png", folder / "own.png"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(1))
    with zipfile.ZipFile(tmp_path / "secret.zip", "w") as archive:
        archive.write(tmp_path / "secret.png", "a.png")
    shutil.copy(tmp_path / "secret.zip", folder / "own.zip")
    secret = f"{tmp_path}/secret.png"
    paths = [secret, f"file://{secret}", f"{folder}/../secret.png", f"zip://a.png::{tmp_path}/secret.zip"]
    paths += ["secret.png", f"http://a::{folder}/own.png", f"simplecache::{secret}"]
    paths += [f"{folder}/own.png", f"zip://a.png::{folder}/own.zip"]
    rows = [row(i, image={"bytes": None, "path": path}) for i, path in enumerate(paths, 1)]
    data = read(parquet(folder, rows, CATS, shards=1))
    assert ids(data) == [8, 9] and f"left out {len(paths) - 2} rows without an image" in " ".join(data.notes)


def test_other_tables_than_detection_sets_are_refused_in_a_line(twelve, tmp_path):
    table = parquet(tmp_path / "other", [{"image": {"bytes": png(i), "path": None}, "label": i} for i in range(2)])
    with pytest.raises(InputError, match=r"is no detection set: .*, but image, label"):
        read(table)
    with pytest.raises(InputError, match="has the splits train, none of val"):
        read(twelve, split="val")


def test_damaged_files_end_in_a_line_and_keep_what_came_before(twelve):
    second = twelve / "data" / "train-00001-of-00002.parquet"
    second.write_bytes(second.read_bytes()[:100])
    with pytest.raises(InputError, match="broke off after 6 rows") as caught:
        read(twelve)
    assert "\n" not in str(caught.value) and ids(read(twelve, 6)) == [1, 2, 3, 4, 5, 6]
    with pytest.raises(InputError, match="broke off after 0 rows") as caught:
        read(twelve, 2, sample_seed=1)  # which opens every file first
    assert "\n" not in str(caught.value)


def test_without_network(cache, twelve, monkeypatch):
    begin = time.monotonic()
    with pytest.raises(
        InputError, match=r"data some/other is not a folder here and cannot be fetched from the hub"
    ) as caught:
        read("some/other", 3)
    assert time.monotonic() - begin < 3 and "\n" not in str(caught.value)
    expected = contents(read(twelve, 4))
    shutil.move(next(cache.glob("twelve-*")), cache / "some--set")
    assert contents(read("some/set", 4)) == expected
    with pytest.raises(InputError, match="4 of its images are in the cache: request no more"):
        read("some/set", 5)


@pytest.mark.real
@pytest.mark.parametrize("split, limit, seed", [("train", 0, -1), ("train", 40, 2), ("val", 8, -1)])
def test_the_hub_copy_is_the_same_as_coco_itself(assets, split, limit, seed):
    found = read(assets / "hub-sample", limit, split, sample_seed=seed)
    whole = read(assets / "coco-subset", 0, split)
    assert len(found) == (limit or 64) and found.notes == ()
    index = {image.id: i for i, image in enumerate(whole.images)}
    coco = whole.select(np.array([index[key] for key in ids(found)]))
    single = ~coco.crowd  # the hub has no crowds
    assert (found.category_ids, found.class_names) == (coco.category_ids, coco.class_names)
    assert np.allclose(found.boxes, coco.boxes[single], atol=0.02) and not found.crowd.any()
    assert (found.labels == coco.labels[single]).all() and np.allclose(found.areas, coco.areas[single], atol=1)
    for ours, theirs in zip(found.images, coco.images, strict=True):
        assert (ours.id, ours.width, ours.height) == (theirs.id, theirs.width, theirs.height)
        assert ours.path.read_bytes() == theirs.path.read_bytes()
