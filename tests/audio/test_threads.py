"""Threads share the items, each working alone, and leave torch as they found it."""

import multiprocessing
import threading

import pytest
import torch

from birdcall.audio.spectrogram import map_threads, worker_pool


@pytest.fixture(params=[1, 2, 3])
def n_threads(request):
    worker_pool.cache_clear()
    torch.set_num_threads(request.param)  # conftest sets it back to one
    return request.param


def count_threads(_=None):
    return torch.get_num_threads()


def test_results_are_those_of_a_loop_in_its_order(n_threads):
    items = list(torch.randn(20, 1000).unbind())
    for ours, item in zip(map_threads(torch.sort, items), items, strict=True):
        assert torch.equal(ours.values, item.sort().values)
    assert map_threads(torch.sort, []) == []


def test_as_many_threads_work_as_torch_has(n_threads):
    together = threading.Barrier(n_threads, timeout=20)  # breaks where fewer work side by side
    map_threads(lambda _: together.wait(), range(n_threads))


def test_each_thread_works_alone_and_torch_keeps_its_number(n_threads):
    assert set(map_threads(count_threads, range(8))) == {1}
    assert torch.get_num_threads() == n_threads
    born_later = []
    thread = threading.Thread(target=lambda: born_later.append(count_threads()))
    thread.start()
    thread.join()
    assert born_later == [n_threads]


def test_a_failing_item_raises_its_own_error(n_threads):
    with pytest.raises(ZeroDivisionError):
        map_threads(lambda item: 1 / item, [1, 2, 0, 3])


def test_calls_may_be_nested(n_threads):
    squares = map_threads(lambda row: map_threads(lambda x: x * x, row), [[1, 2], [3, 4]])
    assert squares == [[1, 4], [9, 16]]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_forked_process_gets_threads_of_its_own():
    torch.set_num_threads(2)
    map_threads(count_threads, range(4))
    child = multiprocessing.get_context("fork").Process(target=map_threads, args=(abs, range(4)))
    child.start()
    child.join(timeout=30)
    hangs = child.is_alive()
    child.kill()
    assert not hangs
    assert child.exitcode == 0
