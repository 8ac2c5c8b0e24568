"""The real trainer on the card: the same figures as on a CPU, the same bits after a checkpoint, and its pace.

Each group of layouts runs in a process of its own (`tests.gpu.rank`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.gpu.rank import Layout, unequal_rows
from tests.gpu.workload import Case

ROOT = Path(__file__).parents[2]
Figures = dict[str, Any]
GIB = 2**30


def _layouts(work: str, described: dict[str, dict[str, Any]], dtype: str) -> list[Layout]:
    """`lora` among the resources is the job's, not a resource."""
    return [
        Layout(f"{dtype}, {name}", work, {**resources, "dtype": dtype}, lora)
        for name, given in described.items()
        for lora, resources in [(given.get("lora", False), {k: v for k, v in given.items() if k != "lora"})]
    ]


STAGES: dict[str, dict[str, Any]] = {f"ZeRO {stage}": {"zero_stage": stage} for stage in range(4)}
VARIANTS: dict[str, dict[str, Any]] = {
    "recomputed": {"gradient_checkpointing": True},
    "scored again": {"keep_graph": "never"},
    "LoRA": {"lora": True},
    "ZeRO 3, LoRA": {"zero_stage": 3, "lora": True},
    "optimizer on the host": {"offload_optimizer": True},
    "ZeRO 3, optimizer on the host": {"zero_stage": 3, "offload_optimizer": True},
}
RESUMED = {
    **STAGES,
    "LoRA": {"lora": True},
    "ZeRO 3, LoRA": {"zero_stage": 3, "lora": True},
    "optimizer on the host": {"offload_optimizer": True},
    "ZeRO 3, optimizer on the host": {"zero_stage": 3, "offload_optimizer": True},
}
PACED = {
    "ZeRO 1": {"zero_stage": 1},
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 3": {"zero_stage": 3},
    "recomputed": {"gradient_checkpointing": True},
    "scored again": {"keep_graph": "never"},
    "LoRA": {"lora": True},
    "optimizer on the host": {"offload_optimizer": True},
}
# What shows at toy size that the code runs; each rank takes its time to start on a CPU.
AT_TOY_SIZE = ("ZeRO 2",)


def _chosen(case: Case, described: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: given for name, given in described.items() if not case.tiny or name in AT_TOY_SIZE}


def agreement(case: Case, scratch: Path) -> dict[str, Figures]:
    """Five weighted steps of a small model in every layout, against float32 on the CPU and float64 log-probs."""
    small = replace(case, layers=2, tiny=True)
    model = small.save(scratch / "small")
    samples = {"count": 12, "longest": 40, "vocabulary": small.shape["vocab_size"]}
    on_cpu = [
        Layout("full", "course", {"zero_stage": 0}),
        Layout("LoRA", "course", {"zero_stage": 0}, lora=True),
    ]
    expected = run(on_cpu, model, samples, "cpu", scratch)
    exact = np.concatenate(float64_log_probs(model, unequal_rows(**samples)))
    described = _chosen(case, {**STAGES, **VARIANTS})
    layouts = [x for dtype in ("float32", "bfloat16") for x in _layouts("course", described, dtype)]
    found = run(_on(case.device, layouts), model, samples, case.device, scratch)
    figures: dict[str, Figures] = {}
    for layout in layouts:
        answer, reference = found[layout.name], expected["LoRA" if layout.lora else "full"]
        if "error" in answer or "error" in reference:
            figures[layout.name] = {"error": answer.get("error") or reference.get("error")}
            continue
        losses, others = np.array(answer["losses"]), np.array(reference["losses"])
        off = np.abs(np.concatenate(answer["tokens"]) - exact)
        figures[layout.name] = {
            "first_loss_off_relative": float(abs(losses[0] / others[0] - 1)),
            "losses_off_relative": float(np.abs(losses / others - 1).max()),
            "grad_norm_off_relative": abs(answer["grad_norms"][0] / reference["grad_norms"][0] - 1),
            "token_off_mean_nats": float(off.mean()),
            "token_off_max_nats": float(off.max()),
            "sha256": answer["sha256"][:12],
        }
    return figures


