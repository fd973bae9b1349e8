"""The rule by which the runs of a study are stopped early; a module of its own, since Optuna is slow to import."""

import copy
from typing import Any

from optuna.pruners import SuccessiveHalvingPruner
from optuna.trial import TrialState

from experiments.study.journal import latest

_COMPETING = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)


class Halving(SuccessiveHalvingPruner):
    """Optuna's rule for the latest trial of each arm, without those that failed or were interrupted.

    A run that failed, or whose folder was removed, has another trial when it starts again. With both trials, the arm
    would compete twice, and against itself.
    """

    def prune(self, study: Any, trial: Any) -> bool:
        """Return whether a run is to be stopped."""

        def competing(deepcopy: bool) -> list[Any]:
            return [each for each in latest(study.get_trials(deepcopy)).values() if each.state in _COMPETING]

        competition = copy.copy(study)
        competition.get_trials = competing
        return super().prune(competition, trial)
