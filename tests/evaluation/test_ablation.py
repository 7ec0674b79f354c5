"""An ablation keeps to its budget, compares like with like, and names what it left out."""

import math
from dataclasses import replace
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from shortened import shorten_previews

from birdcall.evaluation import ablation as ablation_module
from birdcall.evaluation.ablation import (
    AblationOptions,
    ablate,
    loss_of_last_fifth,
    score_block,
)
from birdcall.evaluation.comparison import Measure, score_submission
from birdcall.evaluation.predict import HeldOutOptions, predict_held_out
from birdcall.evaluation.scoring import evaluate
from birdcall.evaluation.simulation import SimulationConfig
from birdcall.models.checkpoint import SETTINGS_FILE, read_checkpoint
from birdcall.report.ablation import describe_ablation, difference_table, plot_ablation
from birdcall.report.plots import save_figure
from birdcall.storage.store import Journal
from birdcall.training.log import write_log
from birdcall.training.step import EpochLog
from birdcall.training.trainer import Run, RunOptions

BLOCK_SECONDS = 100.0
SIMULATION = SimulationConfig(n_soundscapes=2, soundscape_seconds=30.0)


def log_of(losses):
    return [
        EpochLog(
            epoch=epoch + 1,
            loss=loss,
            learning_rate=0.1,
            seconds=2.0,
            clips_per_second=10.0,
            waiting_share=0.0,
        )
        for epoch, loss in enumerate(losses)
    ]


class FakeTraining:
    """In place of training and scoring: takes `BLOCK_SECONDS` a block, and remembers its calls.

    An experiment's F1 is 0.5 plus a tenth of the length of its name plus a hundredth of its seed.
    """

    def __init__(self):
        self.now = 0.0
        self.blocks = []
        self.dies_after = None  # seconds into the next block

    def train_many(self, runs, data, options):
        assert options.resume
        new = [run for run in runs if not (run.folder / SETTINGS_FILE).exists()]
        if new and self.dies_after is not None:
            self.now += self.dies_after
            raise KeyboardInterrupt
        self.blocks.append(new)
        self.now += BLOCK_SECONDS if new else 0.0
        for run in new:
            run.folder.mkdir(parents=True)
            (run.folder / SETTINGS_FILE).touch()
            write_log(run.folder, log_of([1.0] * 10))

    def score_block(self, runs_of, data, options):
        measure = Measure("soundscapes: F1", ("a", "a", "b", "b"), "soundscapes")
        scored = {}
        for name, runs in runs_of.items():
            self.now += 5.0
            score = 0.5 + 0.1 * len(name) + 0.01 * runs[0].experiment.train.seed
            scored[name] = {"soundscape_f1": (measure, np.full(4, score))}
        return scored


@pytest.fixture
def fake(monkeypatch):
    fake = FakeTraining()
    monkeypatch.setattr(ablation_module, "train_many", fake.train_many)
    monkeypatch.setattr(ablation_module, "score_block", fake.score_block)
    monkeypatch.setattr(ablation_module, "time", SimpleNamespace(monotonic=lambda: fake.now))
    return fake


@pytest.fixture
def pair(tiny_experiment):
    train = replace(tiny_experiment.train, seed=7)
    return [replace(tiny_experiment, name=name, train=train) for name in ("a", "bbb")]


def seconds_of(folder):
    with Journal(folder / "ablation.jsonl", "ablation") as journal:
        return {key["seed"]: value["seconds"] for key, value in journal.items() if "seed" in key}


# --- which runs, in what time -------------------------------------------------------------------


