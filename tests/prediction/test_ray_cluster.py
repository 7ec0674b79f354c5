"""A cluster of two workers gives the results of one machine, even when it loses a worker."""

import json
import os
import threading

import numpy as np
import pandas as pd
import pytest
import soundfile
from helpers import RATE

from birdcall.kaggle.submission import open_package
from birdcall.prediction.local import ResultOptions, predict_locally, predict_recordings
from birdcall.prediction.package import find_recordings
from birdcall.prediction.ray_cluster import Worker, predict_on_ray
from birdcall.storage.store import Journal

FORMATS = ("csv", "parquet")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Twenty-three recordings and one that does not decode."""
    folder = tmp_path_factory.mktemp("in")
    for number in range(23):
        generator = np.random.default_rng(number)
        envelope = np.repeat(generator.random(80), RATE // 4)
        waveform = generator.normal(0, 0.2, len(envelope)) * envelope
        soundfile.write(folder / f"{number:02}.wav", waveform.astype("f4"), RATE)
    (folder / "bad.mp3").write_text("<html>")
    return find_recordings([folder])


@pytest.fixture(scope="module")
def expected(package, recordings, tmp_path_factory):
    """The results of this machine."""
    output = tmp_path_factory.mktemp("here")
    options = ResultOptions(FORMATS)
    predictor = predict_locally(open_package(package, "cpu"), output, options)
    with Journal(output / "journal.jsonl", "x") as journal:
        predict_recordings(recordings, predictor, journal, output, options=options)
    return output


def assert_same_tables(output, expected):
    assert (output / "detections.csv").read_text() == (expected / "detections.csv").read_text()
    assert (output / "failed.csv").read_text() == (expected / "failed.csv").read_text()


def test_a_task_leaves_a_shard_and_returns_its_results(package, recordings, expected, tmp_path):
    """What a worker does, without a cluster."""
    worker = Worker(str(package), str(tmp_path), embeddings=True, n_threads=1)
    task = {
        "path": np.array([os.fsencode(item.path) for item in recordings[:4]], dtype=object),
        "name": np.array([recording.name for recording in recordings[:4]], dtype=object),
    }
    results = worker(task)
    assert list(results["name"]) == list(task["name"])
    (shard,) = (tmp_path / "shards").iterdir()
    for name, text in zip(results["name"], results["result"], strict=True):
        parts = [f"shards/{shard.name}", f"embeddings/{name}.parquet"]
        assert json.loads(text)["parts"] == parts
        assert all((tmp_path / part).is_file() for part in parts)
    whole = pd.read_parquet(expected / "detections.parquet")
    paths = [str(recording.path) for recording in recordings[:4]]
    subset = whole[whole["recording"].isin(paths)].reset_index(drop=True)
    pd.testing.assert_frame_equal(pd.read_parquet(shard), subset)
    worker(task)
    assert list((tmp_path / "shards").iterdir()) == [shard]  # done again, the same file
    assert len(list((tmp_path / "embeddings").iterdir())) == 4


@pytest.fixture
def cluster():
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    os.environ["PYTHONWARNINGS"] = "ignore"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    cluster.workers = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def predict_there(cluster, package, recordings, output, on_result=lambda n_results: None):
    options = ResultOptions(FORMATS)
    predictor = predict_on_ray(cluster.address, package, output, embeddings=False, progress=False)

    def predict(remaining):
        for n_results, result in enumerate(predictor(remaining), start=1):
            on_result(n_results)
            yield result

    with Journal(output / "journal.jsonl", "x") as journal:
        predict_recordings(recordings, predict, journal, output, options=options)


@pytest.mark.slow
def test_a_cluster_gives_the_same_results(cluster, package, recordings, expected, tmp_path):
    predict_there(cluster, package, recordings, tmp_path)
    assert_same_tables(tmp_path, expected)
    shards = [pd.read_parquet(path) for path in (tmp_path / "shards").iterdir()]
    assert len(shards) > 2
    together = pd.concat(shards).sort_values(["recording", "onset", "ebird_code"])
    whole = pd.read_parquet(expected / "detections.parquet")
    whole = whole.sort_values(["recording", "onset", "ebird_code"])
    pd.testing.assert_frame_equal(together.reset_index(drop=True), whole.reset_index(drop=True))


@pytest.mark.slow
def test_a_worker_that_is_lost_is_replaced(cluster, package, recordings, expected, tmp_path):
    """The node goes away while it has tasks in hand; another takes its place."""
    lost = threading.Event()

    def lose(n_results):
        if n_results == 1:
            cluster.remove_node(cluster.workers[0], allow_graceful=False)
            lost.set()

    predict_there(cluster, package, recordings=recordings, output=tmp_path, on_result=lose)
    assert lost.is_set()
    assert_same_tables(tmp_path, expected)


def test_without_a_cluster_the_error_names_the_address(package, recordings, tmp_path):
    pytest.importorskip("ray")
    predictor = predict_on_ray("127.0.0.1:1", package, tmp_path, embeddings=False, progress=False)
    with pytest.raises(ConnectionError, match=r"--ray 127\.0\.0\.1:1: no cluster answers there"):
        list(predictor(recordings[:1]))
