"""The scale model, on sizes a person can work out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modeseek_ray.config import JobConfig, parse_config
from modeseek_ray.errors import ConfigError
from modeseek_ray.jobs.hardware import PUBLISHED, Hardware, hardware_of, this_cpu
from modeseek_ray.jobs.models import ModelInfo
from modeseek_ray.jobs.scale import Scale, scale

# Round figures: 1e12 operations/s reached, 1e9 bytes/s of everything, no overheads.
PLAIN = Hardware("plain", 1e12, 1e12, 1e12, 1e9, 1e9, 1e8, 1e9, 8, "made up", 1.0, 1.0, 1.0, 0.0, 0.0, 0.0)


def model(**changes: Any) -> ModelInfo:
    """A million parameters beside embedding and head of 1e5 each; 10 layers of width 100, 1,000 tokens."""
    fields = {
        "path": Path("/models/small"), "architecture": "Qwen3ForCausalLM", "num_parameters": 1_200_000,
        "dtype_bytes": 4, "vocab_size": 1_000, "num_layers": 10, "hidden_size": 100, "max_length": 512,
        "num_experts": 0, "has_chat_template": True, "kv_values": 2_000,
    }  # fmt: skip
    return ModelInfo(**(fields | changes))


def config(method: dict[str, Any] | None = None, **resources: Any) -> JobConfig:
    return parse_config(
        {
            "model": "playground/dense",
            "training_file": "a.jsonl",
            "method": method or {"type": "supervised", "supervised": {"training": {"batch_size": 4}}},
            "resources": resources,
        }
    )


def online(**rollout: Any) -> dict[str, Any]:
    asked = {"samples_per_prompt": 4, "prompts_per_round": 16, "max_tokens": 256, **rollout}
    grader = {
        "type": "string_check",
        "input": "{{ sample.output_text }}",
        "reference": "a",
        "operation": "eq",
    }
    return {"type": "online", "online": {"preset": "grpo", "grader": grader, "rollout": asked}}


def seconds(found: Scale) -> dict[str, float]:
    return {part.name: part.seconds for part in found.step}


def test_a_step_by_hand() -> None:
    """Four samples of 512 positions, half of them trained, on one rank."""
    found = seconds(scale(config(), model(), PLAIN))
    body = 2 * 1e6 * 2048
    attention = 2 * 512 * 100 * 10 * 2048
    head = 2 * 1e5 * 1024
    forward = (body + attention + head) / 1e12
    assert found["forward"] == pytest.approx(forward)
    assert found["backward"] == pytest.approx(2 * forward)
    assert found["optimizer"] == pytest.approx(32 * 1.2e6 / 1e9)
    assert "between ranks" not in found


def test_experts_that_are_not_asked_cost_no_time() -> None:
    """Six of eight experts idle: of 8e5 parameters in experts, 2e5 are multiplied with."""
    moe = model(num_experts=8, num_expert_parameters=800_000, experts_per_token=2)
    assert moe.num_active_parameters == 1_000_000 - 600_000
    assert model(tied_head=True, num_parameters=1_100_000).num_active_parameters == 1_000_000


def test_ranks_share_the_work_and_pay_for_what_they_tell_each_other() -> None:
    one, two = (scale(config(trainers=r), model(), PLAIN) for r in (1, 2))
    assert seconds(two)["forward"] == pytest.approx(seconds(one)["forward"] / 2)
    # ZeRO-2: 2 b A (R - 1) / R bytes.
    assert seconds(two)["between ranks"] == pytest.approx(2 * 4 * 1.2e6 / 2 / 1e9)
    # Sixteen ranks are on two nodes: the slower wire decides.
    many = seconds(scale(config(trainers=16), model(), PLAIN))
    assert many["between ranks"] == pytest.approx(2 * 4 * 1.2e6 * 15 / 16 / 1e8)
    # ZeRO-3 gathers parameters for each pass of each micro-batch: 2048 / 2 / 512 = 2 of them.
    three = seconds(scale(config(trainers=2, zero_stage=3, micro_batch_tokens=512), model(), PLAIN))
    assert three["between ranks"] == pytest.approx((1 + 2 * 2) * 4 * 1.2e6 / 2 / 1e9)


def test_what_deepspeed_and_adam_move_on_a_card() -> None:
    """Two micro-batches of 1,024 positions in bfloat16; none of it where gradients are float32 already."""
    card = {"gpus_per_worker": 1.0, "micro_batch_tokens": 1024}
    found = seconds(scale(config(**card, dtype="bfloat16"), model(), PLAIN))
    assert found["gradients"] == pytest.approx(2 * 40 * 1.2e6 / 1e9)
    assert found["optimizer"] == pytest.approx(90 * 1.2e6 / 1e9)
    assert "gradients" not in seconds(scale(config(**card), model(), PLAIN))


def test_ranks_that_share_sequences_exchange_heads() -> None:
    """Queries, answers, keys and values of all layers, half of each to the neighbour, forward and backward."""
    apart, shared = (scale(config(trainers=4, sequence_parallel=s), model(), PLAIN) for s in (1, 2))
    assert seconds(shared)["forward"] == pytest.approx(seconds(apart)["forward"])
    moved = 4 * (2 * 100 * 10 + 2_000) * 2048 / 4 / 2
    assert seconds(shared)["exchange heads"] == pytest.approx(2 * moved / 1e9)
    assert "exchange heads" not in seconds(apart)
    again = seconds(
        scale(config(trainers=4, sequence_parallel=2, gradient_checkpointing=True), model(), PLAIN)
    )
    assert again["exchange heads"] == pytest.approx(3 * moved / 1e9)


def test_what_recomputing_and_adapters_change() -> None:
    plain = seconds(scale(config(), model(), PLAIN))
    again = seconds(scale(config(gradient_checkpointing=True), model(), PLAIN))
    assert again["backward"] == pytest.approx(1.5 * plain["backward"])
    lora = {"type": "supervised", "supervised": {"training": {"batch_size": 4, "lora": {"rank": 2}}}}
    adapters = seconds(scale(config(lora), model(), PLAIN))
    assert adapters["backward"] == pytest.approx(plain["forward"])
    assert adapters["optimizer"] < plain["optimizer"] / 50


def test_a_weighting_that_looks_at_the_policy_pays_for_it_only_where_the_graph_is_not_kept() -> None:
    weighted = {
        "type": "weighted",
        "weighted": {
            "likelihood": {"scheme": "ratio_power", "of": "policy_over_initial", "gamma": 0.5},
            "training": {"batch_size": 4},
        },
    }
    kept = scale(config(weighted), model(), PLAIN)
    again = scale(config(weighted, keep_graph="never"), model(), PLAIN)
    assert "forward" not in seconds(kept)
    assert again.step_s - kept.step_s == pytest.approx(seconds(kept)["score policy"])


def test_writing_reads_the_weights_for_every_token() -> None:
    """64 samples at once, 256 tokens after prompts of 256: bandwidth decides."""
    found = scale(config(online(), gpus_per_worker=1.0), model(), PLAIN)
    read = 4 * (1e6 + 1e5 + 64 * 2_000 * 512 / 2)
    prefill = 2 * 1e6 * 64 * 256 / 1e12
    assert seconds(found)["generate"] == pytest.approx(256 * read / 1e9 + prefill)
    # A cache for half of them: twice as many waves of half the size.
    tight = replace(PLAIN, memory_bytes=(32 * 4 * 2_000 * 512 + 4 * 1.2e6 + 1000) / 0.9)
    found = scale(config(online(), gpus_per_worker=1.0), model(), tight)
    assert "2 waves of 32 samples" in next(p.formula for p in found.step if p.name == "generate")


def test_weights_that_stay_on_a_card_are_copied_three_times() -> None:
    shared = {"trainers": 2, "generators": 2, "gpus_per_worker": 0.5, "colocated": True}
    for stage, moved in ((2, 6), (3, 7)):  # ZeRO-3 gathers them first; the wire is as fast as memory here
        job = config(online(), weight_transfer="ipc", zero_stage=stage, **shared)
        assert seconds(scale(job, model(), PLAIN))["sync"] == pytest.approx(moved * 4 * 1.2e6 / 1e9)


def test_staleness_overlaps_writing_and_training() -> None:
    strict = scale(config(online(), gpus_per_worker=1.0), model(), PLAIN)
    ahead = scale(config(online(max_staleness=1), gpus_per_worker=1.0), model(), PLAIN)
    assert strict.step_s == pytest.approx(sum(seconds(strict).values()))
    longer = max(
        seconds(ahead)["generate"],
        sum(seconds(ahead).values()) - seconds(ahead)["generate"] - seconds(ahead)["sync"],
    )
    assert ahead.step_s == pytest.approx(longer + seconds(ahead)["sync"])
    assert ahead.step_s < strict.step_s


def test_the_best_division_of_gpus_balances_both_sides() -> None:
    job = config(online(max_staleness=1), gpus_per_worker=1.0)
    found = scale(job, model(), PLAIN, total_gpus=8)
    assert all(split.trainers + split.generators == 8 and split.fits for split in found.splits)
    assert [s.round_s for s in found.splits] == sorted(s.round_s for s in found.splits)
    pairs = job.model_copy(
        update={"resources": job.resources.model_copy(update={"trainers": 2, "sequence_parallel": 2})}
    )
    assert {s.trainers % 2 for s in scale(pairs, model(), PLAIN, total_gpus=8).splits} == {0}
    best = found.splits[0]
    for trainers in range(1, 8):  # no division is better
        other = scale(
            config(online(max_staleness=1), gpus_per_worker=1.0, trainers=trainers, generators=8 - trainers),
            model(),
            PLAIN,
        )
        assert other.step_s >= best.round_s * (1 - 1e-9)


def test_a_division_that_does_not_fit_comes_last_and_says_why() -> None:
    small = replace(PLAIN, memory_bytes=20e6)  # 4 P of weights fit; one rank's 4 + 4 + 12 P do not
    found = scale(
        config(online(max_tokens=8), gpus_per_worker=1.0, micro_batch_tokens=64), model(), small, total_gpus=4
    )
    assert not found.fits
    assert {s.why_not for s in found.splits if s.trainers == 1} == {"trainer out of memory"}


def test_a_published_figure_is_the_data_sheets() -> None:
    h100 = PUBLISHED["h100"]
    assert (h100.flops_bfloat16, h100.memory_bytes, h100.memory_bandwidth) == (989e12, 80e9, 3.35e12)
    with pytest.raises(ConfigError, match="no figures of 'tpu'"):
        hardware_of("tpu")


def test_a_seven_billion_model_takes_what_such_models_are_known_to_take() -> None:
    """LoRA on 8 x H100, recomputing: three passes, at .4 of 989 TFLOP/s, the head at .25 of it."""
    seven = model(
        num_parameters=7_600_000_000, vocab_size=152_064, hidden_size=3584, num_layers=28, max_length=4096,
        kv_values=2 * 28 * 4 * 128,
    )  # fmt: skip
    lora = {"type": "supervised", "supervised": {"training": {"batch_size": 128, "lora": {"rank": 32}}}}
    job = config(lora, trainers=8, dtype="bfloat16", gpus_per_worker=1.0, gradient_checkpointing=True)
    found = scale(job, seven, PUBLISHED["h100"])
    tokens = 128 * 4096 / 8
    body, head = 2 * 6.51e9 * tokens / (0.4 * 989e12), 2 * 152_064 * 3584 * tokens / 2 / (0.25 * 989e12)
    assert found.step_s == pytest.approx(
        3 * (body + head), rel=0.1
    )  # attention and launching make up the rest
    assert found.fits


def test_this_machine_is_measured_and_the_answer_is_json() -> None:
    here = this_cpu(1)
    assert here.flops_float32 > 1e8 and here.memory_bandwidth > 1e8
    shown = scale(config(), model(), here).to_dict()
    json.dumps(shown, allow_nan=False)
    assert any("measured here" in sentence for sentence in shown["assumptions"])