def test_a_block_is_every_experiment_and_fold_of_one_seed(fake, pair, training_data, tmp_path):
    ablation = ablate(pair, training_data, tmp_path, AblationOptions(n_seeds=2, budget_seconds=1e6))
    assert len(fake.blocks) == 2
    for seed, block in enumerate(fake.blocks):
        assert [(run.experiment.name, run.fold) for run in block] == [
            ("a", 0), ("a", 1), ("bbb", 0), ("bbb", 1)
        ]  # fmt: skip
        assert {run.experiment.train.seed for run in block} == {7 + seed}
        assert block[1].folder == tmp_path / "a" / f"seed{seed}" / "fold1"
    assert list(ablation.table["seed"]) == [0, 0, 1, 1]
    assert list(ablation.table["train_seed"]) == [7, 7, 8, 8]


def test_one_fold_is_trained_where_one_is_asked_for(fake, pair, training_data, tmp_path):
    options = AblationOptions(folds=(1,), n_seeds=1, budget_seconds=1e6)
    ablate(pair, training_data, tmp_path, options)
    assert [run.fold for run in fake.blocks[0]] == [1, 1]


def test_a_block_that_does_not_fit_is_left_out_and_named(
    fake, pair, training_data, tmp_path, caplog
):
    # A block takes 100 s of training and 2 x 5 s of scoring: two fit into 300 s, three do not.
    ablation = ablate(pair, training_data, tmp_path, AblationOptions(n_seeds=4, budget_seconds=300))
    assert ablation.left_out == (2, 3)
    assert dict(ablation.block_seconds) == {0: 110.0, 1: 110.0}
    assert "seed 2 is left out: it would take 1.8 minutes, and 3.7 of 5.0 are spent" in caplog.text
    page = describe_ablation(ablation)
    assert "no room for them: seed 2, 3." in page
    assert "3.7 of 5 minutes" in page


def test_the_first_block_is_trained_even_if_it_takes_longer_than_the_budget(
    fake, pair, training_data, tmp_path
):
    ablation = ablate(pair, training_data, tmp_path, AblationOptions(n_seeds=2, budget_seconds=60))
    assert (len(fake.blocks), ablation.left_out) == (1, (1,))


def test_an_interrupted_ablation_is_resumed_and_counts_the_time_already_spent(
    fake, pair, training_data, tmp_path
):
    ablate(pair, training_data, tmp_path, AblationOptions(n_seeds=1, budget_seconds=1000))
    fake.dies_after = 40.0
    with pytest.raises(KeyboardInterrupt):
        ablate(pair, training_data, tmp_path, AblationOptions(n_seeds=2, budget_seconds=1000))
    assert seconds_of(tmp_path) == {0: 110.0, 1: 40.0}
    fake.dies_after = None
    # 70 s are expected to be missing: 219 s do not have room for them behind 150, 220 do.
    ablation = ablate(pair, training_data, tmp_path, AblationOptions(n_seeds=2, budget_seconds=219))
    assert ablation.left_out == (1,)
    ablation = ablate(pair, training_data, tmp_path, AblationOptions(n_seeds=2, budget_seconds=220))
    assert ablation.left_out == ()
    assert seconds_of(tmp_path) == {0: 110.0, 1: 150.0}
    assert [len(block) for block in fake.blocks] == [4, 0, 0, 0, 4]


def test_finished_blocks_are_shown_whatever_the_budget(fake, pair, training_data, tmp_path):
    ablate(pair, training_data, tmp_path, AblationOptions(n_seeds=2, budget_seconds=1000))
    again = ablate(pair, training_data, tmp_path, AblationOptions(n_seeds=2, budget_seconds=1))
    assert again.left_out == ()
    assert dict(again.block_seconds) == {0: 110.0, 1: 110.0}


def test_another_ablation_in_the_same_folder_is_refused(fake, pair, training_data, tmp_path):
    ablate(pair, training_data, tmp_path, AblationOptions(n_seeds=1, budget_seconds=1000))
    with pytest.raises(ValueError, match="is of experiments a, bbb, not a; give another"):
        ablate(pair[:1], training_data, tmp_path, AblationOptions(n_seeds=1, budget_seconds=1000))
    options = AblationOptions(folds=(1,), n_seeds=1, budget_seconds=1000)
    with pytest.raises(ValueError, match="is of folds 0, 1, not 1; give another"):
        ablate(pair, training_data, tmp_path, options)