def float64_log_probs(model: Path, samples: Iterable[Any]) -> list[np.ndarray]:
    """Of every token but the first, by transformers alone, on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    exact = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    found = []
    for sample in samples:
        ids_T = torch.from_numpy(sample.token_ids_T.astype(np.int64))
        with torch.no_grad():
            log_probs_TV = exact(ids_T[None]).logits[0, :-1].log_softmax(-1)
        found.append(log_probs_TV.gather(1, ids_T[1:, None])[:, 0].numpy())
    return found


def resumption(case: Case, scratch: Path) -> dict[str, Figures]:
    """Whether the same job gives the same bits twice, and after a checkpoint."""
    small = replace(case, layers=2, tiny=True)
    model = small.save(scratch / "small")
    # Long ones, so that attention's backward pass takes many blocks, whose sums have to keep their order.
    samples = {"count": 6, "longest": min(1500, case.length), "vocabulary": small.shape["vocab_size"]}
    described = _chosen(case, RESUMED)
    layouts = [x for dtype in ("float32", "bfloat16") for x in _layouts("resume", described, dtype)]
    return run(_on(case.device, layouts), model, samples, case.device, scratch)


def pace(case: Case, model: Path, scratch: Path) -> dict[str, Figures]:
    """Steps of the wide model: seconds, tokens/s, memory, and what a weighted step costs beside a plain one."""
    paced = _layouts("pace", _chosen(case, PACED), "bfloat16")
    layouts = [replace(layout, repeats=case.repeats) for layout in paced]
    if not case.tiny:  # slow: there are no matrix units for float32
        layouts += _layouts("pace", {"ZeRO 0": {"zero_stage": 0}}, "float32")
    keys = ("device", "layers", "samples", "length", "trained", "tiny", "repeats")
    shape = {key: getattr(case, key) for key in keys}
    found: dict[str, Figures] = {}
    for layout in _on(
        case.device, layouts
    ):  # a process each: DeepSpeed's ZeRO-3 does not let go of everything
        found |= run([layout], model, shape, case.device, scratch, equal=True)
    return {name: _paced(answer) for name, answer in found.items()}


def _paced(answer: Figures) -> Figures:
    if "error" in answer:
        return answer
    figures: Figures = {"setup_s": answer["setup_s"]}
    for name in ("sft", "weighted"):
        seconds, peak = answer[f"{name}_step_s"], answer[f"{name}_peak_bytes"]
        figures |= {
            f"{name}_step_s": seconds,
            f"{name}_tokens_per_s": answer["tokens"] / seconds,
            f"{name}_peak_gib": None if peak is None else peak / GIB,
            **{f"{name}_{part}_s": taken for part, taken in answer[f"{name}_parts_s"].items()},
        }
    figures["weighted_over_sft"] = answer["weighted_step_s"] / answer["sft_step_s"]
    for key in ("held_bytes", "setup_peak_bytes"):
        if key in answer:
            figures[key.replace("bytes", "gib")] = answer[key] / GIB
    return figures


def _on(device: str, layouts: list[Layout]) -> list[Layout]:
    """GPUs are a resource of the job."""
    more = {"gpus_per_worker": 1.0, "cpus_per_worker": float(max(1, (os.cpu_count() or 2) - 1))}
    return [
        replace(layout, resources={**layout.resources, **(more if device == "cuda" else {})})
        for layout in layouts
    ]


def run(
    layouts: list[Layout],
    model: Path,
    samples: dict[str, Any],
    device: str,
    scratch: Path,
    *,
    equal: bool = False,
    timeout_s: float = 400.0,
) -> dict[str, Figures]:
    """Figures by layout. Those that a dead process left out are said to be missing."""
    wanted, out = scratch / "wanted.json", scratch / "figures.jsonl"
    wanted.write_text(
        json.dumps(
            {
                "model": str(model),
                "samples": samples,
                "equal": equal,
                "layouts": [layout.to_dict() for layout in layouts],
            }
        )
    )
    out.unlink(missing_ok=True)
    environment = {**os.environ, "DS_ACCELERATOR": device, "PYTHONPATH": _paths()}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-m", "tests.gpu.rank", str(wanted), str(out)]
    ended = "the process ended"
    try:
        done = subprocess.run(command, env=environment, cwd=ROOT, timeout=timeout_s, stdout=sys.stderr)
        ended = f"the process ended with status {done.returncode}"
    except subprocess.TimeoutExpired:
        ended = f"the process was stopped after {timeout_s:.0f} s"
    lines = out.read_text().splitlines() if out.exists() else []
    found = {answer.pop("name"): answer for answer in map(json.loads, lines)}
    return {layout.name: found.get(layout.name, {"error": ended}) for layout in layouts}


def _paths() -> str:
    return os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
