"""The rule by which the runs of a study are stopped early; a module of its own, since Optuna is slow to import."""

import copy
from functools import partial
from typing import Any

from optuna.pruners import SuccessiveHalvingPruner
from optuna.trial import TrialState

_COMPETING = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)


class Halving(SuccessiveHalvingPruner):
    """Optuna's rule without the values of runs that failed or were interrupted: each has another trial when it goes on.

    Otherwise an arm would compete twice, and against itself.
    """

    def prune(self, study: Any, trial: Any) -> bool:
        """Return whether a run is to be stopped."""
        competition = copy.copy(study)
        competition.get_trials = partial(study.get_trials, states=_COMPETING)
        return super().prune(competition, trial)
