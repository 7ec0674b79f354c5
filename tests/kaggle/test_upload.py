"""`birdcall package --upload` and `--push`, with Kaggle's own client against a stand-in."""

import json
import logging
import os
import shutil
import sys
import tempfile
from base64 import b64encode
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import SCRIPT
from kaggle_stand_in import DROP, SIGNATURE, KaggleStandIn, slug_of
from shortened import shorten_packaging

from birdcall.__main__ import main
from birdcall.experiments import find_experiment
from birdcall.inference.decision import Decision, write_decision
from birdcall.kaggle import packaging, upload
from birdcall.kaggle.manifest import MANIFEST_FILE, find_changes, make_manifest
from birdcall.kaggle.packaging import StagingOptions, stage_package
from birdcall.kaggle.training_kernel import TrainingSettings
from birdcall.models.checkpoint import Checkpoint, save_checkpoint
from birdcall.models.sed import build_model

KEY, TOKEN = "0123456789abcdef0123456789abcdef", "KGAT_fedcba9876543210"
DATASET, KERNEL = "jane-doe/birdcall-package", "jane-doe/birdcall-submission"


@pytest.fixture(scope="module")
def output(tmp_path_factory, tiny_experiment):
    """The folder of results, with an untrained run and a decision that names it."""
    folder = tmp_path_factory.mktemp("output")
    checkpoint = save_checkpoint(
        folder / "runs" / "tiny" / "fold0",
        build_model(tiny_experiment, 2),
        Checkpoint(tiny_experiment, ("aldfly", "ameavo"), 0),
    )
    weights = {checkpoint.name: checkpoint.weights_sha256}
    write_decision(folder / "decision.json", Decision(members=tuple(weights), weights=weights))
    return folder


@pytest.fixture(scope="module")
def staged(output, tmp_path_factory):
    """A package whose owner writes the own name with capital letters."""
    build = tmp_path_factory.mktemp("staged") / "build"
    run = output / "runs" / "tiny" / "fold0"
    with pytest.MonkeyPatch.context() as patch:
        shorten_packaging(patch)
        stage_package([run], Decision(), StagingOptions(SCRIPT, build, "Jane-Doe"))
    return build


@pytest.fixture(scope="module")
def small(staged, tmp_path_factory):
    """The package with little of the code, which most tests need not send."""
    build = Path(shutil.copytree(staged, tmp_path_factory.mktemp("small") / "build"))
    dataset = build / "dataset"
    for path in (dataset / "birdcall").iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    (dataset / MANIFEST_FILE).unlink()
    (dataset / MANIFEST_FILE).write_text(json.dumps(make_manifest(dataset)))
    return build


