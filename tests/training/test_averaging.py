"""Moving averages follow every weight; the best epochs are kept, and only they."""

import torch

from birdcall.training.resume import BestWeights, make_moving_average


def make_net(value=0.0):
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    with torch.no_grad():
        for one in net.state_dict().values():
            one.fill_(value)
    return net


def test_the_moving_average_has_the_closed_form_of_its_warm_up():
    net = make_net(0.0)
    average = make_moving_average(net, 0.5)
    expected = None
    for step, value in enumerate((8.0, 4.0, 6.0, 1.0)):
        with torch.no_grad():
            for one in net.state_dict().values():
                one.fill_(value)
        average.update_parameters(net)
        keep = min(0.5, (1 + step) / (10 + step))
        expected = value if expected is None else keep * expected + (1 - keep) * value
        for name, one in average.module.state_dict().items():
            options = value if name.endswith("num_batches_tracked") else expected
            torch.testing.assert_close(one, torch.full_like(one, options))


def test_of_equal_epochs_the_earlier_is_kept_and_their_mean_is_that_of_the_best(tmp_path):
    best = BestWeights(tmp_path / "best", 2)
    for epoch, (score, value) in enumerate([(0.5, 1.0), (0.9, 2.0), (0.5, 3.0), (0.7, 6.0)], 1):
        best.offer(epoch, score, make_net(value))
    assert best.scores == {2: 0.9, 4: 0.7}
    best.prune()
    assert {path.name for path in (tmp_path / "best").iterdir()} == {
        "epoch0002.safetensors",
        "epoch0004.safetensors",
    }
    mean = best.mean()
    assert torch.equal(mean["0.weight"], torch.full((2, 2), 4.0))
    assert mean["1.num_batches_tracked"] == 2  # of the best
    best.delete()
    assert not (tmp_path / "best").exists()


def test_nothing_is_deleted_before_it_is_asked_for(tmp_path):
    best = BestWeights(tmp_path, 1)
    best.offer(1, 0.1, make_net())
    best.offer(2, 0.2, make_net())
    assert len(list(tmp_path.iterdir())) == 2