@pytest.mark.parametrize(
    "lines",
    [
        ["{"],
        ["[]"],
        ['{"fingerprint": "ablation"}', '{"key": {"seed": 0}, "value": {"seconds": 3}}'],
        ['{"fingerprint": "ablation"}', '{"key": {"item": "conditions"}, "value": {}}'],
    ],
)
def test_a_damaged_journal_is_refused(lines, fake, pair, training_data, tmp_path):
    (tmp_path / "ablation.jsonl").write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(ValueError, match=r"ablation\.jsonl.*(not a line|not a readable ablation)"):
        ablate(pair, training_data, tmp_path, AblationOptions(60.0))
    assert fake.blocks == []


def _ablate(experiments, data, folder, options):
    return ablate(experiments, data, folder, AblationOptions(**options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_seeds": 0}, "n_seeds is 0; give at least 1"),
        ({"budget_seconds": 0.0}, "the budget is 0 seconds; give more than 0"),
        ({"budget_seconds": -60.0}, "the budget is -60 seconds; give more than 0"),
        ({"budget_seconds": math.nan}, "the budget is nan seconds"),
        ({"reference": "c"}, "reference 'c' is none of the experiments: a, bbb"),
        ({"folds": [5]}, "fold 5 is out of range; the folds are 0, 1"),
        ({"folds": [1, 1]}, "fold 1 is given twice"),
        ({"folds": ["full"]}, "give it folds, not full"),
        ({"folds": []}, "an ablation needs at least one fold"),
    ],
)
def test_invalid_options_are_refused_in_one_line(
    change, message, fake, pair, training_data, tmp_path
):
    with pytest.raises(ValueError, match=message) as error:
        _ablate(pair, training_data, tmp_path, {"n_seeds": 1, "budget_seconds": 60.0} | change)
    assert "\n" not in str(error.value)
    assert fake.blocks == []


@pytest.mark.parametrize(
    ("positions", "message"), [((0, 1, 0), "experiment a is given twice"), ((), "at least one")]
)
def test_experiments_are_given_once_and_there_is_one(
    positions, message, fake, pair, training_data, tmp_path
):
    with pytest.raises(ValueError, match=message):
        ablate([pair[k] for k in positions], training_data, tmp_path, AblationOptions(60.0))


# --- what came out ------------------------------------------------------------------------------


def test_differences_are_from_the_first_experiment_or_from_the_reference(
    fake, pair, training_data, tmp_path
):
    ablation = ablate(pair, training_data, tmp_path, AblationOptions(n_seeds=3, budget_seconds=1e6))
    (row,) = ablation.differences.to_dict("records")
    assert (row["experiment"], row["reference"]) == ("bbb", "a")
    assert row["difference"] == pytest.approx(0.2)
    assert (row["low"], row["high"]) == pytest.approx((0.2, 0.2))
    options = AblationOptions(n_seeds=3, budget_seconds=1e6, reference="bbb")
    from_other = ablate(pair, training_data, tmp_path, options)
    assert from_other.differences["difference"].iloc[0] == pytest.approx(-0.2)
    assert difference_table(from_other).iloc[0, 1] == "-0.200 [-0.200, -0.200] 0/3"


def test_the_page_has_each_table_with_its_numbers(fake, pair, training_data, tmp_path):
    options = AblationOptions(n_seeds=3, budget_seconds=3600)
    page = describe_ablation(ablate(pair, training_data, tmp_path, options), "birdcall ablate")
    # Scores 0.67, 0.68, 0.69: their sample standard deviation is 0.01.
    assert "| a | 0.680 ± 0.010 | 10.0 |" in page
    assert "| bbb | +0.200 [+0.200, +0.200] 3/3 |" in page
    assert "| a | 10 | 0.7 | 1.0000 | +0.0% |" in page  # 2 folds x 10 epochs x 2 s
    assert "```\nbirdcall ablate\n```" in page
    assert "soundscapes: F1: 4 rows of 2 soundscapes" in page
    assert "Intervals of so few clusters are too narrow" in page
    assert "no room for them: nothing." in page
    assert "nan" not in page.lower()


