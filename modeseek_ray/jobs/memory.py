"""How much memory one process of a job takes, part by part, each with the formula it comes from.

    P  parameters      A  trainable parameters (all, or the adapters')      R  trainer ranks
    L  layers          h  width        V  vocabulary        b  bytes per value: 4 in float32, 2 in bfloat16

Shards are those of ZeRO (Rajbhandari et al. 2020, 1910.02054); that the master copy exists in float32
too under stages 1 and 2 is what DeepSpeed 0.19 does. Everything is decimal bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from modeseek_ray.config import Lora, Resources
from modeseek_ray.jobs.models import ModelInfo

BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's default communication bucket
# Of float32 logits: computed at a time, and waiting for their backward pass on a CPU, at most (objectives/head.py).
HEAD_CHUNK_BYTES, HEAD_CHUNK_BYTES_ON_GPU = 64 * 2**20, 512 * 2**20
KEPT_LOGITS_BYTES = 256 * 2**20
# Values kept per position and layer for the backward pass, in widths: measured with saved-tensor
# hooks on Qwen3 (12.6 + 4 * MLP width / h, here MLP width = 4 h) and Qwen3-MoE (33 to 38 at k * f = 4 h).
ACTIVATION_WIDTHS_DENSE, ACTIVATION_WIDTHS_MOE = 29, 38
# A process with torch, DeepSpeed and its libraries loaded, before any model.
TRAINER_BASE_BYTES, SCORER_BASE_BYTES, DRIVER_BASE_BYTES = 650_000_000, 500_000_000, 350_000_000
GENERATOR_BASE_BYTES = 1_900_000_000  # the same with vLLM, seen on the CPU

SYMBOLS = "P parameters, A trainable parameters, R trainer ranks, L layers, h width, V vocabulary, b bytes per value"
ASSUMPTIONS = (
    "Adam keeps two float32 moments per trainable parameter.",
    f"Activations: {ACTIVATION_WIDTHS_DENSE} widths per position and layer in a dense model,"
    f" {ACTIVATION_WIDTHS_MOE} in a mixture of experts; with gradient checkpointing one width per layer and"
    " one layer in full. Attention does not hold its [positions, positions] scores.",
    "Logits are computed 64 MiB at a time (512 MiB on a GPU), forward and backward. A CPU keeps up to 256 MiB of"
    " them for the backward pass where a token's gradient depends on its own log-probability.",
    "Ranks that share sequences hold equal parts of them; the head's work lies where the trained tokens do.",
    "Micro-batches are full. Allocator fragmentation is not counted: leave a tenth free.",
)


@dataclass(frozen=True)
class Part:
    """One share of a process's memory, or of the disk."""

    name: str
    num_bytes: int
    formula: str


def value_bytes(resources: Resources) -> int:
    return 2 if resources.dtype == "bfloat16" else 4


def generator_bytes(resources: Resources) -> int:
    """Bytes per value in the engines that write samples."""
    dtype = resources.dtype if resources.generator_dtype == "auto" else resources.generator_dtype
    return 2 if dtype == "bfloat16" else 4


def effective_stage(resources: Resources) -> int:
    """The stage that runs: in bfloat16 stage 0 is run as 1 (actors/engine.py)."""
    return max(1, resources.zero_stage) if resources.dtype == "bfloat16" else resources.zero_stage


def trainable_parameters(model: ModelInfo, lora: Lora | None) -> int:
    """All, or those of the adapters.

    Attention adapters sit on four projections taken as h x h: 8 h r L. Experts hold what neither
    attention (4 h^2 L) nor the embedding (V h) does; an adapter pair on the three matrices h x f of each
    of E experts is 3 (h + f) r E L, with f from that remainder.
    """
    if lora is None:
        return model.num_parameters
    h, layers, rank = model.hidden_size, model.num_layers, lora.rank
    count = 8 * h * rank * layers
    if lora.target_experts and model.num_experts:
        in_experts = max(0, model.num_parameters - model.vocab_size * h - 4 * h * h * layers)
        width = in_experts // max(1, 3 * h * model.num_experts * layers)
        count += 3 * (h + width) * rank * model.num_experts * layers
    return count


