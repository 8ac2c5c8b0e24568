"""What a trainer leaves behind: checkpoints that resume to the bit, and evaluations that mean what they say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from modeseek_ray.config import Lora, Training
from modeseek_ray.errors import ConfigError, StorageError
from modeseek_ray.types import Sample
from tests.actors import ranks as inside
from tests.actors.ranks import Start, plan_for


class TestResume:
    @pytest.mark.parametrize(
        ("zero_stage", "dtype", "lora", "world_size"),
        [
            (0, "float32", None, 1),
            (1, "float32", None, 2),
            (2, "float32", None, 2),
            (3, "float32", None, 2),
            (1, "bfloat16", None, 2),
            (2, "bfloat16", None, 2),
            (3, "bfloat16", None, 2),
            (2, "float32", Lora(rank=4), 2),
            (3, "float32", Lora(rank=4), 2),
        ],
    )
    def test_continues_to_the_bit(
        self,
        start: Start,
        samples: list[Sample],
        tmp_path: Path,
        zero_stage: int,
        dtype: str,
        lora: Lora | None,
        world_size: int,
    ) -> None:
        layout = {
            "zero_stage": zero_stage,
            "dtype": dtype,
            "training": Training(lora=lora),
            "world_size": world_size,
        }
        trainer = start(**layout)
        for i in range(2):
            trainer.step(samples, plan_for(samples, step=i))
        trainer.inside(inside.draws)
        trainer.each("save", str(tmp_path))
        expected = [trainer.loss(samples, plan_for(samples, step=i)) for i in range(2, 4)]
        expected_draws, expected_sha256 = trainer.inside(inside.draws), trainer.sha256()
        trainer = start(**layout)
        trainer.loss(samples, plan_for(samples))  # whatever happened in the meantime is undone
        trainer = start(**layout)
        trainer.each("load", str(tmp_path))
        assert [trainer.loss(samples, plan_for(samples, step=i)) for i in range(2, 4)] == expected
        assert trainer.inside(inside.draws) == expected_draws
        assert trainer.sha256() == expected_sha256

    def test_another_layout_is_refused(self, start: Start, samples: list[Sample], tmp_path: Path) -> None:
        start(zero_stage=2).each("save", str(tmp_path))
        with pytest.raises(StorageError, match="'zero_stage': 1"):
            start(zero_stage=1).each("load", str(tmp_path))

    @pytest.mark.parametrize(
        ("zero_stage", "dtype", "before", "now"),
        [(1, "float32", 2, 1), (2, "float32", 1, 2), (0, "float32", 2, 1), (2, "bfloat16", 2, 1)],
    )
    def test_another_number_of_ranks_goes_on_with_the_same_weights_and_moments(
        self,
        start: Start,
        samples: list[Sample],
        tmp_path: Path,
        zero_stage: int,
        dtype: str,
        before: int,
        now: int,
    ) -> None:
        """Restarted moments would move AdamW's next steps by as much as the steps themselves."""
        trainer = start(zero_stage=zero_stage, dtype=dtype, world_size=before)
        for i in range(2):
            trainer.step(samples, plan_for(samples, step=i))
        trainer.each("save", str(tmp_path))
        saved = trainer.sha256()
        expected = [trainer.loss(samples, plan_for(samples, step=i)) for i in range(2, 5)]
        trainer = start(zero_stage=zero_stage, dtype=dtype, world_size=now)
        [note, *_] = trainer.each("load", str(tmp_path))
        assert note.startswith(f"Resumed inexactly: {before} ranks -> {now}.")
        assert trainer.sha256() == saved
        losses = [trainer.loss(samples, plan_for(samples, step=i)) for i in range(2, 5)]
        assert losses == pytest.approx(expected, rel=1e-5 if dtype == "float32" else 1e-3)
        assert abs(expected[-1] - expected[0]) > 1e-3 * abs(expected[0])

    @pytest.mark.parametrize(("zero_stage", "dtype"), [(3, "float32"), (1, "bfloat16")])
    def test_another_number_of_ranks_is_refused_where_parts_do_not_join(
        self, start: Start, tmp_path: Path, zero_stage: int, dtype: str
    ) -> None:
        start(zero_stage=zero_stage, dtype=dtype, world_size=2).each("save", str(tmp_path))
        with pytest.raises(StorageError, match="below ZeRO-3"):
            start(zero_stage=zero_stage, dtype=dtype, world_size=1).each("load", str(tmp_path))

    def test_code_in_a_checkpoint_is_not_run(self, start: Start, tmp_path: Path) -> None:
        trainer = start(zero_stage=2)
        trainer.each("save", str(tmp_path))
        witness = tmp_path / "witness"
        for shard in (tmp_path / "zero").glob("*.pt"):
            torch.save({"module": Trap(witness)}, shard)
        with pytest.raises(Exception, match="(?i)weights.only|unsupported"):
            trainer.each("load", str(tmp_path))
        assert not witness.exists()


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self._path), "w")


