"""What the trials of a study know: a map's figures, so that it is not measured again, and how long they took."""

from __future__ import annotations

import math
import time
from datetime import datetime

from optuna.study import Study
from optuna.trial import TrialState

from search.measure.objective import Measured
from search.trials.attributes import DIFFERENCES, FINISHED, MEASURED, log_increase, unpacked
from ssm_mp.evaluation.evaluate import Increase, skewness


def known_of(study: Study, number: int) -> Measured | None:
    """What a trial measured on all search windows; None where it was stopped before, or is of an older version."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    trial = next((trial for trial in complete if trial.number == number), None)
    if trial is None or DIFFERENCES not in trial.user_attrs or "compression" not in trial.user_attrs[MEASURED]:
        return None
    measured, differences = trial.user_attrs[MEASURED], unpacked(trial.user_attrs[DIFFERENCES])
    if differences.size != measured.get("of_windows", differences.size):
        return None
    mean, _ = log_increase(measured)
    stderr = measured["stderr_percent"] / (100 * math.exp(mean))
    return Measured(
        bytes=measured["bytes"],
        compression=measured["compression"],
        perplexity=measured["perplexity"],
        increase=Increase(mean, stderr, differences.size, skewness(differences)),
        differences=differences,
        of_windows=differences.size,
    )


def seconds_spent(study: Study, began: float) -> float:
    """How long a search has taken: the trials of former runs and other processes, and this process since `began`.

    began: by the clock (`time.time`). Trials of others that ran beside this process count as well.
    """
    own = datetime.fromtimestamp(began)  # Optuna writes no time zone
    former = [
        trial.user_attrs.get(MEASURED, {}).get("seconds", 0.0)
        for trial in study.get_trials(deepcopy=False, states=FINISHED)
        if trial.datetime_start is not None and trial.datetime_start < own
    ]
    return float(sum(former)) + time.time() - began
