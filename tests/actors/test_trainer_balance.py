"""The load-balancing loss in the trainer's steps, against plain PyTorch over transformers; and experts' load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.commands.preflight import refuse_replay_without_experts
from modeseek_ray.config import Lora, Training, parse_config
from modeseek_ray.data.batching import deal, pack
from modeseek_ray.errors import ConfigError, ModelError
from modeseek_ray.jobs.models import ModelInfo
from modeseek_ray.objectives.collate import collate
from modeseek_ray.routing.compare import router_load
from modeseek_ray.types import IntArray, Objective, Sample
from tests.actors import ranks as inside
from tests.actors.ranks import Start, relative_difference
from tests.actors.test_trainer_ratios import VALUES, run

COEFFICIENT = 0.5
BALANCED = Objective(router_aux_loss_coef=COEFFICIENT)
EVERYTHING = [np.arange(8)]
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one-pass": (1, {"micro_batch_size": 8}),
    "kept": (1, {}),
    "recomputed": (1, {"gradient_checkpointing": True, "keep_graph": "never"}),
    "zero-3-recomputed": (2, {"zero_stage": 3, "gradient_checkpointing": True}),
}


def cuts_of(samples: Sequence[Sample], world_size: int, micro_batch_size: int) -> list[IntArray]:
    """The micro-batches of all ranks, as positions among the samples."""
    length_N = np.array([s.length for s in samples])
    return [
        share[index_B]
        for share in deal(length_N, world_size)
        for index_B in pack(length_N[share], 8192, micro_batch_size)
    ]


def expected(
    path: Path, samples: Sequence[Sample], cuts: Sequence[IntArray]
) -> tuple[dict[str, np.ndarray], float]:
    """Gradients and load-balancing loss by transformers alone, micro-batches weighted by their tokens."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
    num_trained, num_tokens = sum(s.num_tokens for s in samples), sum(s.length for s in samples)
    balance = 0.0
    for index_B in cuts:
        batch = collate(samples, index_B, pad_id=0)
        output = model(
            input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS, output_router_logits=True
        )
        log_prob = output.logits.double().log_softmax(-1).flatten(0, 1)[batch.positions_M]
        values_M = torch.from_numpy(VALUES[index_B])[batch.sample_M]
        nll = -(values_M * log_prob.gather(1, batch.target_M[:, None])[:, 0]).sum() / num_trained
        share = sum(samples[i].length for i in index_B) / num_tokens
        (nll + COEFFICIENT * share * output.aux_loss).backward()
        balance += share * output.aux_loss.item()
    return {n: p.grad.double().numpy() for n, p in model.named_parameters() if p.grad is not None}, balance


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_s_gradient_is_that_of_transformers_own_loss(
    start: Start, samples: list[Sample], tiny_moe: Path, layout: str
) -> None:
    world_size, options = LAYOUTS[layout]
    cuts = cuts_of(samples, world_size, options.get("micro_batch_size", 2))
    gradients, balance = expected(tiny_moe, samples, cuts)
    trainer = start(model=tiny_moe, objective=BALANCED, world_size=world_size, **options)
    trainer.inside(inside.capture_gradients)
    [report] = run(trainer, samples, EVERYTHING, rate=1e-3).reports
    found = trainer.inside(inside.captured_gradients)[0]
    assert relative_difference({n: found[n] for n in gradients}, gradients) < 1e-5
    assert report.figures["routes/balancing_loss"] == pytest.approx(balance, rel=1e-5)
    router = next(name for name in found if name.endswith("mlp.gate.weight"))
    off = relative_difference({router: found[router]}, {router: gradients[router]})
    assert off < 1e-4 and np.abs(found[router]).max() > 1e-4


def test_adapters_learn_to_balance_frozen_routers(
    start: Start, samples: list[Sample], tiny_moe: Path
) -> None:
    training = Training(lora=Lora(rank=4))
    found = []
    for objective in (Objective(), BALANCED):
        trainer = start(model=tiny_moe, objective=objective, training=training, gradient_checkpointing=True)
        trainer.inside(inside.capture_gradients)
        [report] = run(trainer, samples, EVERYTHING).reports
        found.append(trainer.inside(inside.captured_gradients)[0])
    assert all("lora_" in name for name in found[1]) and report.figures["routes/balancing_loss"] >= 2
    assert relative_difference(found[1], found[0]) > 1e-4


def test_experts_load_is_told_of_every_step(start: Start, samples: list[Sample], tiny_moe: Path) -> None:
    """Of the routers' own choice over the whole batch, also where other experts are replayed."""
    live = start(model=tiny_moe).inside(inside.live_routes, samples)[0]
    load = router_load(np.concatenate(live), 4)
    missing = {  # the last token of a sample has no route on the wire; it asks experts all the same
        "routes/load_variation": float(load.variation_L.mean()),
        "routes/dead_experts": float(load.num_dead_L.sum()),
    }
    for world_size, objective in ((1, Objective()), (2, Objective(routing_replay="R2"))):
        trainer = start(model=tiny_moe, world_size=world_size, objective=objective)
        [report] = run(trainer, samples, EVERYTHING).reports
        assert report.figures["routes/load_variation"] == pytest.approx(
            missing["routes/load_variation"], abs=0.1
        )
        assert report.figures["routes/dead_experts"] == missing["routes/dead_experts"]
        assert "routes/balancing_loss" not in report.figures
    trainer = start()
    assert "routes/load_variation" not in run(trainer, samples, EVERYTHING).reports[0].figures


def test_refused_for_a_dense_model(start: Start, tiny_dense: Path) -> None:
    with pytest.raises(ModelError, match="no experts to balance"):
        start(objective=BALANCED)
    training = {"router_aux_loss_coef": 0.01}
    method = {"type": "supervised", "supervised": {"training": training}}
    config = parse_config({"model": str(tiny_dense), "training_file": "-", "method": method})
    with pytest.raises(ConfigError, match="no load to balance") as refused:
        refuse_replay_without_experts(config, ModelInfo.read(tiny_dense))
    assert refused.value.param == "method.supervised.training.router_aux_loss_coef"
