"""`ScoringModel` against the model's own logits, for several architectures and wrappers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from modeseek_ray.errors import ModelError, NumericsError
from modeseek_ray.objectives.collate import Batch, collate
from modeseek_ray.objectives.logprobs import TokenScores
from modeseek_ray.objectives.loss import sum_by_sample
from modeseek_ray.objectives.model import Reference, ScoringModel
from modeseek_ray.types import Sample

VOCABULARY = 97
QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def build(architecture: str, **more: Any) -> PreTrainedModel:
    """A random two-layer model of width 32."""
    config = AutoConfig.for_model(
        architecture,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def make_samples(lengths: list[int] = [5, 12, 9], seed: int = 0) -> list[Sample]:  # noqa: B006
    rng = np.random.default_rng(seed)
    samples = []
    for row, length in enumerate(lengths):
        trained_T = rng.random(length) < 0.6
        trained_T[0], trained_T[-1] = False, True
        tokens_T = rng.integers(3, VOCABULARY, length).astype(np.int32)
        samples.append(Sample(row=row, token_ids_T=tokens_T, trained_T=trained_T))
    return samples


def score(model: ScoringModel, batch: Batch, **options: Any) -> TokenScores:
    scores: TokenScores = model(
        batch.input_ids_BS, batch.attention_mask_BS, batch.positions_M, batch.target_M, **options
    )
    return scores


def own_log_probs(model: Any, sample: Sample) -> torch.Tensor:
    """From the model's whole logits, one unpadded sequence, no help from the code under test."""
    ids_T = torch.from_numpy(sample.token_ids_T).long()
    log_prob_TV = model(input_ids=ids_T[None]).logits[0].float().log_softmax(-1)
    per_token_T = log_prob_TV[:-1].gather(1, ids_T[1:, None]).squeeze(1)
    return per_token_T[torch.from_numpy(sample.trained_T[1:])]


ARCHITECTURES = [
    ("qwen3", {}, 1.0),
    ("qwen3", {"tie_word_embeddings": True}, 1.0),
    ("qwen3_moe", QWEN_MOE, 1.0),
    ("gpt2", {}, 1.0),
    ("phi", {}, 1.0),  # a head with a bias
    ("granite", {"logits_scaling": 8.0}, 1 / 8),
    ("cohere", {"logit_scale": 0.0625}, 1 / 16),
]


@pytest.mark.parametrize(("architecture", "options", "scale"), ARCHITECTURES)
def test_scores_are_those_of_the_models_own_logits(
    architecture: str, options: dict[str, Any], scale: float
) -> None:
    model, samples = build(architecture, **options), make_samples()
    with torch.no_grad():
        expected_M = torch.cat([own_log_probs(model, s) for s in samples])
        scoring = ScoringModel(model)
        found_M = score(scoring, collate(samples, range(3), pad_id=0)).log_prob_M
    assert scoring.scale == pytest.approx(scale, rel=1e-6)
    torch.testing.assert_close(found_M, expected_M, rtol=0, atol=2e-6)


def test_the_model_still_gives_logits_and_keeps_its_names() -> None:
    model = build("qwen3", tie_word_embeddings=True)
    names, ids_BS = list(model.state_dict()), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = model(input_ids=ids_BS).logits
        ScoringModel(model)
        assert torch.equal(model(input_ids=ids_BS).logits, before)
    assert list(model.state_dict()) == names
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_soft_capped_logits_are_refused_with_both_numbers() -> None:
    model = build("gemma2", final_logit_softcapping=30.0)
    with pytest.raises(NumericsError, match=r"Gemma2ForCausalLM cannot be scored.* in the model's own pass"):
        ScoringModel(model)


def test_a_model_without_a_language_model_head_is_refused() -> None:
    with pytest.raises(ModelError, match="Choose a decoder-only language model"):
        ScoringModel(build("qwen3").model)