def test_the_page_of_one_seed_claims_no_spread(fake, pair, training_data, tmp_path):
    options = AblationOptions(n_seeds=1, budget_seconds=60)
    page = describe_ablation(ablate(pair, training_data, tmp_path, options))
    assert "±" not in page
    assert "do not include differences between seeds" in page


def test_the_page_of_a_single_experiment_has_no_differences(fake, pair, training_data, tmp_path):
    ablation = ablate(
        pair[:1], training_data, tmp_path, AblationOptions(n_seeds=2, budget_seconds=60)
    )
    assert "None: there is a single experiment." in describe_ablation(ablation)
    save_figure(plot_ablation(ablation), tmp_path / "ablation.png")


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([5.0] * 6 + [2.0, 2.0, 1.0, 1.0], -0.5),  # fifths of two epochs
        ([9.0, 1.0, 1.1], 0.1),  # fifths of one
        ([1.0] * 20, 0.0),
    ],
)
def test_the_loss_change_is_from_the_last_but_one_fifth_to_the_last(losses, expected):
    assert loss_of_last_fifth(log_of(losses))[1] == pytest.approx(expected)


def test_a_run_of_one_epoch_has_no_loss_change():
    last, change = loss_of_last_fifth(log_of([1.0]))
    assert last == 1.0
    assert math.isnan(change)


# --- the whole, on a tiny demo ------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(training_data, tiny_experiment, tmp_path_factory):
    """Two experiments, two folds, two seeds."""
    folder = tmp_path_factory.mktemp("ablation")
    short = replace(tiny_experiment, train=replace(tiny_experiment.train, epochs=2))
    other = replace(short, name="plain", model=replace(short.model, temporal="none"))
    options = AblationOptions(
        n_seeds=2,
        budget_seconds=600,
        training=RunOptions(workers=0),
        evaluation=HeldOutOptions(simulation=SIMULATION),
    )
    with pytest.MonkeyPatch.context() as patch:
        shorten_previews(patch)
        ablation = ablate([short, other], training_data, folder, options)
    ablation.write_tables(folder)
    save_figure(plot_ablation(ablation), folder / "ablation.png")
    return folder, ablation


def test_every_measure_is_there_for_each_experiment_and_seed(real, training_data):
    _, ablation = real
    assert list(ablation.measures) == [
        "simulated_f1", "simulated_ap", "soundscape_f1", "soundscape_ap", "soundscape_decision_ap",
        "soundscape_decision_auc", "hidden_f1", "oof_ap", "oof_top1",
    ]  # fmt: skip
    assert ablation.table[["experiment", "seed"]].to_numpy().tolist() == [
        ["tiny", 0], ["plain", 0], ["tiny", 1], ["plain", 1]
    ]  # fmt: skip
    assert (
        ablation.table[list(ablation.measures)].apply(lambda column: column.between(0, 1)).all(None)
    )
    assert len(ablation.measures["oof_ap"].clusters) == len(training_data.recordings)
    assert (ablation.differences["low"] <= ablation.differences["high"]).all()


