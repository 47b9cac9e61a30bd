"""Files that are complete or absent, their names, and the cache folder."""

import os
import pwd
import signal
from pathlib import Path

import pytest

from common.console import InputError, Interrupted
from common.files import atomic_folder, atomic_write, cache_folder, link_or_copy, remove_leftovers


def test_the_cache_folder_is_named_by_the_environment_or_below_the_home_folder(monkeypatch, tmp_path):
    def unknown(_user):
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "DETECTION_CACHE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="set DETECTION_CACHE to a folder"):
        cache_folder("features")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("features") == Path(tmp_path, "dinov2-detection", "features")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DETECTION_CACHE", "~/c")
    assert cache_folder("a", "b") == Path(tmp_path, "home", "c", "a", "b")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Interrupted(signal.SIGTERM)])
def test_a_write_that_fails_keeps_the_old_file_and_a_signal_is_a_signal(error, tmp_path):
    (tmp_path / "a.pth").write_text("old")
    with pytest.raises((InputError, Interrupted)) as caught, atomic_write(tmp_path / "a.pth", "w") as file:
        file.write("new")
        try:
            raise error
        except type(error):
            raise RuntimeError("unexpected pos")  # noqa: B904  torch.save turns it into an error of its own
    assert caught.value is error or ("cannot write" in str(caught.value) and "No space left" in str(caught.value))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.pth", "old")]


def test_of_two_processes_that_unpack_one_is_kept_and_a_full_disk_is_said(tmp_path):
    with pytest.raises(InputError, match=r"cannot write .*/full: No space left"), atomic_folder(tmp_path / "full"):
        raise OSError(28, "No space left on device")
    with atomic_folder(tmp_path / "a") as slow, atomic_folder(tmp_path / "a") as fast:
        (slow / "x").touch()
        (fast / "y").touch()
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["a", "a/y"]


@pytest.mark.parametrize("name", ["x" * 251 + ".jpg", "猫" * 83 + ".json"])  # 255 and 254 bytes
def test_names_as_long_as_the_file_system_allows_and_permissions_of_the_user(name, tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / name, "w") as file:
            file.write("complete")
    finally:
        os.umask(before)
    assert (tmp_path / name).read_text() == "complete" and (tmp_path / name).stat().st_mode & 0o777 == 0o640
    link_or_copy(tmp_path / name, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "other"])


def test_writing_over_a_link_keeps_the_file_that_it_points_to(tmp_path):
    precious, link = tmp_path / "precious", tmp_path / "a.pth"
    precious.write_text("content")
    link.symlink_to(precious)
    with atomic_write(link, "w") as file:
        file.write("new")
    assert precious.read_text() == "content" and link.read_text() == "new" and not link.is_symlink()


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