@pytest.fixture
def build(small, tmp_path):
    """A copy of the small package that a test may change."""
    return Path(shutil.copytree(small, tmp_path / "build"))


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """The stand-in, to which the client goes with a key; nobody waits."""
    if find_spec("kagglesdk") is None:
        pytest.skip("Kaggle's client is not installed (pip install -e '.[kaggle]')")
    for name in ("HOME", "XDG_CONFIG_HOME", "KAGGLE_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))  # not the credentials of whoever runs the test
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_API_ENVIRONMENT", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("KAGGLE_USERNAME", "jane-doe")
    monkeypatch.setenv("KAGGLE_KEY", KEY)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # the client resumes from there
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    from kaggle.api.kaggle_api_extended import KaggleApi
    from kagglesdk import kaggle_env

    stand_in = KaggleStandIn(tmp_path / "on_kaggle", "jane-doe", KEY, TOKEN)
    with stand_in.serve():
        # All that is replaced in the client: it read its folder when it was imported, and its
        # option --local goes to port 80 of this machine, where only root may serve.
        monkeypatch.setattr(KaggleApi, "config", str(tmp_path / "kaggle.json"))
        monkeypatch.setattr(KaggleApi, "args", ["--local"])
        endpoints = kaggle_env._env_to_endpoint
        monkeypatch.setitem(endpoints, kaggle_env.KaggleEnv.LOCAL, stand_in.url)
        yield stand_in


@pytest.fixture
def package(capsys):
    """Run `birdcall package`, and return what it printed.

    With ``fails``, it must end as for an error that the user can correct, and the one line that
    says which is returned.
    """

    def run(*arguments, fails=False) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["package", *map(str, arguments)])
        printed = capsys.readouterr()
        assert ended.value.code == (2 if fails else 0), printed.err
        for secret in (KEY, TOKEN, b64encode(f"jane-doe:{KEY}".encode()).decode(), SIGNATURE):
            assert secret not in printed.out + printed.err
        if not fails:
            return printed.out
        line = printed.err.splitlines()[-1]
        assert line.startswith("birdcall: ")
        return line

    return run


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def change(path, **values):
    """Change a file of metadata, as by hand."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- what arrives ---------------------------------------------------------------------------------


def test_one_command_stages_uploads_and_pushes(kaggle, package, output, tmp_path, monkeypatch):
    """With the name of the owner taken from the credentials."""
    shorten_packaging(monkeypatch)
    build = tmp_path / "build"
    paths = ("--data", tmp_path, "--output", output, "--script", SCRIPT, "--build", build)
    printed = package(*paths, "--upload", "--push")
    (dataset,), (kernel,) = kaggle.datasets[DATASET], kaggle.kernels[KERNEL]
    assert f"https://www.kaggle.com/code/{KERNEL}" in printed
    submit = f"kaggle competitions submit birdsong-recognition -f submission.csv -k {KERNEL} -v 1"
    assert submit in printed.splitlines()[-1]

    assert slug_of(dataset["title"]) == dataset["slug"] == "birdcall-package"
    assert dataset["isPrivate"]
    assert dataset["licenseName"] == "CC-BY-NC-SA-4.0"
    arrived = kaggle.folder / DATASET / "1"
    staged = contents(build / "dataset")
    del staged["dataset-metadata.json"]
    assert contents(arrived) == staged
    assert "birdcall/kaggle/submission.py" in staged and "members/tiny-fold0/model.json" in staged
    assert find_changes(arrived) == {}  # as the kernel checks what is mounted
    assert all(len(content) == size for _, size, content in kaggle.blobs.values())

    assert kernel["slug"] == KERNEL
    assert slug_of(kernel["newTitle"]) == "birdcall-submission"
    assert kernel["text"] == SCRIPT.read_text()
    assert (kernel["language"], kernel["kernelType"]) == ("python", "script")
    assert (kernel["enableGpu"], kernel["enableInternet"]) == (True, False)
    assert kernel["isPrivate"]
    assert kernel["datasetDataSources"] == [DATASET]
    assert kernel["competitionDataSources"] == ["birdsong-recognition"]


def test_the_requests_come_in_this_order(kaggle, package, build):
    package("--build", build, "--upload", "--push")
    n_files = sum(path.name != "dataset-metadata.json" for path in (build / "dataset").iterdir())
    ask = ["GetDatasetStatus", "GetDataset"]
    assert kaggle.names() == [
        "GetDatasetStatus",  # ours: is there one?
        "GetDatasetStatus",  # the client's
        *["StartBlobUpload", "PUT"] * n_files,
        "CreateDataset",
        *ask * 3,  # received, decompressed, ready
        *ask,  # before the push
        "SaveKernel",
    ]


def test_the_gpu_is_none_that_kaggle_has_retired(kaggle, package, build):
    from kaggle.api.kaggle_api_extended import _RETIRED_ACCELERATORS

    package("--build", build, "--upload", "--push")
    shape = kaggle.kernels[KERNEL][0]["machineShape"].lower()
    assert shape.startswith("nvidia")
    assert shape not in _RETIRED_ACCELERATORS


def test_a_second_upload_makes_the_next_version(kaggle, package, build):
    package("--build", build, "--upload")
    manifest = build / "dataset" / "manifest.json"
    printed = package("--build", build, "--upload")
    first, second = kaggle.datasets[DATASET]
    assert "body" not in first
    assert (second["ownerSlug"], second["datasetSlug"]) == ("jane-doe", "birdcall-package")
    assert second["body"]["versionNotes"]
    versions = kaggle.folder / DATASET
    assert contents(versions / "1") == contents(versions / "2")
    assert (versions / "2" / "manifest.json").read_bytes() == manifest.read_bytes()
    # The stand-in first called the old version ready; the command waited for the new one.
    assert not kaggle.waiting[DATASET]
    assert "version 2" in printed
    assert "birdcall package --push" in printed.splitlines()[-1]


def test_a_next_version_waits_until_the_first_is_processed(kaggle, package, build, monkeypatch):
    monkeypatch.setattr(upload, "PROCESSING_SECONDS", -1)
    line = package("--build", build, "--upload", fails=True)
    assert DATASET in line and "--push" in line
    assert kaggle.waiting[DATASET]
    monkeypatch.setattr(upload, "PROCESSING_SECONDS", 60)
    package("--build", build, "--upload")
    assert len(kaggle.datasets[DATASET]) == 2


def test_a_training_kernel_is_pushed_again_to_resume(
    kaggle, package, tmp_path, demo_folder, tables
):
    script = SCRIPT.parents[1] / "training" / "training.py"
    experiment = find_experiment("small_gru")
    settings = TrainingSettings(experiment.name, 1, workers=0)
    files = packaging.TrainingFiles(data=demo_folder, folds=tables[0], audit=tables[1])
    build = tmp_path / "build"
    packaging.stage_training(settings, files, StagingOptions(script, build, "jane-doe"))
    kernel = "jane-doe/birdcall-small-gru-fold1"
    assert f"kaggle kernels output {kernel}" in package("--build", build, "--upload", "--push")
    assert "version 2" in package("--build", build, "--push")
    for version in kaggle.kernels[kernel]:
        assert version["kernelDataSources"] == [kernel]
        assert version["dockerImagePinningType"] == "original"
        assert (version["enableGpu"], version["enableInternet"]) == (True, False)


def test_a_token_tells_whose_it_is(kaggle, package, build, monkeypatch):
    monkeypatch.delenv("KAGGLE_USERNAME")
    monkeypatch.delenv("KAGGLE_KEY")
    monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
    package("--build", build, "--upload", "--push")
    assert kaggle.names()[0] == "IntrospectToken"
    assert len(kaggle.kernels[KERNEL]) == 1


def test_the_log_shows_each_file_and_the_processing(kaggle, package, build, caplog):
    caplog.set_level(logging.INFO)
    package("--build", build, "--upload")
    for name in ("birdcall.zip", "members.zip", "decision.json", "manifest.json"):
        assert sum(name in line for line in caplog.messages) == 2, name  # its start and its end
    assert any("blobs_decompressed" in line for line in caplog.messages)


# --- what is refused before the network -----------------------------------------------------------


@pytest.mark.parametrize("part", ["dataset", "kernel"])
def test_a_title_that_gives_another_name_is_refused_before_the_network(
    kaggle, package, build, part
):
    path = build / part / f"{part}-metadata.json"
    change(path, title="Birds of Ithaca")
    line = package("--build", build, "--upload", "--push", fails=True)
    assert str(path) in line and "Birds of Ithaca" in line
    assert kaggle.requests == []


def test_a_title_may_have_capital_letters(kaggle, package, build):
    change(build / "kernel" / "kernel-metadata.json", title="Birdcall: Submission!")
    package("--build", build, "--upload", "--push")
    assert kaggle.kernels[KERNEL][0]["newTitle"] == "Birdcall: Submission!"


def test_capital_letters_of_an_owner_are_small_in_names(kaggle, package, build, monkeypatch):
    """The package was staged for Jane-Doe, as her credentials and perhaps her page write it."""
    monkeypatch.setenv("KAGGLE_USERNAME", "Jane-Doe")
    kaggle.login = "Jane-Doe"
    package("--build", build, "--upload", "--push")
    assert (list(kaggle.datasets), list(kaggle.kernels)) == ([DATASET], [KERNEL])


@pytest.mark.parametrize("part", ["dataset", "kernel"])
def test_another_owner_is_refused_before_the_network(kaggle, package, build, monkeypatch, part):
    monkeypatch.setenv("KAGGLE_USERNAME", "john")
    step = {"dataset": "--upload", "kernel": "--push"}[part]
    line = package("--build", build, step, fails=True)
    assert f"{part}-metadata.json" in line
    assert "'jane-doe'" in line and "'john'" in line
    line = package("--data", build, "--owner", "jane", step, fails=True)  # before it stages
    assert "--owner" in line and "'jane'" in line and "'john'" in line
    assert kaggle.requests == []


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"id": 1, "title": 2}', '{"id": "a/b/c"}'])
def test_metadata_that_cannot_be_read_are_named(kaggle, package, build, content):
    path = build / "dataset" / "dataset-metadata.json"
    path.write_text(content)
    assert str(path) in package("--build", build, "--upload", fails=True)
    path.unlink()
    assert str(path) in package("--build", build, "--upload", fails=True)
    assert kaggle.requests == []


def test_a_changed_file_is_not_uploaded(kaggle, package, build):
    (build / "dataset" / "decision.json").write_text("{}")
    assert "decision.json" in package("--build", build, "--upload", fails=True)
    assert kaggle.requests == []


def test_options_of_staging_need_data(package, tmp_path):
    for options in ([], ["--push", "--owner", "x"], ["--upload", "--dry-run"]):
        assert "--data" in package("--build", tmp_path, *options, fails=True)


@pytest.mark.parametrize("missing", ["slugify", "kaggle", "six"])
def test_without_the_extra_the_line_says_what_to_install(
    build, package, monkeypatch, missing, request
):
    if missing != "slugify":
        request.getfixturevalue("kaggle")
    for name in [name for name in sys.modules if name.split(".")[0] in ("kaggle", missing)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    line = package("--build", build, "--upload", fails=True)
    assert ".[kaggle]" in line and missing in line


def test_without_credentials_the_line_says_where_to_get_them(kaggle, package, build, monkeypatch):
    monkeypatch.delenv("KAGGLE_USERNAME")
    monkeypatch.delenv("KAGGLE_KEY")
    assert "KAGGLE_API_TOKEN" in package("--build", build, "--push", fails=True)
    monkeypatch.setenv("KAGGLE_API_TOKEN", "KGAT_expired")
    assert "KAGGLE_API_TOKEN" in package("--build", build, "--push", fails=True)
    assert set(kaggle.names()) <= {"IntrospectToken"}


# --- faults of the service ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_name, status",
    [
        *[("StartBlobUpload", 429), ("StartBlobUpload", 500), ("CreateDataset", 403)],
        *[("SaveKernel", 401), ("SaveKernel", 404), ("SaveKernel", 409), ("SaveKernel", 429)],
    ],
)
def test_after_a_refused_request_the_same_command_goes_on(
    kaggle, package, build, request_name, status
):
    before = contents(build)
    kaggle.faults[request_name] = [status] * 10  # the client itself tries ten times after a 429
    step = "--push" if request_name == "SaveKernel" else "--upload"
    if step == "--push":
        package("--build", build, "--upload")
    line = package("--build", build, step, fails=True)
    assert str(status) in line and str(build) in line
    assert contents(build) == before
    kaggle.faults.clear()
    package("--build", build, "--upload", "--push")
    assert len(kaggle.kernels[KERNEL]) == 1
    last = kaggle.folder / DATASET / str(len(kaggle.datasets[DATASET]))
    assert find_changes(last) == {}


@pytest.mark.parametrize("status", [401, 429, 500])
def test_a_dataset_is_not_taken_for_a_new_one_where_its_status_is_refused(
    kaggle, package, build, status
):
    package("--build", build, "--upload")
    kaggle.requests.clear()
    for name in ("GetDatasetStatus", "GetDataset"):
        kaggle.faults[name] = [status]
        assert str(status) in package("--build", build, "--upload", fails=True)
    assert set(kaggle.names()) == {"GetDatasetStatus", "GetDataset"}


def test_waiting_goes_on_after_a_refused_request(kaggle, package, build, monkeypatch):
    real = kaggle.answer_CreateDataset

    def create(body):
        kaggle.faults["GetDatasetStatus"] = [500, DROP, 404]
        return real(body)

    monkeypatch.setattr(kaggle, "answer_CreateDataset", create)
    assert "version 1" in package("--build", build, "--upload")


def test_a_dataset_that_kaggle_cannot_process_is_told(kaggle, package, build):
    kaggle.steps = ["BLOBS_RECEIVED", "FAILED"]
    line = package("--build", build, "--upload", fails=True)
    assert f"https://www.kaggle.com/datasets/{DATASET}" in line


def test_an_upload_that_breaks_resumes(kaggle, package, build):
    kaggle.faults["PUT"] = [DROP, DROP, 503]
    package("--build", build, "--upload")
    assert find_changes(kaggle.folder / DATASET / "1") == {}


@pytest.mark.parametrize("faults", [[403], [DROP] * 100])
def test_a_storage_that_refuses_makes_no_version(kaggle, package, build, faults):
    kaggle.faults["PUT"] = faults
    assert str(build / "dataset") in package("--build", build, "--upload", fails=True)
    assert not kaggle.datasets
    kaggle.faults.clear()
    package("--build", build, "--upload")
    assert find_changes(kaggle.folder / DATASET / "1") == {}


def test_the_secret_address_of_an_upload_is_not_shown(kaggle, package, build):
    """It is in the client's own message."""
    kaggle.storage = "http://127.0.0.1:9"
    assert "/upload/" in package("--build", build, "--upload", fails=True)  # looks for secrets


