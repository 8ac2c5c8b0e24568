"""The plan of a job, on sizes a person can work out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modeseek_ray.config import JobConfig, Lora, Resources, parse_config
from modeseek_ray.data.problems import Problems
from modeseek_ray.data.report import DataReport, FileReport
from modeseek_ray.jobs import memory
from modeseek_ray.jobs.models import ModelInfo
from modeseek_ray.jobs.plan import Plan, Processes, plan


def model(**changes: Any) -> ModelInfo:
    """A million parameters: 10 layers of width 100, vocabulary 1,000."""
    fields = {
        "path": Path("/models/small"),
        "architecture": "Qwen3ForCausalLM",
        "num_parameters": 1_000_000,
        "dtype_bytes": 4,
        "vocab_size": 1_000,
        "num_layers": 10,
        "hidden_size": 100,
        "max_length": 512,
        "num_experts": 0,
        "has_chat_template": True,
    }
    return ModelInfo(**(fields | changes))


def config(
    weighted: dict[str, Any] | None = None, resources: dict[str, Any] | None = None, **fields: Any
) -> JobConfig:
    method = {"type": "supervised"} if weighted is None else {"type": "weighted", "weighted": weighted}
    return parse_config(
        {
            "model": "playground/dense",
            "training_file": "a.jsonl",
            "method": method,
            "resources": resources or {},
            **fields,
        }
    )


def data(rows: int = 320, length: int = 20, trained: int = 8, retention_tokens: int = 0) -> DataReport:
    training = FileReport("a.jsonl", "training", Problems("a.jsonl"), rows=rows, samples=rows)
    training.tokens, training.trained_tokens, training.lengths = (
        rows * length,
        rows * trained,
        [length] * rows,
    )
    retention = FileReport("r.jsonl", "retention", Problems("r.jsonl"), trained_tokens=retention_tokens)
    return DataReport({"training": training, "retention": retention})


def trainer(found: Plan) -> Processes:
    return next(p for p in found.processes if p.role == "trainer")


def part(processes: Processes, name: str) -> int:
    return next(p.num_bytes for p in (*processes.host, *processes.device) if p.name == name)


@pytest.mark.parametrize(
    ("stage", "dtype", "parameters", "gradients", "optimizer"),
    [  # bytes per parameter x 1e6 parameters, over 2 ranks where sharded
        (0, "float32", 4_000_000, 4_000_000, 8_000_000),
        (1, "float32", 4_000_000, 4_000_000, 6_000_000),  # (8 moments + 4 master) / 2
        (2, "float32", 4_000_000, 2_000_000, 6_000_000),
        (3, "float32", 2_000_000 + 800_000, 2_000_000, 4_000_000),  # no second copy; two layers gathered
        (0, "bfloat16", 2_000_000, 4_000_000, 6_000_000),  # runs as stage 1
        (2, "bfloat16", 2_000_000, 2_000_000, 6_000_000),
        (3, "bfloat16", 1_000_000 + 400_000, 2_000_000, 6_000_000),
    ],
)
def test_zero_shards_what_its_stage_says(
    stage: int, dtype: str, parameters: int, gradients: int, optimizer: int
) -> None:
    resources = {"trainers": 2, "zero_stage": stage, "dtype": dtype}
    found = trainer(plan(config(resources=resources), model(), data()))
    assert part(found, "parameters") == parameters
    assert part(found, "gradients") == gradients
    assert part(found, "optimizer") == optimizer


def test_steps_tokens_and_ledger() -> None:
    weighted = {"training": {"epochs": 3, "batch_size": 32}}
    found = plan(config(weighted), model(), data(rows=320, trained=8))
    assert found.total_steps == 30
    assert found.tokens == 3 * 320 * 8
    assert next(p for p in found.disk if p.name == "weights ledger").num_bytes == 30 * 32 * 25


def test_max_steps_cuts_the_tokens() -> None:
    weighted = {"training": {"epochs": 3, "batch_size": 32, "max_steps": 5}}
    assert plan(config(weighted), model(), data(trained=8)).tokens == 5 * 32 * 8


def test_without_data_nothing_is_made_up() -> None:
    found = plan(config(), model())
    assert found.total_steps is None
    assert found.tokens is None
    assert part(trainer(found), "activations") == 29 * 10 * 100 * 4 * 8192  # a full micro-batch


def test_activations_of_one_micro_batch_and_of_a_kept_graph() -> None:
    """64 samples of 20 tokens on 2 ranks: 640 positions a rank, of which a micro-batch holds 100."""
    resources = {"trainers": 2, "micro_batch_tokens": 100}
    sft = plan(config({"training": {"batch_size": 64}}, resources), model(), data())
    assert part(trainer(sft), "activations") == 29 * 10 * 100 * 4 * 100
    near = {"preset": "mode_seeking", "training": {"batch_size": 64}}
    assert (
        part(trainer(plan(config(near, resources), model(), data())), "activations")
        == 29 * 10 * 100 * 4 * 640
    )
    again = config(near, resources | {"keep_graph": "never"})
    assert part(trainer(plan(again, model(), data())), "activations") == 29 * 10 * 100 * 4 * 100


def test_ranks_that_share_sequences_hold_a_part_of_each() -> None:
    """64 samples of 20 tokens on 4 ranks, two by two: 32 samples a group, 320 positions a rank, as without groups."""
    near = {"preset": "mode_seeking", "training": {"batch_size": 64}}
    resources = {"trainers": 4, "sequence_parallel": 2, "micro_batch_tokens": 8}
    kept = trainer(plan(config(near, resources), model(), data()))
    assert part(kept, "activations") == 29 * 10 * 100 * 4 * 320
    # A micro-batch's limit is on a rank's own positions.
    again = trainer(plan(config(near, resources | {"keep_graph": "never"}), model(), data()))
    assert part(again, "activations") == 29 * 10 * 100 * 4 * 8
    pair = {"trainers": 4, "sequence_parallel": 2, "micro_batch_size": 3}
    sft = trainer(plan(config({"training": {"batch_size": 64}}, pair), model(), data()))
    assert part(sft, "activations") == 29 * 10 * 100 * 4 * 3 * 10
    # What is kept of whole samples is kept by each rank of a group; optimizer states are dealt over all.
    probes = config(near, pair, retention_file="r.jsonl")
    found = trainer(plan(probes, model(), data(retention_tokens=1_000)))
    assert part(found, "start remembered") == 4 * 100 * (1_000 + 1_000 // 2)
    assert part(found, "optimizer") == 12 * 1_000_000 // 4


def test_gradient_checkpointing_keeps_a_width_per_layer_and_one_layer() -> None:
    resources = Resources(gradient_checkpointing=True)
    assert memory.activation_part(model(), resources, 1_000).num_bytes == (10 + 29) * 100 * 4 * 1_000


def test_lora_trains_and_stores_only_adapters() -> None:
    """Rank 4 on four projections of ten layers: 8 x 100 x 4 x 10 = 32,000 parameters."""
    weighted = {"training": {"lora": {"rank": 4}}}
    found = plan(config(weighted), model(), data())
    assert found.num_trainable == 32_000
    assert part(trainer(found), "gradients") == 4 * 32_000
    assert part(trainer(found), "parameters") == 4_000_000


def test_lora_on_experts() -> None:
    """4 experts of 3 matrices 100 x 50 in each of 10 layers: 600,000; f = 50; 3 x 150 x 2 x 40 on top."""
    moe = model(num_parameters=600_000 + 1_000 * 100 + 4 * 100 * 100 * 10, num_experts=4)
    assert (
        memory.trainable_parameters(moe, Lora(rank=2, target_experts=True))
        == 8 * 100 * 2 * 10 + 3 * 150 * 2 * 40
    )


def test_kl_needs_a_frozen_copy_unless_the_adapter_can_be_switched_off() -> None:
    kl = {"kl": {"direction": "forward", "coefficient": 0.05}}
    names = [p.name for p in trainer(plan(config(kl), model(), data())).host]
    assert "frozen start" in names
    with_lora = kl | {"training": {"lora": {"rank": 4}}}
    assert "frozen start" not in [p.name for p in trainer(plan(config(with_lora), model(), data())).host]


def test_retention_keeps_hidden_states_and_the_head() -> None:
    fields = {"retention_file": "r.jsonl"}
    found = trainer(plan(config(resources={"trainers": 2}, **fields), model(), data(retention_tokens=500)))
    assert part(found, "start remembered") == 4 * 100 * (1_000 + 250)


def test_the_start_is_kept_to_measure_the_distance_from_it_unless_adapters_can_be_switched_off() -> None:
    found = trainer(plan(config(resources={"trainers": 2}), model(), data()))
    assert part(found, "start weights") == 4 * 1_000_000 // 2
    with_lora = trainer(plan(config({"training": {"lora": {"rank": 4}}}), model(), data()))
    assert "start weights" not in [p.name for p in with_lora.host]


def test_first_order_ratios_to_the_start_need_a_frozen_copy() -> None:
    f = {"scheme": "ratio_power", "gamma": 0.3, "length_exponent": 0, "approximation": "first_order"}
    for of, needed in (("policy_over_initial", True), ("policy_over_data", False)):
        found = trainer(plan(config({"likelihood": {**f, "of": of}}), model(), data()))
        assert ("frozen start" in [p.name for p in found.host]) == needed


def test_scorers_run_before_the_trainers_and_only_where_the_weighting_looks_at_the_start() -> None:
    resources = {"scorers": 3, "trainers": 2, "cpus_per_worker": 2.0}
    sft = plan(config(resources=resources), model(), data())
    assert [p.role for p in sft.processes] == ["driver", "trainer"]
    assert sft.cpus == 4.0
    weighted = plan(config({"preset": "mode_seeking"}, resources), model(), data())
    assert [p.role for p in weighted.processes] == ["driver", "scorer", "trainer"]
    assert weighted.cpus == 6.0  # three scorers, then two trainers: never both


def test_on_gpus_the_model_is_on_the_device_and_an_offloaded_optimizer_is_not() -> None:
    resources = {"gpus_per_worker": 1.0, "offload_optimizer": True, "dtype": "bfloat16"}
    found = trainer(plan(config(resources=resources), model(), data()))
    assert [p.name for p in found.host] == ["process", "start weights", "optimizer"]
    assert "parameters" in [p.name for p in found.device]
    assert plan(config(resources=resources), model(), data()).gpus == 1.0


def test_disk_holds_the_checkpoints_kept_and_the_one_being_written() -> None:
    """3 x (4 + 12) bytes and an export of 4 bytes, for a million parameters, ZeRO-2 in float32."""
    found = plan(config(), model())
    assert found.disk_bytes == 3 * 16_000_000 + 4_000_000


def test_the_dict_is_json_with_sums() -> None:
    found = plan(config({"preset": "mode_seeking"}), model(), data())
    shown = json.loads(json.dumps(found.to_dict()))
    assert shown["total_steps"] == found.total_steps
    assert shown["processes"][1]["host_bytes"] == found.processes[1].host_bytes
    assert shown["disk_bytes"] == sum(p["num_bytes"] for p in shown["disk"])


def test_logits_are_held_in_chunks_of_at_most_64_mib() -> None:
    """Three times the logits (values, softmax, gradient) and the head's gradient, 4 x 1,000 x 100 bytes."""
    few = memory.head_part(model(), Resources(), positions=10)
    assert few.num_bytes == 3 * 4 * 1_000 * 10 + 400_000
    many = memory.head_part(model(vocab_size=128_000), Resources(dtype="bfloat16"), positions=8_192)
    assert many.num_bytes == 3 * 64 * 2**20 + 2 * 4 * 128_000 * 100