@pytest.mark.parametrize(
    ("architecture", "options"), [("qwen3", {"tie_word_embeddings": True}), ("qwen3_moe", QWEN_MOE)]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_cross_entropy(
    architecture: str, options: dict[str, Any], checkpointing: bool
) -> None:
    samples, reference, model = make_samples(), build(architecture, **options), build(architecture, **options)
    total = sum(-own_log_probs(reference, s).sum() for s in samples)
    total.backward()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    scoring = ScoringModel(model).train()
    loss = -score(scoring, collate(samples, range(3), pad_id=0)).log_prob_M.sum()
    loss.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("architecture", "options"), [("qwen3", {}), ("qwen3_moe", QWEN_MOE)])
def test_padding_order_and_company_change_nothing(architecture: str, options: dict[str, Any]) -> None:
    scoring, samples = ScoringModel(build(architecture, **options)), make_samples([5, 12, 9, 40])

    def sums(picks: list[int], pad_id: int) -> dict[int, float]:
        batch = collate(samples, picks, pad_id=pad_id)
        total_B = sum_by_sample(score(scoring, batch).log_prob_M, batch.sample_M, len(picks))
        return dict(zip(picks, total_B.tolist(), strict=True))

    with torch.no_grad():
        alone = {i: sums([i], pad_id=0)[i] for i in range(3)}
        for picks in ([0, 1, 2], [2, 0, 1], [3, 1, 0, 2]):
            for pad_id in (0, 50):
                together = sums(picks, pad_id)
                for i in range(3):
                    assert together[i] == pytest.approx(alone[i], rel=1e-6)


def test_a_model_is_told_of_padding_only_if_it_would_see_it() -> None:
    samples = make_samples([5, 12, 9])
    batch = collate(samples, range(3), pad_id=0)
    masks: list[torch.Tensor | None] = []

    def watched(model: PreTrainedModel) -> ScoringModel:
        scoring = ScoringModel(model)
        scoring.backbone.register_forward_pre_hook(
            lambda _, __, given: masks.append(given["attention_mask"]), with_kwargs=True
        )
        return scoring

    causal = watched(build("qwen3"))
    found = score(causal, batch).log_prob_M
    causal.heeds_padding = True
    assert torch.equal(score(causal, batch).log_prob_M, found), "the same bits"
    model = build("qwen3")
    for layer in model.model.layers:  # every token sees those on its right, as in a prefix or an encoder
        layer.self_attn.is_causal = False
    open_ = watched(model)
    assert open_.heeds_padding
    score(open_, batch)
    # Of ranks that share a sequence each holds a part, and says which positions these are.
    causal.heeds_padding = False
    positions = torch.arange(batch.input_ids_BS.shape[1])[None]
    score(causal, batch, position_ids_BS=positions)
    assert [mask is None for mask in masks] == [True, False, False, False]


def test_what_is_masked_as_prompt_only_leaves_out_terms() -> None:
    scoring, (sample,) = ScoringModel(build("qwen3")), make_samples([12])
    all_T = np.arange(12) > 0
    with torch.no_grad():
        every_M = score(scoring, collate([Sample(0, sample.token_ids_T, all_T)], [0], 0)).log_prob_M
        some_M = score(scoring, collate([sample], [0], 0)).log_prob_M
    torch.testing.assert_close(some_M, every_M[torch.from_numpy(sample.trained_T[1:])], rtol=0, atol=1e-6)


def test_temperature_divides_the_logits() -> None:
    samples = make_samples()
    batch = collate(samples, range(3), pad_id=0)
    model = build("granite", logits_scaling=8.0)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS).logits
        at_positions = logits.flatten(0, 1)[batch.positions_M] / 0.5
        found_M = score(ScoringModel(model, temperature=0.5), batch).log_prob_M
    expected_M = -F.cross_entropy(at_positions, batch.target_M, reduction="none")
    torch.testing.assert_close(found_M, expected_M, rtol=0, atol=2e-6)


