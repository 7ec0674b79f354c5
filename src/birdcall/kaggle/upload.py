"""Upload what is staged with Kaggle's own client (the extra ``kaggle``): dataset, then kernel."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from birdcall import __version__
from birdcall.kaggle.manifest import DATASET_METADATA, KERNEL_METADATA, MANIFEST_FILE, find_changes
from birdcall.storage.files import UserError, shorten_list
from birdcall.storage.locks import locked

if TYPE_CHECKING:
    from kaggle.api.kaggle_api_extended import KaggleApi

logger = logging.getLogger(__name__)

PROCESSING_SECONDS = 1800.0  # how long Kaggle may process a dataset before we stop waiting
_POLL_SECONDS = 10.0
_REPORT_SECONDS = 60.0  # the log shows at least so often that we wait
# How often the client resumes one file. Each time it retries for 6 minutes without a connection.
_UPLOAD_ATTEMPTS = 2
_READY, _FAILED = "ready", ("failed", "deleted")  # words of Kaggle for the status of a dataset
_NOT_FOUND = (403, 404)  # of what does not exist, or is somebody else's: Kaggle does not tell which
_PROGRESS = ("Starting upload", "Upload successful", "Already uploaded")  # lines of the client
_ADVICE = {
    400: "correct the metadata that is staged",
    401: "make a new token at https://www.kaggle.com/settings/api",
    403: "check that --owner is the user of the credentials, and that Kaggle has verified the "
    "account (phone number, rules of the competition)",
    404: "check --owner and the names in the metadata that is staged",
    409: "another dataset or kernel of yours has the title; rename or delete it on Kaggle",
    429: "these are too many requests for Kaggle; wait some minutes, then run the command again",
}


@dataclass(frozen=True)
class DatasetVersion:
    """A version of a dataset on Kaggle. status: Kaggle's word for it, ``ready`` once it mounts."""

    id: str  # owner/name
    version: int  # 0 before the first has been processed
    status: str

    @property
    def url(self) -> str:
        return f"https://www.kaggle.com/datasets/{self.id}"


@dataclass(frozen=True)
class PushedKernel:
    """A version of a kernel that Kaggle runs."""

    id: str  # owner/name
    version: int
    url: str
    sees_own_output: bool  # the next version resumes from the output of this one


def require_uploadable(build: Path) -> None:
    """Raise what `upload_dataset` and `push_kernel` would raise before the first request."""
    _read_metadata(build / "dataset" / DATASET_METADATA)
    _read_metadata(build / "kernel" / KERNEL_METADATA)


def connect(owner: str | None = None) -> KaggleApi:
    """Return Kaggle's client with the credentials that its own commands would use.

    A token is sent to Kaggle, which answers whose it is; a key is not. ``UserError`` without the
    extra, without credentials, if Kaggle refuses them, or if they are not those of ``owner``.
    """
    with _client("the credentials"):
        with _extra():
            # This looks for credentials, and prints how to get some; `authenticate` looks again,
            # and raises what is wrong with them.
            from kaggle.api.kaggle_api_extended import KaggleApi

        api = KaggleApi()
        # Its option --verbose, or VERBOSE=1, prints the headers of requests: the key is in them.
        api.args = [argument for argument in api.args if argument not in ("-v", "--verbose")]
        api.MAX_UPLOAD_RESUME_ATTEMPTS = _UPLOAD_ATTEMPTS
        try:
            api.authenticate()
        except SystemExit as error:
            raise UserError(
                "no valid credentials of Kaggle were found; make a token at "
                "https://www.kaggle.com/settings/api and write it to ~/.kaggle/access_token, or "
                "set KAGGLE_API_TOKEN"
            ) from error
    if owner is not None:
        _require_owner(owner, user_of(api), "--owner")
    return api


def user_of(api: KaggleApi) -> str:
    """Return the user name on Kaggle to which the credentials belong."""
    return str(api.config_values[api.CONFIG_NAME_USER])


