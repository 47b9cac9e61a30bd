"""Names of files, and the folders of the user."""

import os
import pwd
from pathlib import Path

import pytest

from common.console import InputError
from common.files import atomic_write, cache_folder, link_or_copy, remove_leftovers


def test_a_user_without_a_home_folder_must_name_the_cache(monkeypatch, tmp_path):
    def unknown(_user):
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setenv("HOME", "")  # restored at the end
    for name in ("HOME", "XDG_CACHE_HOME", "DETECTION_CACHE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="set DETECTION_CACHE to a folder"):
        cache_folder("features")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("features") == Path(tmp_path, "dinov2-detection", "features")
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "own"))
    assert cache_folder("a", "b") == Path(tmp_path, "own", "a", "b")


def test_the_cache_may_be_named_from_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DETECTION_CACHE", "~/c")
    assert cache_folder("a") == tmp_path / "c" / "a"


@pytest.mark.parametrize("name", ["x" * 251 + ".jpg", "猫" * 83 + ".json"])  # 255 and 254 bytes
def test_names_as_long_as_the_file_system_allows(name, tmp_path):
    with atomic_write(tmp_path / name, "w") as file:
        file.write("complete")
    assert (tmp_path / name).read_text() == "complete"
    link_or_copy(tmp_path / name, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "other"])


def test_leftovers_are_removed_once_they_are_old(tmp_path):
    old, young = tmp_path / ".a.pth.1.tmp", tmp_path / ".b.pth.2.tmp"
    old.touch()
    young.touch()
    os.utime(old, (0, 0))
    (tmp_path / ".gone.3.tmp").symlink_to("nothing")  # as one that another process has just renamed
    remove_leftovers(tmp_path, age=3600)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.pth.2.tmp", ".gone.3.tmp"]
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".gone.3.tmp"]


@pytest.mark.parametrize("has_links", [True, False])
def test_another_name_of_a_file_does_not_follow_its_replacement(has_links, tmp_path, monkeypatch):
    if not has_links:
        monkeypatch.setattr(Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(OSError()))
    last, best = tmp_path / "last", tmp_path / "best"
    last.write_text("1")
    for _ in range(2):
        link_or_copy(last, best)
    with atomic_write(last, "w") as file:
        file.write("2")
    assert best.read_text() == "1" and sorted(path.name for path in tmp_path.iterdir()) == ["best", "last"]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_files_have_the_permissions_of_the_user(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "a", "w") as file:
            file.write("x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
