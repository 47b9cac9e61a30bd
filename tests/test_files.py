"""The cache folder."""

import pwd
from pathlib import Path

import pytest

from common.console import InputError
from common.files import cache_folder


def test_a_user_without_a_home_folder_must_name_the_cache(monkeypatch, tmp_path):
    def unknown(_user):
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "DETECTION_CACHE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="set DETECTION_CACHE to a folder"):
        cache_folder("features")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("features") == Path(tmp_path, "dinov2-detection", "features")
    monkeypatch.setenv("DETECTION_CACHE", str(tmp_path / "own"))
    assert cache_folder("a", "b") == Path(tmp_path, "own", "a", "b")