def weights_part(model: ModelInfo, resources: Resources, ranks: int = 1) -> Part:
    """Parameters as they are computed with: whole, or with ZeRO-3 a shard and two gathered layers."""
    b, total = value_bytes(resources), model.num_parameters
    if effective_stage(resources) < 3 or ranks == 1:
        return Part("parameters", b * total, f"{b} P")
    layer = total // max(1, model.num_layers)
    return Part("parameters", b * (total // ranks + 2 * layer), f"{b} P / R + two layers")


def gradient_part(trainable: int, resources: Resources, ranks: int) -> Part:
    """Float32, whole up to stage 1, sharded from stage 2."""
    if effective_stage(resources) < 2:
        return Part("gradients", 4 * trainable, "4 A")
    return Part("gradients", 4 * trainable // ranks, "4 A / R")


def optimizer_part(trainable: int, resources: Resources, ranks: int) -> Part:
    """Two moments, and the float32 master copy where DeepSpeed keeps one."""
    stage = effective_stage(resources)
    if stage == 0:
        return Part("optimizer", 8 * trainable, "8 A")
    has_master = stage < 3 or resources.dtype == "bfloat16"
    per_parameter = 12 if has_master else 8
    return Part("optimizer", per_parameter * trainable // ranks, f"{per_parameter} A / R")


def bucket_part(trainable: int, resources: Resources) -> Part | None:
    """Communication buckets of the sharded stages: two on a GPU, where they overlap, else one."""
    if effective_stage(resources) == 0:
        return None
    count = 2 if resources.gpus_per_worker else 1
    size = count * value_bytes(resources) * min(trainable, BUCKET_ELEMENTS)
    return Part("communication", size, f"b x at most 5e8 values, {count} at a time")


def activation_part(model: ModelInfo, resources: Resources, positions: int) -> Part:
    """What the backward pass needs of `positions` positions."""
    widths = ACTIVATION_WIDTHS_MOE if model.is_moe else ACTIVATION_WIDTHS_DENSE
    per_position = widths * model.num_layers
    formula = f"{widths} L h b x {positions:,} positions"
    if resources.gradient_checkpointing:
        per_position = model.num_layers + widths
        formula = f"(L + {widths}) h b x {positions:,} positions"
    num_bytes = per_position * model.hidden_size * value_bytes(resources) * positions
    return Part("activations", num_bytes, formula)


def head_part(model: ModelInfo, resources: Resources, positions: int) -> Part:
    """Chunked logits and their gradients, the head's gradient, and on a CPU its float32 copy in bfloat16."""
    copies = 2 if value_bytes(resources) == 2 and not resources.gpus_per_worker else 1
    logits, formula = logit_bytes(model, resources, positions), _logits_formula(resources)
    num_bytes = 3 * logits + copies * 4 * model.vocab_size * model.hidden_size
    return Part("head", num_bytes, f"3 x min({formula}, 4 V x {positions:,} positions) + {4 * copies} V h")


def kept_logits_part(model: ModelInfo, positions: int) -> Part:
    """Logits that forward passes on a CPU leave to their backward passes, at most."""
    num_bytes = min(KEPT_LOGITS_BYTES, 4 * model.vocab_size * positions)
    return Part("kept logits", num_bytes, f"min(256 MiB, 4 V x {positions:,} positions)")


def logits_part(model: ModelInfo, resources: Resources, positions: int) -> Part:
    """What a pass without gradient holds of them."""
    formula = f"at most {_logits_formula(resources)} of logits"
    return Part("head", logit_bytes(model, resources, positions), formula)


def logit_bytes(model: ModelInfo, resources: Resources, positions: int) -> int:
    """Float32 logits held at a time."""
    most = HEAD_CHUNK_BYTES_ON_GPU if resources.gpus_per_worker else HEAD_CHUNK_BYTES
    return min(most, 4 * model.vocab_size * positions)


def _logits_formula(resources: Resources) -> str:
    return "512 MiB" if resources.gpus_per_worker else "64 MiB"


def routes_part(model: ModelInfo, resources: Resources, positions: int) -> Part:
    """Expert ids of a round's samples, carried from the engines: uint8 up to 256 experts, else uint16."""
    width = 1 if model.num_experts <= 256 else 2
    num_bytes = width * model.num_layers * model.experts_per_token * positions // resources.trainer_groups
    formula = f"{width} L k x {positions:,} positions / {_groups(resources)}, k experts per token"
    return Part("routes", num_bytes, formula)


def remembered_part(model: ModelInfo, resources: Resources, probe_tokens: int) -> Part:
    """For exact KL on the held-out files: pi_0's hidden states, dealt over the ranks, and its head."""
    b, h = value_bytes(resources), model.hidden_size
    num_bytes = b * h * (model.vocab_size + probe_tokens // resources.trainer_groups)
    return Part("start remembered", num_bytes, f"{b} h (V + {probe_tokens:,} / {_groups(resources)})")


def _groups(resources: Resources) -> str:
    """What samples are dealt over: ranks, or groups of those that share sequences and keep them whole."""
    return "R" if resources.sequence_parallel == 1 else f"(R / {resources.sequence_parallel})"


def start_weights_part(model: ModelInfo, resources: Resources, ranks: int) -> Part:
    """For the distance from the start, without LoRA: theta_0, dealt over the ranks."""
    b = value_bytes(resources)
    return Part("start weights", b * model.num_parameters // ranks, f"{b} P / R")