def upload_dataset(api: KaggleApi, build: Path) -> DatasetVersion:
    """Upload ``build/dataset``, as a new dataset or as its next version, until it can be mounted.

    The staged files stay as they are. Kaggle unpacks each folder, which the client sends as a zip,
    under its name. After an error the same call uploads again, zips from their beginning.

    Raises ``UserError`` if the staged files are not those of the manifest, if Kaggle refuses them,
    without a connection, and if Kaggle still processes them after ``PROCESSING_SECONDS``.
    """
    folder = (build / "dataset").resolve()  # the client knows a file by its path when it resumes
    with locked(build):
        dataset_id = _read_metadata(build / "dataset" / DATASET_METADATA, user_of(api))["id"]
        if changes := find_changes(folder):
            raise UserError(
                f"{folder}: not as packaged: {shorten_list(list(changes))}; stage it again"
            )
        before = _find_dataset(api, dataset_id)
        if before is not None and before.status not in (_READY, *_FAILED):
            before = _wait_until_ready(api, dataset_id)  # until then Kaggle takes no next version
        # The client's default leaves folders out.
        options: Any = {"quiet": not logger.isEnabledFor(logging.INFO), "dir_mode": "zip"}
        with _client(f"{build / 'dataset'}: the upload"):
            if before is None:
                response = api.dataset_create_new(str(folder), **options)
            else:
                manifest = hashlib.sha256((folder / MANIFEST_FILE).read_bytes()).hexdigest()
                notes = f"birdcall {__version__}, manifest {manifest[:16]}"  # which package it is
                response = api.dataset_create_version(str(folder), notes, **options)
        if response.error or response.status == "error":
            raise UserError(f"{build / 'dataset'}: Kaggle refuses it: {_one_line(response.error)}")
        return _wait_until_ready(api, dataset_id, before, is_sent=True)


def push_kernel(api: KaggleApi, build: Path) -> PushedKernel:
    """Push ``build/kernel``, which Kaggle then runs, once its dataset is ready.

    Raises ``UserError`` if its dataset is not on Kaggle, if Kaggle refuses the kernel or one of its
    sources, without a connection, and if the dataset is not ready after ``PROCESSING_SECONDS``.
    """
    user = user_of(api)
    with locked(build):
        metadata = _read_metadata(build / "kernel" / KERNEL_METADATA, user)
        for source in metadata.get("dataset_sources", ()):
            if source.split("/")[0].lower() != user.lower():
                continue  # Kaggle tells the status of one's own datasets alone
            dataset = _find_dataset(api, source)
            if dataset is None:
                raise UserError(
                    f"{source}, which the kernel reads, is not on Kaggle; upload it first: "
                    "birdcall package --upload"
                )
            if dataset.status != _READY:
                _wait_until_ready(api, source)
        with _client(f"{build / 'kernel'}: the push"):
            response = api.kernels_push(str(build / "kernel"))
    if response.error:
        raise UserError(f"{build / 'kernel'}: Kaggle refuses it: {_one_line(response.error)}")
    sees_own_output = metadata["id"] in metadata.get("kernel_sources", ())
    refused = {
        *response.invalid_dataset_sources,
        *response.invalid_competition_sources,
        *response.invalid_kernel_sources,
        *response.invalid_model_sources,
    }
    if sees_own_output and response.version_number == 1:
        refused.discard(metadata["id"])  # there is no output yet
    if refused:
        raise UserError(
            f"{metadata['id']}: version {response.version_number} runs without "
            f"{', '.join(sorted(refused))}, which Kaggle refuses; accept the rules on the page of "
            "the competition, upload the dataset, and push again"
        )
    return PushedKernel(
        metadata["id"], response.version_number, response.url, sees_own_output=sees_own_output
    )


def _read_metadata(path: Path, user: str | None = None) -> dict[str, Any]:
    """Return staged metadata whose title gives the name in the id, and whose owner is ``user``.

    Without the former Kaggle makes a second dataset or kernel with another name.
    """
    with _extra():
        from slugify import slugify  # the client's own rule

    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: nothing is staged there; `birdcall package --data DIR` stages a package"
        )
    try:
        metadata: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        title, (owner, slug) = metadata["title"], metadata["id"].split("/")
        from_title = slugify(title)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not metadata with a title and an id owner/name; stage the package again"
        ) from error
    if from_title != slug:
        raise UserError(f"{path}: the title {title!r} does not give the name in the id, {slug!r}")
    if user is not None:
        _require_owner(owner, user, str(path))
    return metadata


def _require_owner(owner: str, user: str, where: str) -> None:
    if owner.lower() != user.lower():
        raise UserError(
            f"{where}: the owner is {owner!r}, but the credentials are those of {user!r}; stage "
            f"the package with --owner {user}"
        )


# --- the status of a dataset ----------------------------------------------------------------------


