"""`modeseek check --plan` against what was measured: the same model shape, batch and layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modeseek_ray.config import parse_config
from modeseek_ray.jobs.hardware import hardware_of, this_cpu
from modeseek_ray.jobs.models import ModelInfo
from modeseek_ray.jobs.scale import scale
from tests.gpu.trainer import GIB, PACED
from tests.gpu.workload import Case


def figures(
    case: Case, model: Path, paced: dict[str, Any], hardware: str = "h100"
) -> dict[str, dict[str, Any]]:
    """Seconds and bytes of a plain step, planned and measured, layout by layout.

    Without data the plan takes samples of the model's longest length, half of each trained on: as `Case` is.
    """
    tokenizer = model / "tokenizer.json"  # the plan wants one to be there, and does not look into it
    tokenizer.touch()
    try:
        info = ModelInfo.read(model)
    finally:
        tokenizer.unlink()
    found = {}
    on = hardware_of(hardware) if case.device == "cuda" else this_cpu(1)
    for name, given in PACED.items():
        measured = paced.get(f"bfloat16, {name}", {})
        if "sft_step_s" not in measured:
            continue
        resources = {k: v for k, v in given.items() if k != "lora"}
        training: dict[str, Any] = {"batch_size": case.samples}
        if given.get("lora"):
            training["lora"] = {"rank": 4}
        config = parse_config(
            {
                "model": str(model),
                "training_file": "rows.jsonl",
                "method": {"type": "supervised", "supervised": {"training": training}},
                "resources": {
                    **resources,
                    "dtype": "bfloat16",
                    "gpus_per_worker": 1.0 if case.device == "cuda" else 0.0,
                },
            }
        )
        planned = scale(config, info, on)
        # The driver is not part of what was measured.
        seconds = planned.step_s - on.step_overhead_s
        found[name] = {
            "planned_step_s": seconds,
            "measured_step_s": measured["sft_step_s"],
            "planned_over_measured": seconds / measured["sft_step_s"],
            **{f"planned_{part.name}_s": part.seconds for part in planned.step},
            "planned_gib": planned.device_bytes / GIB,
            "measured_peak_gib": measured["sft_peak_gib"],
        }
        if measured["sft_peak_gib"]:
            found[name]["planned_over_measured_memory"] = (
                planned.device_bytes / GIB / measured["sft_peak_gib"]
            )
    return found