class TestEvaluate:
    def test_all_correct_is_what_greedy_decoding_writes(
        self, start: Start, samples: list[Sample], tiny_moe: Path
    ) -> None:
        """Half of the answers are greedy decoding's own, the other half differ in their last token."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32).eval()
        rows = []
        for i, sample in enumerate(samples):
            prompt_T = sample.token_ids_T[:4].astype(np.int64)
            written = model.generate(
                torch.from_numpy(prompt_T)[None],
                max_new_tokens=6,
                do_sample=False,
                eos_token_id=-1,
                pad_token_id=0,
            )[0].numpy()
            if i % 2:
                written[-1] = (written[-1] + 1) % 200
            trained_T = np.arange(len(written)) >= 4
            rows.append(Sample(row=i, token_ids_T=written.astype(np.int32), trained_T=trained_T, problem=i))
        trainer = start(model=tiny_moe, world_size=2)
        for share, part in trainer.per_sample("evaluate", rows, False):
            np.testing.assert_array_equal(part.all_correct_N, share % 2 == 0)
            np.testing.assert_array_equal(part.num_correct_N, 6 - share % 2)
            np.testing.assert_array_equal(part.problem_N, share)

    def test_loss_is_minus_the_score(self, start: Start, samples: list[Sample]) -> None:
        trainer = start(world_size=2)
        log_prob_N = trainer.score(samples)
        for share, part in trainer.per_sample("evaluate", samples, False):
            np.testing.assert_allclose(part.nll_N, -log_prob_N[share], rtol=1e-6)
            assert part.kl_N is None

    @pytest.mark.parametrize("zero_stage", [2, 3])
    def test_kl_to_the_start_is_that_of_the_full_distributions(
        self, start: Start, samples: list[Sample], tiny_dense: Path, tmp_path: Path, zero_stage: int
    ) -> None:
        trainer = start(world_size=2, zero_stage=zero_stage)
        trainer.per_sample("remember_start", samples)
        for _, part in trainer.per_sample("evaluate", samples, True):
            np.testing.assert_allclose(part.kl_N, 0, atol=1e-6)
        for i in range(3):
            trainer.step(samples, plan_for(samples, step=i, rate=1e-2))
        trainer.each("export", str(tmp_path))
        expected_N = full_kl(tiny_dense, tmp_path, samples)
        assert expected_N.min() > 0.01
        for share, part in trainer.per_sample("evaluate", samples, True):
            np.testing.assert_allclose(part.kl_N, expected_N[share], rtol=1e-4)

    def test_kl_needs_the_start(self, start: Start, samples: list[Sample]) -> None:
        trainer = start()
        with pytest.raises(ConfigError, match="was not remembered"):
            trainer.per_sample("evaluate", samples, True)
        trainer.per_sample("remember_start", samples[:4])
        stranger = dataclasses.replace(samples[0], token_ids_T=samples[0].token_ids_T + 1, row=77)
        with pytest.raises(ConfigError, match="row 77"):
            trainer.per_sample("evaluate", [stranger], True)


def full_kl(start_path: Path, now_path: Path, samples: list[Sample]) -> np.ndarray:
    """KL(start || now) summed over trained positions, from whole logits in float64."""
    from transformers import AutoModelForCausalLM

    models = [
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval() for p in (start_path, now_path)
    ]
    sums = []
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids_T.astype(np.int64))[None]
        with torch.no_grad():
            first, second = (m(ids).logits[0].double().log_softmax(-1) for m in models)
        kl_T = (first.exp() * (first - second)).sum(-1)
        sums.append(float(kl_T[np.flatnonzero(sample.trained_T) - 1].sum()))
    return np.array(sums)
