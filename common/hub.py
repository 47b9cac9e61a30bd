"""Models on the hub: their names, and the folder that their files are fetched to."""

import re
from contextlib import suppress
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from common.console import InputError

HUB = "hub:"  # in front of a model's name where it could be a file's
HUB_ID = r"\w[\w.-]*/[\w.-]+"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
FILES = [CONFIG, WEIGHTS, "preprocessor_config.json"]  # the last is how a detector of transformers wants its images


def hub_name(name: str) -> str:
    """`hub:` in front of a name that can only be one of the hub: user/name without suffix, and no file or folder."""
    is_id = re.fullmatch(HUB_ID, name) and not Path(name).suffix and not Path(name).exists()
    return f"{HUB}{name}" if is_id else name


def located(name: str) -> str:
    """The folder of the detector `hub:user/name`, see `hub_folder`; any other name as it is."""
    if not name.startswith(HUB):
        return name
    if not re.fullmatch(HUB_ID, name.removeprefix(HUB)):
        raise InputError(f"{name}: a model on the hub is named hub:user/name")
    return str(hub_folder(name.removeprefix(HUB), "detector", "name one on this machine"))


def hub_folder(name: str, kind: str, advice: str) -> Path:
    """The folder of the model user/name, fetched once; later calls read the hub library's cache without a network.

    Raises InputError where it is not in the cache, and the hub cannot be reached, refuses it or lacks a file; `kind`
    says what was looked for, `advice` what to do without it.
    """
    with suppress(LocalEntryNotFoundError):
        if _is_whole(folder := Path(snapshot_download(name, allow_patterns=FILES, local_files_only=True))):
            return folder
    try:
        folder = Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as error:  # the hub's library raises OSErrors, as documented, and those of its HTTP client
        reason = "the hub can't be reached"
        if isinstance(error, HfHubHTTPError) or isinstance(error.__cause__, HfHubHTTPError):
            reason = "the hub refuses it (no such model, or one that needs a token)"
        raise InputError(f"{kind} {name} is not in the cache and {reason}: {advice}") from error
    if not _is_whole(folder):
        raise InputError(f"{kind} {name} has no {CONFIG} and {WEIGHTS} on the hub: {advice}")
    return folder


def _is_whole(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()
