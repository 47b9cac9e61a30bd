"""The hub: names of models, the folder that their files are fetched to, and what to do where it does not answer."""

import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import constants, errors, snapshot_download
from huggingface_hub.utils import disable_progress_bars

from common.console import InputError, last_line, to_one_line

log = logging.getLogger(__name__)
HUB = "hub:"  # in front of a model's name where it could be a file's
HUB_ID = r"\w[\w.-]*/[\w.-]+"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
FILES = [CONFIG, WEIGHTS, "preprocessor_config.json"]  # the last is how a detector of transformers wants its images
BUSY = (429, 500, 502, 503, 504)  # status codes after which another try is worth while
PATIENCE_S = 60  # of waiting for a busy hub or a weak connection, all tries together
RETRY_S = 25.0  # where the hub names no time
LOG_IN = "log in with `hf auth login` or HF_TOKEN"
# The first that an error or one of its causes is; {page} and {endpoint} are addresses.
CAUSES = (
    (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set"),
    (errors.GatedRepoError, f"it is gated: accept its terms at {{page}} and {LOG_IN}"),
    (errors.RevisionNotFoundError, "the hub no longer has its revision"),
    (errors.RepositoryNotFoundError, f"the hub has nothing of that name; where it is private, {LOG_IN}"),
    (errors.HfHubHTTPError, "the hub answers with the status {status}: run the same command later"),
    (httpx2.ConnectError, "{endpoint} cannot be reached: check the network, the proxy and HF_ENDPOINT"),
    (httpx2.TimeoutException, "the hub does not answer: run the same command later"),
    (httpx2.TransportError, "the connection broke off: the same command goes on"),
    (errors.FileMetadataError, "{endpoint} does not answer as a hub: check HF_ENDPOINT and the proxy"),
)
Answer = TypeVar("Answer")


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

    Raises InputError where it is not in the cache and cannot be fetched; `kind` says what was looked for, `advice`
    what to do without it.
    """
    with suppress(errors.LocalEntryNotFoundError):
        if _is_whole(folder := Path(snapshot_download(name, allow_patterns=FILES, local_files_only=True))):
            return folder
    log.info(f"fetching {kind} {name}")
    if not sys.stderr.isatty():
        disable_progress_bars()
    with hub_errors(f"{kind} {name} is not in the cache", name, advice):
        folder = Path(ask_hub(lambda: snapshot_download(name, allow_patterns=FILES)))
    if not _is_whole(folder):
        raise InputError(f"{kind} {name} has no {CONFIG} and {WEIGHTS} on the hub: {advice}")
    return folder


def _is_whole(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


@contextmanager
def hub_errors(what: str, place: str, advice: str) -> Iterator[None]:
    """Raises InputError for whatever the hub's clients raise: `what`, the cause and its mend, and an `advice`.

    `place` is the path of its page below the hub's address. The clients' own messages while they try again become a
    line of ours.
    """
    relay, clients = _Relay(logging.WARNING), [logging.getLogger(name) for name in ("huggingface_hub", "datasets")]
    before = [(client.handlers, client.propagate) for client in clients]
    for client in clients:
        client.handlers, client.propagate = [relay], False
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # they pass on what their HTTP client, file systems and formats raise
        raise InputError(f"{what}: {_cause_of(error, place)}; {advice}") from error
    finally:
        for client, (handlers, propagate) in zip(clients, before, strict=True):
            client.handlers, client.propagate = handlers, propagate


class _Relay(logging.Handler):
    """Says once what the clients say at each of their tries."""

    has_spoken = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self.has_spoken and re.search("(?i)retry|waiting", record.getMessage()):
            log.warning("the hub is busy or the connection weak: trying again")
            self.has_spoken = True


def ask_hub(request: Callable[[], Answer]) -> Answer:
    """What the request returns; where the hub is busy it is repeated after the time that the hub names."""
    waited = 0.0
    while True:
        try:
            return request()
        except Exception as error:
            seconds = _seconds_to_wait(error)
            if not seconds or waited + seconds > PATIENCE_S:
                raise
            log.warning(f"the hub is busy or the connection weak: trying again in {seconds:.0f} s")
            time.sleep(seconds)
            waited += seconds


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _seconds_to_wait(error: Exception) -> float:
    """0 where another try is of no use."""
    for link in _chain(error):
        if isinstance(link, httpx2.TransportError) and not isinstance(link, httpx2.ConnectError):
            return RETRY_S
        if isinstance(link, errors.HfHubHTTPError) and link.response is not None and link.response.status_code in BUSY:
            named = link.response.headers.get("Retry-After", "")
            return max(1.0, float(named)) if named.isdigit() else RETRY_S
    return 0.0


def _cause_of(error: Exception, place: str) -> str:
    chain = list(_chain(error))
    for kind, sentence in CAUSES:
        if found := next((link for link in chain if isinstance(link, kind)), None):
            status = getattr(getattr(found, "response", None), "status_code", "")
            return sentence.format(page=f"{constants.ENDPOINT}/{place}", endpoint=constants.ENDPOINT, status=status)
    return to_one_line(last_line(error), 200)
