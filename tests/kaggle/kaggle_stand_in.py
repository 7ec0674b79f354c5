"""A stand-in for Kaggle on the loopback: it answers Kaggle's own client, and keeps what arrives.

It follows the requests of the client (kaggle 2.2) and what Kaggle's users and maintainers report of
the answers: 403 for what does not exist, 403 for a second version while the first is processed, the
old version called ready for a while after a new one was sent, sources that are refused in an answer
which is no error, and an upload that goes to another address, which resumes.
"""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import threading
import zipfile
from collections import defaultdict
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

DROP = "drop"  # a fault: the connection ends in the middle of the request
SIGNATURE = "s3cret"  # of an upload's address: whoever has it may write the file


class KaggleStandIn:
    """One user's account. Other users' datasets and kernels are not there."""

    def __init__(self, folder: Path, user: str, key: str, token: str):
        self.folder = folder  # what the datasets' versions hold: <owner>/<name>/<version>/
        self.user, self.key, self.token = user, key, token
        self.login = user  # the user name as it is in the credentials
        self.competitions = {"birdsong-recognition"}  # with rules that the user has accepted
        self.steps = ["BLOBS_RECEIVED", "BLOBS_DECOMPRESSED"]  # each is answered once
        self.faults = defaultdict(list)  # by the name of a request: the statuses to answer first
        self.requests = []  # name, and the body as a dict, or the number of bytes of an upload
        self.blobs = {}  # by token: name, size that was announced, bytes that have come
        self.datasets = defaultdict(list)  # by owner/name: each version's request
        self.kernels = defaultdict(list)  # by owner/name: each version's request
        self.waiting = {}  # by owner/name: the statuses to answer before it is ready
        self.url = self.storage = ""  # of the API; of the uploads

    def names(self) -> list[str]:
        """The names of the requests that came."""
        return [name for name, _ in self.requests]

    def bodies(self, name: str) -> list:
        """The bodies of the requests of one name."""
        return [body for of, body in self.requests if of == name]

    # --- answers: a status and a body --------------------------------------------------------

    def answer(self, name: str, body: dict, authorization: str) -> tuple[int, dict]:
        if name == "IntrospectToken":
            return 200, {"active": body["token"] == self.token, "username": self.login}
        basic = base64.b64encode(f"{self.login}:{self.key}".encode()).decode()
        if authorization not in (f"Basic {basic}", f"Bearer {self.token}"):
            return error(401, "Unauthenticated")
        return getattr(self, f"answer_{name}")(body)

    def answer_GetDatasetStatus(self, body):  # noqa: N802 - the names of the requests
        dataset = f"{body['ownerSlug']}/{body['datasetSlug']}"
        if dataset not in self.datasets:
            return error(403, "Permission 'datasets.get' was denied")
        statuses = self.waiting.get(dataset)
        return 200, {"status": statuses.pop(0) if statuses else "READY"}

    def answer_GetDataset(self, body):  # noqa: N802
        dataset = f"{body['ownerSlug']}/{body['datasetSlug']}"
        n_ready = len(self.datasets.get(dataset, ())) - bool(self.waiting.get(dataset))
        if n_ready == 0:
            return error(404, "Not found")
        return 200, {"currentVersionNumber": n_ready}

    def answer_StartBlobUpload(self, body):  # noqa: N802
        token = f"blob{len(self.blobs)}"
        self.blobs[token] = [body["name"], int(body["contentLength"]), b""]
        return 200, {
            "token": token,
            "createUrl": f"{self.storage}/upload/{token}?signature={SIGNATURE}",
        }

    def answer_CreateDataset(self, body):  # noqa: N802
        if body["ownerSlug"] != self.user:
            return 200, {"status": "error", "error": "You may not create a dataset as this owner."}
        return self.add_version(f"{self.user}/{body['slug']}", body, body["files"], self.steps)

    def answer_CreateDatasetVersion(self, body):  # noqa: N802
        dataset = f"{body['ownerSlug']}/{body['datasetSlug']}"
        versions = self.datasets.get(dataset, ())
        if not versions or (len(versions) == 1 and self.waiting.get(dataset)):
            return error(403, "Permission 'datasets.update' was denied")
        return self.add_version(dataset, body, body["body"]["files"], ["READY", *self.steps])

    def add_version(self, dataset, body, files, steps):
        for file in files:
            name, size, content = self.blobs[file["token"]]
            if len(content) != size:
                return 200, {"status": "error", "error": f"{name} is not complete"}
        self.datasets[dataset].append(body)
        self.waiting[dataset] = list(steps)
        version = self.folder / dataset / str(len(self.datasets[dataset]))
        for file in files:
            unpack(version, *self.blobs[file["token"]][::2])
        return 200, {"status": "ok", "ref": dataset, "url": f"/datasets/{dataset}"}

    def answer_SaveKernel(self, body):  # noqa: N802
        owner, slug = body["slug"].split("/")
        if owner != self.user:
            return error(403, "Permission 'kernels.update' was denied")
        if slug != slug_of(body["newTitle"]):
            return 200, {"error": "The title gives another name"}
        kernel = f"{owner}/{slug}"
        mounted = {name for name in self.datasets if not self.waiting.get(name)}
        refused = {
            "invalidDatasetSources": set(body["datasetDataSources"]) - mounted,
            "invalidCompetitionSources": set(body["competitionDataSources"]) - self.competitions,
            "invalidKernelSources": set(body.get("kernelDataSources", ())) - self.kernels.keys(),
        }
        self.kernels[kernel].append(body)
        return 200, {
            "ref": kernel,
            "url": f"https://www.kaggle.com/code/{kernel}",
            "versionNumber": len(self.kernels[kernel]),
            **{name: sorted(sources) for name, sources in refused.items()},
        }

    # --- the server ---------------------------------------------------------------------------

    @contextmanager
    def serve(self):
        """Serve in a thread until the block ends, at ``url``."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        server.kaggle, server.daemon_threads = self, True
        self.url = self.storage = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        """A request of the API: /api/v1/<service>/<name>."""
        kaggle = self.server.kaggle
        name = self.path.rpartition("/")[2]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kaggle.requests.append((name, body))
        if faults := kaggle.faults[name]:
            self.fail(faults.pop(0))
        else:
            self.reply(*kaggle.answer(name, body, self.headers.get("Authorization", "")))

    def do_PUT(self):
        """A file for a storage that resumes: what came before is kept, and asked for."""
        kaggle = self.server.kaggle
        blob = kaggle.blobs[self.path.rpartition("/")[2].partition("?")[0]]
        size = int(self.headers["Content-Length"])
        start = re.match(r"bytes (\d+|\*)", self.headers.get("Content-Range", "bytes 0"))[1]
        fault = kaggle.faults["PUT"].pop(0) if kaggle.faults["PUT"] else None
        content = self.rfile.read(size // 2 if fault == DROP else size)
        kaggle.requests.append(("PUT", len(content)))
        if start != "*" and fault in (None, DROP):
            blob[2] = blob[2][: int(start)] + content
        if fault is not None:
            self.fail(fault)
        elif len(blob[2]) == blob[1]:
            self.reply(200, {})
        else:
            self.reply(308, {}, {"Range": f"bytes=0-{len(blob[2]) - 1}"} if blob[2] else {})

    def fail(self, fault: int | str):
        if fault == DROP:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.reply(*error(fault, "it is refused"))

    def reply(self, status: int, body: dict, headers: dict | None = None):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Print nothing."""


def error(status: int, message: str) -> tuple[int, dict]:
    return status, {"code": status, "message": message}


def unpack(folder: Path, name: str, content: bytes) -> None:
    """Write a file of a dataset as Kaggle mounts it: a zip as a folder of its name."""
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".zip"):
        zipfile.ZipFile(io.BytesIO(content)).extractall(folder / name.removesuffix(".zip"))
    else:
        (folder / name).write_bytes(content)


def slug_of(title: str) -> str:
    return re.sub("[^a-z0-9]+", "-", title.lower()).strip("-")
