"""Which keys of a DeepSpeed file the plan counts, and what it says of those that it does not: nothing is left out without a word."""

from __future__ import annotations

import sys
from typing import Any

# Of zero_optimization, without "stage3_".
_COUNTED = {
    "stage", "contiguous_gradients", "reduce_bucket_size", "prefetch_bucket_size", "param_persistence_threshold", "max_live_parameters",
    "max_reuse_distance", "sub_group_size", "overlap_comm", "zero_hpz_partition_size", "offload_param", "offload_optimizer",
}  # fmt: skip
# They change neither memory, bytes nor time, or not with stage 3.
_HARMLESS = {
    "allgather_partitions", "allgather_bucket_size", "use_multi_rank_bucket_allreduce", "compute_grad_norm", "load_from_fp32_weights",
    "elastic_checkpoint", "gather_16bit_weights_on_model_save", "gather_fp16_weights_on_model_save", "ignore_unused_parameters",
    "legacy_stage1", "round_robin_gradients", "parameter_alignment", "pipeline_loading_checkpoint", "override_module_apply",
    "log_trace_cache_warnings", "enable_sanity_checks", "save_muon_momentum_buffer_in_memory",
}  # fmt: skip
# DeepSpeed's default, and what another value changes.
_CHANGES: dict[str, tuple[Any, str]] = {
    "zero_quantized_weights": (False, "weights are gathered in 8 bits, about half of bf16's bytes, and rounded"),
    "zero_quantized_nontrainable_weights": (
        False,
        "a teacher's shards are held and gathered in 8 bits, about half of bf16's bytes, and rounded",
    ),
    "zero_quantized_gradients": (False, "on several nodes gradients are reduced in 4 bits, and rounded"),
    "zenflow": (None, "a part of the gradients stays on the device, and the optimizer runs beside the step"),
    "reduce_scatter": (True, "gradients are reduced otherwise"),
    "use_all_reduce_for_fetch_params": (
        False,
        "weights are fetched by an all-reduce, twice the bytes of an all-gather",
    ),
    "allgather_sequential": (False, "weights are gathered one by one, in more calls and without the gather buffer"),
    "module_granularity_threshold": (0, "small modules are gathered together"),
    "model_persistence_threshold": (sys.maxsize, "fewer small weights stay whole"),
    "memory_efficient_linear": (True, "a layer's weights may be kept from forward to backward"),
    "leaf_module": (None, "modules named there are gathered as a whole"),
    "cpu_offload": (None, "it is deprecated, and asks for offload_optimizer"),
    "cpu_offload_param": (None, "it is deprecated, and asks for offload_param"),
    "cpu_offload_use_pin_memory": (None, "it is deprecated"),
}
_OFFLOAD_CHANGES = {
    ("offload_optimizer", "ratio"): "a part of the optimizer stays on the device",
    ("offload_optimizer", "super_offload"): "the optimizer runs beside the backward",
}
# Of the file itself.
_SECTIONS = {
    "zero_optimization", "bf16", "fp16", "communication_data_type", "data_types", "aio", "checkpoint", "comms_logger", "tensorboard",
    "csv_monitor", "wandb", "comet", "wall_clock_breakdown", "dump_state", "steps_per_print", "prescale_gradients",
    "gradient_predivide_factor", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "memory_breakdown", "seed", "disable_allgather",
}  # fmt: skip


def uncounted(user: dict[str, Any], field: str, optimizer: bool = True) -> tuple[str, ...]:
    """A line for each setting of the file that is not at DeepSpeed's default and that the plan does not count.

    Args:
        field: the setting of the recipe that names the file.
        optimizer: the model is trained; of others what concerns gradients and optimizer does not matter.
    """
    zero = user["zero_optimization"]
    found = []
    for key, value in zero.items():
        name = key.removeprefix("stage3_")
        if name in _COUNTED | _HARMLESS or value == "auto" or (not optimizer and name in _OF_GRADIENTS):
            continue
        default, change = _CHANGES.get(name, (None, "the plan does not know it"))
        if value != default:
            found.append((key, change))
    for (block, key), change in _OFFLOAD_CHANGES.items():
        value = (zero.get(block) or {}).get(key)
        if optimizer and value not in (None, False, 1, 1.0):
            found.append((f"{block}.{key}", change))
    for key, change in (
        ("bf16_master_weights_and_grads", "master weights and gradients take half"),
        ("bf16_optimizer_states", "AdamW's moments take half"),
    ):
        if optimizer and (user.get("bf16") or {}).get(key):
            found.append((f"bf16.{key}", change))
    found += [(key, "the plan does not know it") for key in user if key not in _SECTIONS]
    return tuple(f"not counted: {key} in {field} ({change})" for key, change in found)


_OF_GRADIENTS = {"zero_quantized_gradients", "reduce_scatter", "zenflow", "cpu_offload"}
