"""Fetching official COCO from a small server on this machine that has bad days."""

import hashlib
import io
import json
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from common.console import InputError
from common.data import official
from common.data.sources import DataSource, load_split, read_image_ids

IDS = {"train": (9, 25, 30, 34, 36, 42), "val": (139, 285, 632)}


def jpeg(number):
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def instances(part):
    ids = IDS[part]
    return {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg", "width": 40, "height": 30} for i in ids],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 18, "bbox": [1, 2, 10, 9], "area": 90, "iscrowd": 0} for i in ids
        ],
        "categories": [{"id": 18, "name": "dog"}],
    }


def archive(content=instances):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for part in IDS:
            packed.writestr(f"annotations/instances_{part}2017.json", json.dumps(content(part)))
    return file.getvalue()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A COCO server; `server.moods[path]` lists what happens at the next requests for a file, then all is well."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.lstrip("/")
            own.asked.append((name, self.headers.get("Range")))
            content = own.files.get(name)
            mood = own.moods[name].pop(0) if own.moods.get(name) else ""
            if mood == "busy" or content is None:
                return self.send_error(503 if mood else 404)
            if mood == "web page":
                content = b"<html>please log in</html>"
            if mood == "damaged":
                content = content[: len(content) // 2] + bytes(len(content) - len(content) // 2)
            if mood == "slow":
                time.sleep(0.3)
            begin = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(content) - begin))
            if own.tagged:
                self.send_header("ETag", f'"{hashlib.md5(own.files[name]).hexdigest()}"')
            self.end_headers()
            rest = content[begin:]
            self.wfile.write(rest[: len(rest) // 2] if mood == "drop" else rest)
            if mood == "drop":
                self.wfile.flush()
                self.close_connection = True
            return None

        def log_message(self, *_):
            pass

    own = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    own.moods, own.asked, own.tagged = {}, [], True
    own.files = {official.ARCHIVE: archive()}
    own.files |= {f"{part}2017/{i:012d}.jpg": jpeg(i) for part, ids in IDS.items() for i in ids}
    threading.Thread(target=own.serve_forever, daemon=True).start()
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COCO_URL", f"http://127.0.0.1:{own.server_port}/")
    monkeypatch.setattr(official, "PAUSE", 0.01)
    yield own
    own.shutdown()
    own.server_close()


def read(split, limit=0, ids=""):
    return load_split(DataSource("coco-official", image_ids=str(ids)), split, limit)


def test_only_what_is_asked_for_is_fetched_and_only_once(server):
    data = read("train", limit=3)
    assert [p.id for p in data.pictures] == [9, 25, 30] and data.class_names == ("dog",) and len(data.labels) == 3
    assert sorted(name for name, _ in server.asked) == sorted(
        [official.ARCHIVE, *(f"train2017/{i:012d}.jpg" for i in (9, 25, 30))]
    )
    server.asked.clear()
    assert read("train", limit=3).fingerprint() == data.fingerprint() and not server.asked
    read("train", limit=4)
    read("val", limit=1)
    assert [name for name, _ in server.asked] == ["train2017/000000000034.jpg", "val2017/000000000139.jpg"]


@pytest.mark.parametrize("mood", ["drop", "slow", "damaged", "web page", "busy"])
def test_bad_days_of_the_server_are_borne(server, mood):
    server.moods = {name: [mood, mood] for name in server.files}
    data = read("train")
    assert len(data) == 6 and data.notes == ()
    assert all(p.path.read_bytes() == jpeg(p.id) for p in data.pictures)


def test_without_digests_pictures_must_at_least_be_decodable(server):
    server.tagged = False
    server.moods = {name: ["web page"] for name in server.files}
    assert len(read("train")) == 6


def test_a_broken_connection_goes_on_where_it_stopped(server):
    server.moods = {official.ARCHIVE: ["drop"]}
    read("val")
    ranges = [bytes_ for name, bytes_ in server.asked if name == official.ARCHIVE]
    assert ranges == [None, f"bytes={len(server.files[official.ARCHIVE]) // 2}-"]


def test_what_cannot_be_fetched_is_said_and_the_next_run_goes_on(server):
    good = server.files.pop("train2017/000000000030.jpg")
    with pytest.raises(InputError, match=r"1 of 6 pictures could not be fetched.*the server says 404") as caught:
        read("train")
    assert "\n" not in str(caught.value)
    server.files["train2017/000000000030.jpg"] = good
    server.asked.clear()
    assert len(read("train")) == 6 and len(server.asked) == 1


def test_no_server_at_all(server, monkeypatch):
    monkeypatch.setenv("COCO_URL", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="cannot fetch") as caught:
        read("train")
    assert "\n" not in str(caught.value)


def test_an_archive_that_is_none_or_lacks_a_part(server):
    server.files[official.ARCHIVE] = b"no archive"
    with pytest.raises(InputError, match="it came damaged"):
        read("train")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("other", "")
    server.files[official.ARCHIVE] = file.getvalue()
    with pytest.raises(InputError, match="was damaged"):
        read("train")


def test_annotations_cannot_write_elsewhere(server, tmp_path):
    def hostile(part):
        content = instances(part)
        content["images"][0]["file_name"] = "../../evil.jpg"
        return content

    server.files[official.ARCHIVE] = archive(hostile)
    with pytest.raises(InputError, match=r"evil\.jpg"):
        read("train")
    assert not list(tmp_path.rglob("evil*"))


def test_pictures_by_id_from_both_parts_and_from_a_folder(server, demo_val, tmp_path):
    ids = tmp_path / "ids.txt"
    ids.write_text("# a remark\ntrain 285\ntrain 9  # from the other part\n\nval 42\n")
    assert [p.id for p in read("train", ids=ids).pictures] == [285, 9]
    assert [p.id for p in read("val", ids=ids).pictures] == [42]
    assert [p.id for p in read("train", limit=1, ids=ids).pictures] == [285]
    ids.write_text("train 7777")
    with pytest.raises(InputError, match="has no picture 7777"):
        read("train", ids=ids)
    folder = demo_val.pictures[0].path.parent.parent
    chosen = [demo_val.pictures[i].id for i in (4, 1)]
    ids.write_text("".join(f"val {key}\n" for key in chosen))
    assert [p.id for p in load_split(DataSource(str(folder), image_ids=str(ids)), "val").pictures] == chosen
    ids.write_text("val 999")
    with pytest.raises(InputError, match="lacks 1 of the 1 pictures"):
        load_split(DataSource(str(folder), image_ids=str(ids)), "val")


@pytest.mark.parametrize("content", ["9", "train nine", "test 9", "train 9 9", "", "val 3"])
def test_files_of_no_ids(tmp_path, content):
    (tmp_path / "ids.txt").write_text(content)
    with pytest.raises(InputError):
        read_image_ids(tmp_path / "ids.txt", "train")
    with pytest.raises(InputError):
        read_image_ids(tmp_path / "none.txt", "train")


@pytest.mark.real
def test_the_ids_of_the_table_are_those_of_its_pictures(assets):
    from conftest import ROOT

    for split in ("train", "val"):
        plain = load_split(DataSource(str(assets / "coco-subset")), split)
        by_id = DataSource(str(assets / "coco-subset"), image_ids=str(ROOT / "docs" / "coco_subset_ids.txt"))
        assert load_split(by_id, split).fingerprint() == plain.fingerprint()
