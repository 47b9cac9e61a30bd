"""Fetching official COCO from a small server on this machine, also one that fails."""

import io
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import OFFICIAL_IDS, ROOT, data_flags, jpeg, official_archive, official_instances

from common.console import InputError
from common.data import official
from common.data.sources import load_split


def read(split, limit=0, ids=""):
    return load_split(data_flags("coco-official", limit, image_ids=str(ids)), split)


def test_only_what_is_requested_is_fetched_and_only_once(server):
    data = read("train", limit=3)
    assert [p.id for p in data.images] == [9, 25, 30] and data.class_names == ("dog",) and len(data.labels) == 3
    assert sorted(server.requested) == [official.ARCHIVE, *(f"train2017/{i:012d}.jpg" for i in (9, 25, 30))]
    server.requested.clear()
    assert read("train", limit=3).fingerprint() == data.fingerprint() and not server.requested
    read("train", limit=4)
    read("val", limit=1)
    assert server.requested == ["train2017/000000000034.jpg", "val2017/000000000139.jpg"]


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("fault", ["drop", "slow", "web page", "busy"])
def test_faults_of_the_server_are_overcome(server, cache, fault, times):
    server.faults = {name: [fault] * times for name in server.files}
    data = read("train")
    assert data.notes == () and [p.path.read_bytes() for p in data.images] == [jpeg(i) for i in OFFICIAL_IDS["train"]]
    assert not list(cache.rglob(".*"))  # no parts of files are left behind


def test_what_cannot_be_fetched_is_reported_and_the_next_run_goes_on(server):
    good = server.files.pop("train2017/000000000030.jpg")
    with pytest.raises(InputError, match=r"1 of 6 images could not be fetched.*404 Client Error") as caught:
        read("train")
    assert "\n" not in str(caught.value)
    server.files["train2017/000000000030.jpg"] = good
    server.requested.clear()
    assert len(read("train")) == 6 and len(server.requested) == 1


def test_an_image_that_was_damaged_on_the_disk_is_fetched_again(server):
    path = read("train", limit=2).images[1].path
    path.write_bytes(path.read_bytes()[:200])
    server.requested.clear()
    data = read("train", limit=2)
    assert data.notes == () and path.read_bytes() == jpeg(25) and server.requested == ["train2017/000000000025.jpg"]


def test_two_processes_unpack_the_archive_once(server):
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda limit: read("train", limit=limit), (1, 2))
    assert (len(first), len(second)) == (1, 2) and server.requested.count(official.ARCHIVE) == 1


def test_an_archive_that_is_no_zip_file_or_lacks_a_part_and_no_server_at_all(server, monkeypatch):
    server.files[official.ARCHIVE] = b"no archive"
    with pytest.raises(InputError, match="File is not a zip file"):
        read("train")
    file = io.BytesIO()
    zipfile.ZipFile(file, "w").close()
    server.files[official.ARCHIVE] = file.getvalue()
    with pytest.raises(InputError, match="archive is damaged"):
        read("train")
    monkeypatch.setenv("COCO_URL", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="cannot fetch") as caught:
        read("train")
    assert "\n" not in str(caught.value)


def test_annotations_cannot_write_elsewhere(server, cache):
    def hostile(part):
        content = official_instances(part)
        content["images"][0]["file_name"] = "../../evil.jpg"
        return content

    server.files[official.ARCHIVE] = official_archive(hostile)
    data = read("train")
    assert len(data) == 5 and "lead out of their folder" in data.notes[0] and not list(cache.parent.rglob("evil*"))


def test_images_by_id_from_both_parts(server, tmp_path):
    ids = tmp_path / "ids.txt"
    ids.write_text("# a remark\ntrain 285\ntrain 9  # from the other part\n\nval 42\n")
    assert [p.id for p in read("train", ids=ids).images] == [285, 9]
    assert [p.id for p in read("val", ids=ids).images] == [42]
    ids.write_text("train 7777")
    with pytest.raises(InputError, match=r"coco-official lacks 1 of the 1 requested images \(7777\)"):
        read("train", ids=ids)


@pytest.mark.real
def test_the_ids_of_the_table_are_those_of_its_images(assets):
    for split in ("train", "val"):
        plain = load_split(data_flags(str(assets / "coco-subset")), split)
        by_id = data_flags(str(assets / "coco-subset"), image_ids=str(ROOT / "docs" / "coco_subset_ids.txt"))
        assert load_split(by_id, split).fingerprint() == plain.fingerprint()
