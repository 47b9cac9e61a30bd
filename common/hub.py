"""Models on the hub: their names, and the folder that their files are fetched to."""

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from common.console import InputError

HUB = "hub:"  # in front of a model's name where it could be a file's
HUB_ID = r"\w[\w.-]*/[\w.-]+"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
OPTIONAL = ("preprocessor_config.json",)  # how a detector of transformers wants its images


def hub_name(name: str) -> str:
    """`hub:` in front of a name that can only be one of the hub: user/name without suffix, and no file or folder."""
    is_id = re.fullmatch(HUB_ID, name) and not Path(name).suffix and not Path(name).exists()
    return f"{HUB}{name}" if is_id else name


def located(name: str) -> str:
    """The folder of the detector `hub:user/name`, fetched once; any other name as it is.

    Raises:
        InputError: no such name, or what `hub_folder` raises.
    """
    if not name.startswith(HUB):
        return name
    if not re.fullmatch(HUB_ID, name.removeprefix(HUB)):
        raise InputError(f"{name}: a model on the hub is named hub:user/name")
    return str(hub_folder(name.removeprefix(HUB), "detector", "name one on this machine"))


def hub_folder(name: str, kind: str, advice: str) -> Path:
    """Fetch a model from the hub, once; later calls read the hub library's cache and need no network.

    Args:
        name: user/name.
        kind: of the model, and what to do without it, for the message.

    Returns:
        The folder of its config.json, model.safetensors, and those of OPTIONAL that it has.

    Raises:
        InputError: it is not in the cache, and the hub cannot be reached or refuses it.
    """
    try:
        return _files(name, local_files_only=True)
    except LocalEntryNotFoundError:
        pass
    try:  # hf_hub_download retries for 20 s where there is no network, this request does not
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(name, CONFIG), timeout=5)
        return _files(name)
    except Exception as error:  # the hub's library raises OSErrors, as documented, and those of its HTTP client
        reason = "the hub can't be reached"
        if isinstance(error, HfHubHTTPError):
            reason = "the hub refuses it (no such model, or one that needs a token)"
        raise InputError(f"{kind} {name} is not in the cache and {reason}: {advice}") from error


def _files(name: str, local_files_only: bool = False) -> Path:
    folder = [huggingface_hub.hf_hub_download(name, f, local_files_only=local_files_only) for f in (WEIGHTS, CONFIG)]
    for optional in OPTIONAL:
        try:
            huggingface_hub.hf_hub_download(name, optional, local_files_only=local_files_only)
        except EntryNotFoundError:  # the hub library's LocalEntryNotFoundError is one as well
            continue
    return Path(folder[-1]).parent
