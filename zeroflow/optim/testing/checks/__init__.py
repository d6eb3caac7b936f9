"""The checks: each takes a ``Subject`` and raises ``ConformanceError`` where it does not do what it claims."""

from zeroflow.optim.testing.checks.side_effects import (
    check_batch_statistics_move_once_a_step,
    check_every_evaluation_sees_the_same_function,
    check_memory_is_that_of_a_forward_pass,
    check_order_of_parameters_does_not_matter,
    check_parameters_are_restored_exactly,
    check_results_do_not_depend_on_who_evaluates,
    check_resumes_bit_for_bit,
)
from zeroflow.optim.testing.checks.steps import (
    check_directions_are_new_for_each_query_step_and_seed,
    check_estimate_is_unbiased,
    check_keeps_the_best_and_forgets_rejected_moments,
    check_mask_holds_the_same_components_still_everywhere,
    check_snapshot_is_a_copy_and_both_estimates_share_directions,
    check_trajectory_follows_the_formula,
    check_update_lies_along_perturbations,
)

__all__ = [
    "check_batch_statistics_move_once_a_step",
    "check_directions_are_new_for_each_query_step_and_seed",
    "check_estimate_is_unbiased",
    "check_every_evaluation_sees_the_same_function",
    "check_keeps_the_best_and_forgets_rejected_moments",
    "check_mask_holds_the_same_components_still_everywhere",
    "check_memory_is_that_of_a_forward_pass",
    "check_order_of_parameters_does_not_matter",
    "check_parameters_are_restored_exactly",
    "check_results_do_not_depend_on_who_evaluates",
    "check_resumes_bit_for_bit",
    "check_snapshot_is_a_copy_and_both_estimates_share_directions",
    "check_trajectory_follows_the_formula",
    "check_update_lies_along_perturbations",
]