def test_scores_are_those_of_evaluate_and_of_the_submission(real, training_data, demo_folder):
    folder, ablation = real
    for (_, row), name in zip(ablation.table.iloc[:2].iterrows(), ("tiny", "plain"), strict=True):
        seed_folder = folder / name / "seed0"
        runs = [seed_folder / "fold0", seed_folder / "fold1"]
        options = HeldOutOptions(simulation=SIMULATION, cache_folder=seed_folder / "predictions")
        scores = evaluate(predict_held_out(runs, training_data, options)).scores
        expected = {
            (item.audio, item.metric): item.value
            for item in scores[scores["name"] == name].itertuples()
        }
        assert row["simulated_f1"] == pytest.approx(expected["simulated", "row_wise_f1"])
        assert row["simulated_ap"] == pytest.approx(expected["simulated", "macro_ap"])
        assert row["oof_ap"] == pytest.approx(expected["recordings", "macro_ap"])
        assert row["oof_top1"] == pytest.approx(expected["recordings", "top1"])
        assert row["soundscape_f1"] == pytest.approx(expected["labelled", "row_wise_f1"])
        assert row["soundscape_ap"] == pytest.approx(expected["labelled", "macro_ap"])
        for metric in ("decision_ap", "decision_auc"):
            in_table = expected["labelled", metric.replace("_", "_macro_")]
            assert row[f"soundscape_{metric}"] == pytest.approx(in_table)
        submission = score_submission(demo_folder, seed_folder / "submission.csv")
        assert row["hidden_f1"] == pytest.approx(submission.row_wise_f1)
        assert ablation.measures["hidden_f1"].all_nocall == pytest.approx(submission.all_nocall)
    nocall = scores[scores["name"] == "all nocall"].set_index(["audio", "metric"])["value"]
    for key, audio in (("simulated_f1", "simulated"), ("soundscape_f1", "labelled")):
        expected = nocall[audio, "row_wise_f1"]
        assert ablation.measures[key].all_nocall == pytest.approx(expected)


def test_seeds_are_other_networks(real):
    folder, _ = real
    hashes = {read_checkpoint(path.parent).weights_sha256 for path in folder.rglob(SETTINGS_FILE)}
    assert len(hashes) == 2 * 2 * 2


def test_a_second_call_trains_nothing_and_returns_the_same(real, training_data, tiny_experiment):
    folder, ablation = real
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")}
    again = ablate(ablation.experiments, training_data, folder, ablation.options)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")} == before
    pd.testing.assert_frame_equal(again.table, ablation.table)
    pd.testing.assert_frame_equal(again.differences, ablation.differences)


def test_an_ablation_on_other_folds_needs_another_folder(real, training_data):
    folder, ablation = real
    recordings = training_data.recordings
    other = replace(training_data, recordings=recordings.assign(fold=1 - recordings["fold"]))
    with pytest.raises(ValueError, match=r"fold0 .*folds.*another output folder"):
        ablate(ablation.experiments, other, folder, ablation.options)


def test_one_fold_scores_only_the_recordings_it_held_out(real, training_data):
    folder, ablation = real
    run = Run(ablation.experiments[0], 1, folder / "tiny" / "seed0" / "fold1")
    assert (run.folder / SETTINGS_FILE).is_file()
    options = HeldOutOptions(simulation=SIMULATION)
    _, values = score_block({"tiny": [run]}, training_data, options)["tiny"]["oof_top1"]
    assert len(values) == (training_data.recordings["fold"] == 1).sum()


def test_tables_and_picture_are_written(real):
    folder, ablation = real
    table = pd.read_csv(folder / "ablation.csv")
    assert len(table) == 4
    assert {"soundscape_f1", "clips_per_second", "loss_change_last_fifth"} <= set(table)
    assert len(pd.read_csv(folder / "ablation_differences.csv")) == len(ablation.measures)
    means = pd.read_csv(folder / "ablation_means.csv")
    assert len(means) == 2 * len(ablation.measures)
    of_recordings = means[means["measure"] == "oof_ap"]
    assert (of_recordings["classes"] == len(ablation.data.classes)).all()
    assert (of_recordings["left_out"] == 0).all()
    assert means.loc[means["measure"] == "oof_top1", "classes"].isna().all()
    height, width = matplotlib.image.imread(folder / "ablation.png").shape[:2]
    assert width == 1320
    assert height > 500


def test_the_page_of_a_real_one_holds_no_nan(real):
    page = describe_ablation(real[1])
    assert "nan" not in page.lower()
