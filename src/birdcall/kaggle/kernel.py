"""Run a staged package on the competition's data: what the submission kernel calls."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from birdcall.inference.decision import Decision, read_decision
from birdcall.inference.ensemble import Ensemble, Member, default_device, load_member
from birdcall.inference.tables import write_submission
from birdcall.kaggle.manifest import find_changes
from birdcall.kaggle.submission import (
    SUMMARY_FILE,
    SubmissionSummary,
    label_rows_of,
    write_nocall,
    write_summary,
)
from birdcall.kaggle.test_set import (
    EXAMPLE_AUDIO,
    EXAMPLE_LABELS,
    TEST_AUDIO,
    example_audio_folder,
    find_test_audio_folder,
    read_example_rows,
)
from birdcall.storage.files import inside

logger = logging.getLogger(__name__)

DECISION_FILE = "decision.json"
MEMBERS_FOLDER = "members"
EXAMPLE_SUBMISSION = "example_submission.csv"  # what the members say of the example soundscapes


def run_kernel(
    package: Path, data: Path, submission: Path, budget_seconds: float | None = None
) -> SubmissionSummary:
    """Predict ``test.csv`` in ``data`` with the package's members and write ``submission``.

    A valid all-nocall file lies there before any model is loaded. A member that is not as packaged,
    or does not run, is left out, and so are members for which ``budget_seconds`` do not suffice;
    ``summary.json`` names them. Without ``test_audio``, as when the kernel is not yet scored, the
    rows say nocall and the members are tried on the example soundscapes. Raises an error if no
    member ran: a kernel without models must not score like all-nocall.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    rows = write_nocall(data, submission)
    ensemble, decision, refused = open_package(package, default_device())
    for name, reason in refused.items():
        logger.error("%s: left out: %s", name, reason)
    logger.info("%d members on %s, data in %s", len(ensemble.members), ensemble.device, data)
    folder = find_test_audio_folder(data)
    if folder is None:
        summary = _try_examples(
            data, ensemble, decision=decision, submission=submission, budget_seconds=budget_seconds
        )
    else:
        labels, summary = label_rows_of(
            rows, folder, ensemble=ensemble, decision=decision, budget_seconds=budget_seconds
        )
        write_submission(submission, list(rows["row_id"]), labels)
    summary = replace(summary, left_out=refused | summary.left_out)
    write_summary(submission.with_name(SUMMARY_FILE), summary)
    logger.info("%s: %s", submission, summary)
    if not summary.members:
        raise ValueError(
            f"no member has heard anything ({len(summary.failed)} recordings failed, "
            f"{len(summary.late)} too late): {submission} says nocall everywhere"
        )
    return summary


def _try_examples(
    data: Path,
    ensemble: Ensemble,
    decision: Decision,
    submission: Path,
    budget_seconds: float | None,
) -> SubmissionSummary:
    """Let the members label the example soundscapes, to see that they run."""
    folder = example_audio_folder(data)
    if not folder.is_dir() or not (data / EXAMPLE_LABELS).is_file():
        raise FileNotFoundError(
            f"{data}: neither {TEST_AUDIO} nor {EXAMPLE_AUDIO}: nothing to run the models on"
        )
    logger.warning(
        "%s is not there: every row says nocall; trying the members on %s", TEST_AUDIO, folder
    )
    rows = read_example_rows(data)
    labels, summary = label_rows_of(
        rows, folder, ensemble=ensemble, decision=decision, budget_seconds=budget_seconds
    )
    write_submission(submission.with_name(EXAMPLE_SUBMISSION), list(rows["row_id"]), labels)
    return summary


def open_package(
    package: Path, device: torch.device | str
) -> tuple[Ensemble, Decision, dict[str, str]]:
    """Load the members of a package in the decision's order: the best experiment's first.

    Also returns the members that are refused, and why: files that are missing, or not what the
    manifest says, or cannot be loaded. Raises an error if none is left, or if code or decision are
    not as packaged.
    """
    changed = find_changes(package)
    for name, reason in changed.items():
        if Path(name).parts[0] != MEMBERS_FOLDER:
            raise ValueError(reason)
    decision = read_decision(package / DECISION_FILE)
    names = decision.members or tuple(
        sorted(folder.name for folder in (package / MEMBERS_FOLDER).iterdir())
    )
    members: list[Member] = []
    refused: dict[str, str] = {}
    for name in names:
        reasons = [why for file, why in changed.items() if Path(file).parts[1:2] == (name,)]
        try:
            if reasons:
                raise ValueError(reasons[0])
            folder = inside(package / MEMBERS_FOLDER, name)
            members.append(load_member(folder, decision.window_config))
        except (ValueError, OSError) as error:
            refused[name] = str(error)
    if not members:
        raise ValueError(f"{package}: no member can be used: {'; '.join(refused.values())}")
    return Ensemble(members, device, decision.window_config), decision, refused


def require_all_members(refused: Mapping[str, str]) -> None:
    """Raise ValueError with the reason if a member of a package cannot be used."""
    for reason in refused.values():
        raise ValueError(reason)
