"""What "auto" picks, and the course of the learning rate."""

from __future__ import annotations

import math

import pytest

from modeseek_ray.config import Training
from modeseek_ray.data.auto import base_learning_rate, learning_rate_at, resolve_training
from modeseek_ray.data.cursor import steps_per_epoch


def resolve(num_rows=1000, num_parameters=10**9, has_lora=False, largest_group=1, **training):
    return resolve_training(
        Training.model_validate(training),
        num_rows=num_rows,
        num_parameters=num_parameters,
        has_lora=has_lora,
        largest_group=largest_group,
    )


@pytest.mark.parametrize(
    ("num_rows", "epochs"),
    [
        (1, 25),
        (4, 25),
        (10, 10),
        (30, 4),
        (34, 3),
        (1000, 3),
        (8333, 3),
        (10_000, 2),
        (20_000, 1),
        (10**7, 1),
    ],
)
def test_epochs_follow_the_number_of_rows(num_rows, epochs):
    assert resolve(num_rows)[0].epochs == epochs


@pytest.mark.parametrize(
    ("num_rows", "batch_size"), [(1, 1), (10, 10), (1000, 16), (8000, 16), (20_000, 40), (10**6, 256)]
)
def test_batches_are_a_five_hundredth_of_the_rows_between_16_and_256(num_rows, batch_size):
    assert resolve(num_rows)[0].batch_size == batch_size


def test_a_batch_holds_the_largest_group_and_its_replay():
    assert resolve(1000, largest_group=24)[0].batch_size == 24
    assert resolve(1000, largest_group=24, replay_share=0.5)[0].batch_size == 48


@pytest.mark.parametrize(
    ("num_parameters", "rate"),
    [(2_000_000, 1e-3), (12e6, 1e-3), (125e6, 2e-4), (0.6e9, 5e-5), (1.7e9, 2e-5), (8e9, 1e-5), (70e9, 5e-6)],
)
def test_the_table_of_base_learning_rates(num_parameters, rate):
    assert base_learning_rate(int(num_parameters), has_lora=False) == rate
    assert base_learning_rate(int(num_parameters), has_lora=True) == pytest.approx(10 * rate)


def test_the_multiplier_multiplies_the_base():
    resolved, messages = resolve(num_parameters=8 * 10**9, learning_rate_multiplier=2.0, has_lora=True)
    assert resolved.learning_rate == pytest.approx(2e-4)
    assert "learning_rate: 0.0002 = base 0.0001 for a LoRA adapter on 8 billion parameters" in " ".join(
        messages
    )


def test_a_given_learning_rate_is_taken_as_it_is():
    resolved, messages = resolve(learning_rate=3e-5, learning_rate_multiplier=2.0)
    assert resolved.learning_rate == 3e-5
    assert "learning_rate_multiplier is not used" in " ".join(messages)


def test_steps_evaluations_and_checkpoints_are_spread_over_the_job():
    resolved, _ = resolve(1000, batch_size=10, epochs=2)
    assert (resolved.total_steps, resolved.evaluate_every, resolved.checkpoint_every) == (200, 20, 50)
    resolved, _ = resolve(1000, batch_size=10, epochs=2, max_steps=7, evaluate_every=5)
    assert (resolved.total_steps, resolved.evaluate_every, resolved.checkpoint_every) == (7, 5, 2)


def test_replay_makes_more_steps_as_the_cursor_counts_them():
    resolved, _ = resolve(1000, batch_size=20, epochs=3, replay_share=0.05)
    assert resolved.total_steps == 3 * steps_per_epoch(1000, 20, 0.05) == 3 * 53  # 19 new rows a step


def test_every_pick_is_said_and_nothing_else():
    _, messages = resolve()
    assert [m.split(":")[0] for m in messages] == [
        "epochs", "batch_size", "learning_rate", "evaluate_every", "checkpoint_every",
    ]  # fmt: skip
    given = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-4, "evaluate_every": 5, "checkpoint_every": 5}
    resolved, messages = resolve(**given)
    assert messages == [] and given.items() <= vars(resolved).items()


def rates(total=8, **training):
    resolved, _ = resolve(8, batch_size=1, epochs=1, learning_rate=0.8, **training)
    assert resolved.total_steps == total
    return [learning_rate_at(step, total, resolved) for step in range(total)]


def test_constant():
    assert rates() == [0.8] * 8


def test_linear_falls_to_its_last_eighth():
    assert rates(decay="linear") == pytest.approx([0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


def test_cosine_is_half_way_in_the_middle():
    course = rates(decay="cosine")
    assert course[0] == 0.8 and course[4] == pytest.approx(0.4)
    assert course[2] == pytest.approx(0.4 * (1 + math.sqrt(0.5)))
    assert course == sorted(course, reverse=True) and course[-1] > 0


def test_warm_up_rises_by_equal_steps_and_then_decays():
    course = rates(decay="linear", warmup_share=0.5)
    assert course == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.6, 0.4, 0.2])
    assert rates(warmup_share=1.0) == pytest.approx([0.1 * i for i in range(1, 9)])
