"""Which test runs when: ``quick`` for each save, the default before a commit, ``slow`` in CI as far as time goes.

One list instead of marks all over the tests, so that it can be made anew from ``pytest -m "" --durations=0``. A test is
slow if all of its cases together take more than some seven seconds on a quiet core, unless nothing else shows so early
that something is broken.
"""

from __future__ import annotations

#: By file: tests of the slow lane.
SLOW: dict[str, tuple[str, ...]] = {
    "demo/test_demo_model.py": ("test_samples_are_recognised_and_near_the_real_digits",),
    "demo/test_run.py": ("test_the_demo_writes_what_it_measured",),
    "external/test_adapted_linears.py": (
        "test_lora",
        "test_an_opaque_op_in_place_of_linear",
    ),
    "kernels/test_benches.py": (
        "test_they_verify_on_any_machine",
        "test_without_a_gpu_they_fail",
    ),
    "kernels/test_interpreter.py": ("test_the_kernels_pass_the_same_tests",),
    "passes/test_fuse.py": (
        "test_trajectories_are_the_oracles",
        "test_under_inductor_runs_alone_become_kernels",
    ),
    "passes/test_fuse_norms.py": ("test_norms_as_models_have_them",),
    "passes/test_group.py": (
        "test_variants_that_compute_some",
        "test_other_models",
        "test_a_trajectory_is_the_oracles",
        "test_each_block_of_a_dit_embeds_the_timestep_for_itself",
    ),
    "passes/test_guard_specialize.py": ("test_flops_left_are_the_masks",),
    "passes/test_runs.py": (
        "test_in_bfloat16_a_run_is_as_exact_as_one_add_after_the_other",
        "test_one_op_for_each_run_in_bfloat16",
    ),
    "pipelines/test_runs.py": ("test_computing_everything_is_the_plain_pipeline",),
    "test_backend.py": (
        "test_code_on_disk_is_of_the_same_ops",
        "test_what_another_process_left_on_disk",
        "test_changing_shapes_under_inductor",
        "test_changing_shapes_between_trajectories",
    ),
    "test_bench.py": (
        "test_the_frontier_of_quality",
        "test_the_default_plan_beside_every_nth_step",
        "test_the_papers_models",
        "test_narrowing_of_the_published_dit",
        "test_the_samplers_of_quality_agree",
    ),
    "test_bench_end_to_end.py": (
        "test_every_configuration_has_figures_or_a_reason",
        "test_the_table_says_the_same",
        "test_the_file_and_the_picture",
        "test_mac_ratios_are_as_the_schedules_imply",
        "test_ours_has_one_graph_and_compiles_nothing_later",
        "test_outputs_were_compared",
        "test_each_of_our_schedules_is_compared",
    ),
    "test_choice.py": (
        "test_everything_is_computed_where_nothing_else_is_good_enough",
        "test_the_cheapest_that_is_good_enough",
        "test_rows_of_taylorseer_are_tried",
        "test_a_calibration_serves_several_budgets",
        "test_the_best_of_a_budget",
    ),
    "test_cli.py": (
        "test_calibrate_schedule_plot_and_compare",
        "test_optimal_schedules",
        "test_the_self_test",
        "test_explain_a_class_of_diffusers_without_weights",
    ),
    "test_comparison.py": ("test_pipelines_take_turns",),
    "test_compiler.py": (
        "test_weights_of_a_subclass_with_a_torch_function",
        "test_two_models_of_one_class_do_not_share_anything",
    ),
    "test_dump.py": (
        "test_pytorchs_trace_has_our_stages",
        "test_a_drawing_has_a_box_per_site",
        "test_every_file_runs_and_gives_what_its_graph_gives",
    ),
    "test_examples.py": (
        "test_it_runs",
        "test_the_notebook_runs",
    ),
    "test_first_calls.py": ("test_models_in_threads_of_their_own_are_captured_once_each",),
    "test_first_recipe.py": (
        "test_where_forecasts_reach_over_a_change_of_the_batch",
        "test_never_behind_every_nth_step",
        "test_the_demo_model_is_forecast_and_far_ahead",
    ),
    "test_hooks.py": (
        "test_hooks_on_each_layer",
        "test_group_offloading_of_blocks",
    ),
    "test_importers.py": (
        "test_taylor_seer_decides_and_forecasts_as_diffusers_hooks_do",
        "test_pab_decides_and_reuses_as_diffusers_hooks_do",
    ),
    "test_inputs.py": (
        "test_a_timestep_that_is_a_float_costs_the_cache_and_the_report_says_so",
        "test_what_changes_with_each_step_and_shapes_nothing_keeps_the_cache",
        "test_batch_and_resolution_change_between_trajectories",
        "test_autocast",
        "test_float16",
    ),
    "test_optimal.py": (
        "test_optimal_schedules_keep_to_the_budget",
        "test_effects_are_what_reads_change_of_the_output",
        "test_a_followed_schedule_must_have_the_samplers_steps",
        "test_bad_requests_are_refused",
        "test_the_longest_reuse",
        "test_products_give_a_forecasts_error",
        "test_a_followed_schedule_gives_the_compiled_models_trajectory",
        "test_calibration_is_repeated_until_the_schedule_stays_the_same",
        "test_merging_adds_effects_and_products",
        "test_a_schedule_that_never_stays_the_same_is_left_with_a_warning",
        "test_an_optimal_schedule_is_nearer_to_the_uncached_sample",
        "test_what_is_predicted_is_what_comes_out",
    ),
    "test_orders.py": (
        "test_a_history_of_differences",
        "test_under_other_inner_compilers",
        "test_on_a_trained_model_the_differences_lose_little",
    ),
    "test_properties.py": (
        "test_many_models_of_one_class_are_compiled_and_cached",
        "test_every_dit_follows_every_schedule",
        "TestSampler",
    ),
    "test_readme.py": ("test_the_code_runs",),
    "test_recording.py": ("test_calls_are_repeated_with_inputs_of_the_same_strides",),
    "test_stacks.py": (
        "test_every_class",
        "test_times_and_streams",
        "test_under_inductor",
        "test_memory_stays_flat_over_trajectories_of_changing_sizes",
        "test_choose_tries_both_grains",
    ),
    "test_fitted.py": ("test_a_schedule_is_planned_with_fits_and_choose_tries_them",),
    "test_structures.py": (
        "test_all_compute_is_the_plain_model_bit_for_bit",
        "test_every_branch_is_a_site_and_nothing_else",
        "test_the_trajectory_is_the_oracles",
    ),
    "test_trajectories.py": (
        "test_trajectories_equal_the_oracles_under_compilers",
        "test_bfloat16_under_inductor_is_as_exact_as_the_oracle",
        "test_trajectories_equal_the_oracles_under_inductor",
        "test_an_all_compute_schedule_is_the_plain_model_bit_for_bit",
        "test_the_sites_are_found_under_their_names",
        "test_a_step_that_reuses_everything_runs_no_product_of_a_branch",
    ),
    "test_types.py": ("test_types",),
    "test_whole.py": (
        "test_one_graph_its_work_and_what_is_said_of_it",
        "test_an_adapter_that_is_put_on_later_is_run",
        "test_the_trajectory_is_the_oracles",
        "test_all_compute_is_the_plain_model_bit_for_bit",
        "test_what_cannot_be_kept_whole_is_computed_at_every_step",
        "test_autocast_is_not_kept_whole",
        "test_autocast_later_on",
        "test_where_the_broken_module_cannot_be_kept_whole_the_one_around_it_can",
    ),
    "test_zoo.py": (
        "test_every_class_on_every_backend",
        "test_a_class_that_the_zoo_does_not_know_is_tried_by_guess",
    ),
    "passes/test_sites.py": ("test_the_same_sites_are_found_in_inductors_graph",),
    "test_bench_gpu.py": ("test_flux_at_a_small_size",),
    "test_explain.py": (
        "test_explain_predicts_what_then_happens",
        "test_explain_runs_inside_of_accelerates_hooks",
    ),
    "pipelines/test_features.py": (
        "test_calibration_changes_nothing_and_measures_the_branches",
        "test_choose_on_a_pipeline",
        "test_explain_and_dump_of_two_denoisers",
    ),
    "test_eager_work.py": ("test_attention_that_ran_in_no_graph_becomes_a_site",),
    "pipelines/test_threads.py": ("test_first_calls_at_once_are_one_capture",),
    "pipelines/test_schedulers.py": ("test_guidance_that_is_switched_on_and_off",),
}

#: Files whose other tests take more than some ten seconds: in the default lane, and not in the quick one.
NOT_QUICK = frozenset(
    (
        "demo/test_demo_model.py",
        "kernels/test_ahead_of_time.py",
        "kernels/test_without_triton.py",
        "passes/test_fuse.py",
        "passes/test_group.py",
        "passes/test_runs.py",
        "passes/test_sites.py",
        "passes/test_store_products.py",
        "pipelines/test_features.py",
        "pipelines/test_runs.py",
        "pipelines/test_schedulers.py",
        "test_backend.py",
        "test_bench_end_to_end.py",
        "test_bench_gpu.py",
        "test_choice.py",
        "test_cli.py",
        "test_comparison.py",
        "test_compiler.py",
        "test_cuda_graphs.py",
        "test_docstrings.py",
        "test_eager_work.py",
        "test_fitted.py",
        "test_first_calls.py",
        "test_first_recipe.py",
        "test_inputs.py",
        "test_optimal.py",
        "test_orders.py",
        "test_package.py",
        "test_properties.py",
        "test_recording.py",
        "test_max_cache_bytes.py",
        "test_stacks.py",
        "test_trajectories.py",
        "test_whole.py",
        "test_zoo.py",
    )
)