def test_bfloat16_model_is_scored_from_its_hidden_states_in_float32() -> None:
    model = build("qwen3").bfloat16()
    with torch.no_grad():  # logits with the spread of a trained model
        model.lm_head.weight.normal_(std=0.5)
    scoring, batch = ScoringModel(model), collate(make_samples(), range(3), pad_id=0)
    with torch.no_grad():
        scores = score(scoring, batch, keep_hidden=True)
    assert scores.hidden_M is not None and scores.hidden_M.dtype == torch.bfloat16
    logits = scores.hidden_M.double() @ model.lm_head.weight.double().t()
    exact_M = -F.cross_entropy(logits, batch.target_M, reduction="none")
    assert (scores.log_prob_M - exact_M).abs().max() < 0.01


def test_kl_to_a_remembered_start() -> None:
    scoring, batch = ScoringModel(build("qwen3")), collate(make_samples(), range(3), pad_id=0)
    with torch.no_grad():
        start = score(scoring, batch, keep_hidden=True)
        head = scoring.frozen_head()
        log_start = F.log_softmax(start.hidden_M @ head.weight_VD.t(), dim=1)
        for parameter in scoring.parameters():
            parameter.add_(0.02 * torch.ones_like(parameter).cumsum(0).sin())
    reference = Reference(start.hidden_M, "forward", head)
    moved = score(scoring, batch, keep_hidden=True, reference=reference)
    log_moved = F.log_softmax(moved.hidden_M @ scoring.head.weight.detach().t(), dim=1)
    expected_M = F.kl_div(log_moved, log_start, log_target=True, reduction="none").sum(1)
    assert expected_M.mean() > 0.01
    torch.testing.assert_close(moved.kl_M, expected_M, rtol=1e-4, atol=1e-6)
    moved.kl_M.sum().backward()
    assert scoring.backbone.embed_tokens.weight.grad.abs().max() > 0


class TestLora:
    """PEFT wrappers: the adapter acts, and off it is the model as it was."""

    def adapted(self, **options: Any) -> Any:
        from peft import LoraConfig, get_peft_model

        return get_peft_model(build("qwen3"), LoraConfig(r=4, init_lora_weights=False, **options))

    def test_adapter_on_and_off(self) -> None:
        peft_model, samples = self.adapted(target_modules=["q_proj", "v_proj"]), make_samples()
        plain, batch = build("qwen3"), collate(samples, range(3), pad_id=0)
        with torch.no_grad():
            with_adapter_M = torch.cat([own_log_probs(peft_model, s) for s in samples])
            without_M = torch.cat([own_log_probs(plain, s) for s in samples])
            scoring = ScoringModel(peft_model)
            torch.testing.assert_close(score(scoring, batch).log_prob_M, with_adapter_M, rtol=0, atol=2e-6)
            with peft_model.disable_adapter():
                torch.testing.assert_close(score(scoring, batch).log_prob_M, without_M, rtol=0, atol=2e-6)
        assert (with_adapter_M - without_M).abs().max() > 1e-3

    def test_only_adapters_get_gradients(self) -> None:
        scoring = ScoringModel(self.adapted(target_modules=["q_proj"]))
        score(scoring, collate(make_samples(), range(3), pad_id=0)).log_prob_M.sum().backward()
        assert {
            "lora_A" in n or "lora_B" in n for n, p in scoring.named_parameters() if p.grad is not None
        } == {True}

    def test_an_adapted_head_is_refused(self) -> None:
        with pytest.raises(ModelError, match="keep lm_head out"):
            ScoringModel(self.adapted(target_modules=["q_proj", "lm_head"]))


def test_checkpoint_written_after_wrapping_loads_as_an_ordinary_model(tmp_path: Path) -> None:
    model = build("qwen3", tie_word_embeddings=True)
    ids_BS = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model(input_ids=ids_BS).logits
        ScoringModel(model)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=ids_BS).logits
    assert torch.equal(loaded, expected)