def kept_logits(found: Plan) -> int:
    """Bytes of a trainer's; 0 where the plan has no such part."""
    parts = (*trainer(found).host, *trainer(found).device)
    return sum(p.num_bytes for p in parts if p.name == "kept logits")


def test_logits_wait_for_the_backward_pass_where_it_cannot_be_known_before() -> None:
    """Four bytes of each of 1,000 tokens: of a batch that is scored first, of one micro-batch under a token factor."""
    assert kept_logits(plan(config({"preset": "sft"}), model(), data())) == 0
    by_token = plan(config({"preset": "dft"}), model(), data())
    by_policy = plan(config({"preset": "mode_seeking"}), model(), data())
    assert 0 < kept_logits(by_token) <= kept_logits(by_policy)
    assert kept_logits(by_policy) % 4_000 == 0
    wide = plan(config({"preset": "mode_seeking"}), model(vocab_size=10_000_000), data())
    assert kept_logits(wide) == 256 * 2**20
    resources = {"gpus_per_worker": 1}
    assert kept_logits(plan(config({"preset": "dft"}, resources=resources), model(), data())) == 0
    shared = {"trainers": 2, "sequence_parallel": 2}
    assert kept_logits(plan(config({"preset": "sft"}, resources=shared), model(), data())) > 0