@pytest.mark.parametrize("step", ["--upload", "--push"])
def test_without_a_connection_one_line_says_so(kaggle, package, build, step, monkeypatch):
    from kagglesdk import kaggle_env

    endpoints = kaggle_env._env_to_endpoint
    monkeypatch.setitem(endpoints, kaggle_env.KaggleEnv.LOCAL, "http://127.0.0.1:9")
    assert "connection" in package("--build", build, step, fails=True)


def test_an_answer_that_is_not_kaggles_is_told(kaggle, package, build, monkeypatch):
    monkeypatch.setattr(kaggle, "answer_GetDatasetStatus", lambda body: (200, {"status": "ODD"}))
    assert DATASET in package("--build", build, "--upload", fails=True)


def test_a_kernel_is_not_pushed_without_its_dataset(kaggle, package, build):
    assert DATASET in package("--build", build, "--push", fails=True)
    assert not kaggle.kernels


def test_a_push_waits_for_the_dataset(kaggle, package, build, monkeypatch):
    package("--build", build, "--upload")
    kaggle.waiting[DATASET] = ["REPROCESSING"] * 3
    package("--build", build, "--push")
    assert kaggle.kernels[KERNEL] and not kaggle.waiting[DATASET]
    kaggle.waiting[DATASET] = ["REPROCESSING"] * 3
    monkeypatch.setattr(upload, "PROCESSING_SECONDS", -1)
    assert "reprocessing" in package("--build", build, "--push", fails=True)
    assert len(kaggle.kernels[KERNEL]) == 1


def test_a_source_that_kaggle_refuses_is_told(kaggle, package, build):
    """The client's own command prints it and ends as if all were well."""
    kaggle.competitions.clear()
    line = package("--build", build, "--upload", "--push", fails=True)
    assert KERNEL in line and "birdsong-recognition" in line and "rules" in line


def test_the_key_is_not_printed_where_the_client_tells_all(kaggle, package, build, monkeypatch):
    from kaggle.api.kaggle_api_extended import KaggleApi

    monkeypatch.setattr(KaggleApi, "args", ["--local", "--verbose"])  # VERBOSE=1
    assert "Authorization" not in package("--build", build, "--upload", "--push")
    kaggle.faults["PUT"] = [403]
    assert "-----" not in package("--build", build, "--upload", fails=True)  # lines of its print
    kaggle.key = "another"
    assert "401" in package("--build", build, "--upload", fails=True)


def test_nothing_is_left_beside_the_staged_files(kaggle, package, build):
    before = contents(build)
    package("--build", build, "--upload", "--push")
    assert contents(build) == before
    assert {path.name for path in build.parent.iterdir()} <= {
        *("build", "on_kaggle", "kaggle"),
        f".kaggle-uploads-{os.geteuid()}",  # where the client notes what to resume
    }
