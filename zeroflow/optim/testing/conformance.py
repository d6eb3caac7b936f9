"""All checks, and the subjects that they apply to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from zeroflow.optim.testing import checks
from zeroflow.optim.testing.subject import Subject

CHECKS: Mapping[Callable[[Subject], None], Callable[[Subject], bool]] = {
    checks.check_estimate_is_unbiased: lambda s: s.unbiased,
    checks.check_update_lies_along_perturbations: lambda s: s.along,
    # Of SVRG places beside the snapshot have the way there in common.
    checks.check_directions_are_new_for_each_query_step_and_seed: lambda s: s.unbiased and s.along and not s.snapshot,
    checks.check_mask_holds_the_same_components_still_everywhere: lambda s: s.sparsity > 0,
    checks.check_snapshot_is_a_copy_and_both_estimates_share_directions: lambda s: s.snapshot,
    checks.check_keeps_the_best_and_forgets_rejected_moments: lambda s: s.keeps_best,
    checks.check_parameters_are_restored_exactly: lambda s: True,
    checks.check_every_evaluation_sees_the_same_function: lambda s: True,
    checks.check_batch_statistics_move_once_a_step: lambda s: not s.per_example,
    checks.check_results_do_not_depend_on_who_evaluates: lambda s: s.takes("executor"),
    checks.check_order_of_parameters_does_not_matter: lambda s: True,
    checks.check_trajectory_follows_the_formula: lambda s: s.reference is not None and not s.per_example,
    checks.check_memory_is_that_of_a_forward_pass: lambda s: s.forward_only and s.kept is not None,
    checks.check_resumes_bit_for_bit: lambda s: s.resumes,
}
"""Each check with a function that tells whether it applies to a subject."""


@dataclass(frozen=True)
class Outcome:
    """Result of one check. ``passed`` is None where it does not apply; ``message`` says what is wrong."""

    check: str
    passed: bool | None
    message: str = ""

    def __str__(self) -> str:
        mark = {True: "ok", False: "FAILED", None: "-"}[self.passed]
        return f"{mark:6s} {self.check}" + (f"\n       {self.message}" if self.message else "")


def run_conformance(subject: Subject) -> list[Outcome]:
    """Run every check that applies, and report on all."""
    outcomes = []
    for check, applies in CHECKS.items():
        if not applies(subject):
            outcomes.append(Outcome(check.__name__, None))
            continue
        try:
            with warnings.catch_warnings():
                # Plain SPSA for a per-example method is a claim under test here, not news.
                warnings.filterwarnings("ignore", message="zo-per-example")
                check(subject)
        except Exception as error:
            # An optimizer that breaks down has failed like one that is wrong.
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            outcomes.append(Outcome(check.__name__, False, f"{kind}{error}"))
        else:
            outcomes.append(Outcome(check.__name__, True))
    return outcomes