def online_config(**online: Any) -> JobConfig:
    """Eight samples a round, graded by their text; two trainers."""
    grader = {
        "type": "string_check",
        "input": "{{ sample.output_text }}",
        "reference": "a",
        "operation": "eq",
    }
    rollout = {"samples_per_prompt": 4, "prompts_per_round": 2, "max_tokens": 12}
    section = {"preset": "grpo", "grader": grader, "rollout": rollout, **online}
    return parse_config(
        {
            "model": "playground/moe",
            "training_file": "a.jsonl",
            "method": {"type": "online", "online": section},
            "resources": {"trainers": 2},
        }
    )


def test_logits_wait_where_clips_and_mismatch_factors_look_at_the_step_s_own_log_probabilities() -> None:
    """An on-policy step has neither: nothing is clipped before the second one on the same samples."""
    assert kept_logits(plan(online_config(), model(), data())) == 0
    clipped = online_config(training={"inner_steps": 2})
    corrected = online_config(mismatch={"scheme": "tis"})
    assert kept_logits(plan(clipped, model(), data())) > 0
    assert kept_logits(plan(corrected, model(), data())) > 0


def test_routes_that_are_replayed_are_carried_by_the_trainers() -> None:
    """Two experts a token in ten layers, a byte each: 8 samples of 20 + 12 positions over two ranks."""
    moe = model(num_experts=8, experts_per_token=2, num_expert_parameters=500_000)
    job = online_config(routing_replay="R3")
    assert part(trainer(plan(job, moe, data())), "routes") == 10 * 2 * 8 * 32 // 2
