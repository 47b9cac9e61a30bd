"""Names of files, and the folders of the user."""

import os
import pwd
from pathlib import Path

import pytest

from common.console import InputError
from common.files import atomic_write, cache_folder, ensure_home, remove_leftovers


def test_a_user_without_a_home_folder_must_name_the_cache(monkeypatch, tmp_path):
    def unknown(_user):
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setenv("HOME", "")  # restored at the end
    for name in ("HOME", "XDG_CACHE_HOME", "DETECTION_CACHE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="set DETECTION_CACHE to a folder"):
        cache_folder("features")
    ensure_home()
    assert "HOME" not in os.environ
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("features") == Path(tmp_path, "dinov2-detection", "features")
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "own"))
    assert cache_folder("a", "b") == Path(tmp_path, "own", "a", "b")
    ensure_home()
    assert Path.home() == tmp_path / "own"


def test_the_cache_may_be_named_from_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DETECTION_CACHE", "~/c")
    assert cache_folder("a") == tmp_path / "c" / "a"


def test_a_home_folder_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "own"))
    ensure_home()
    assert Path.home() == tmp_path / "home"


@pytest.mark.parametrize("name", ["x" * 251 + ".jpg", "猫" * 83 + ".json"])  # 255 and 254 bytes
def test_names_as_long_as_the_file_system_allows(name, tmp_path):
    (tmp_path / f".{name[:60]}.12345678").touch()
    with atomic_write(tmp_path / name, "w") as file:
        file.write("complete")
    assert (tmp_path / name).read_text() == "complete"
    remove_leftovers(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