def _find_dataset(api: KaggleApi, dataset_id: str) -> DatasetVersion | None:
    """Return the version of a dataset that Kaggle has now, and its status; None without one."""
    from requests import HTTPError

    answers: dict[str, Any] = {}
    for field in ("status", "current_version_number"):
        with _client(f"the status of {dataset_id}"):
            try:
                answers |= json.loads(api.dataset_status(dataset_id, format=f"json({field})"))
            except HTTPError as error:
                if error.response.status_code not in _NOT_FOUND:
                    raise
                break  # there is no dataset, or no version of it yet
    if "status" not in answers:
        return None
    return DatasetVersion(dataset_id, answers.get("current_version_number", 0), answers["status"])


def _wait_until_ready(
    api: KaggleApi, dataset_id: str, before: DatasetVersion | None = None, *, is_sent: bool = False
) -> DatasetVersion:
    """Ask until Kaggle has processed a dataset; where one was sent, until it has a newer version.

    Kaggle may call the old version ready, or not know the new one, for some seconds after that.
    A request that fails is no reason to stop: the files have arrived.
    """
    n_before = before.version if before is not None else 0
    had_failed = before is not None and before.status in _FAILED
    started = reported = time.monotonic()
    reported_state = ""
    while True:
        try:
            dataset, state = _find_dataset(api, dataset_id), "not listed yet"
        except UserError as error:
            dataset, state = None, str(error)
        if dataset is not None:
            is_new = dataset.version > n_before or not is_sent
            if is_new and dataset.status == _READY:
                return dataset
            if dataset.status in _FAILED and (is_new or not had_failed):
                raise UserError(f"{dataset_id}: Kaggle could not process it; see {dataset.url}")
            state = f"{dataset.status}, version {dataset.version}"
        now = time.monotonic()
        if now - started > PROCESSING_SECONDS:
            raise UserError(
                f"{dataset_id}: not ready after {PROCESSING_SECONDS / 60:.0f} minutes ({state}); "
                "all files are there, and `birdcall package --push` waits again before it pushes"
            )
        if state != reported_state or now - reported > _REPORT_SECONDS:
            reported, reported_state = now, state
            logger.info("Kaggle processes %s: %s (%.0f s)", dataset_id, state, now - started)
        time.sleep(_POLL_SECONDS)


# --- the client -----------------------------------------------------------------------------------


@contextmanager
def _extra() -> Iterator[None]:
    """Tell what to install where a package of the extra is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"the upload needs Kaggle's client, and {error.name} is not installed: pip install "
            "-e '.[kaggle]'; README, \"On Kaggle\", has the commands without it"
        ) from error


class _ClientLines(io.TextIOBase):
    """What the client prints: progress goes to the log, the last other line explains an error."""

    def __init__(self) -> None:
        self._rest = ""
        self.last = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in filter(None, map(_one_line, lines)):
            if line.startswith(_PROGRESS):
                logger.info(line)
            else:
                self.last = line
        return len(text)


@contextmanager
def _client(action: str) -> Iterator[None]:
    """Run the client: the log shows its progress; errors are one line that says what to do."""
    lines = _ClientLines()
    with _extra():
        import requests
    try:
        with redirect_stdout(lines):
            yield
    except UserError:
        raise
    except json.JSONDecodeError as error:
        raise UserError(
            f"{action}: the answer is not Kaggle's; does a proxy want you to log in?"
        ) from error
    except requests.HTTPError as error:
        status = error.response.status_code
        advice = _ADVICE.get(status, "this is a fault of Kaggle; run the command again later")
        raise UserError(
            f"{action}: Kaggle answers with HTTP {status} ({_one_line(error)}); {advice}"
        ) from error
    except requests.RequestException as error:
        raise UserError(
            f"{action}: no connection to Kaggle ({type(error).__name__}); check the network, then "
            "run the command again"
        ) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{action}: Kaggle's client did not understand the answer ({error!r}); install its "
            "newest version: pip install --upgrade kaggle"
        ) from error
    except (ValueError, OSError) as error:  # metadata; a file that was not sent; a full disk
        reason = f" ({lines.last})" if lines.last else ""
        raise UserError(f"{action}: {_one_line(error)}{reason}; run the command again") from error


def _one_line(text: object) -> str:
    """Return a message without line ends, and addresses in it without what is secret in them."""
    return re.sub(r"\?\S+", "", " ".join(str(text).split()))
