"""The frozen scorer beside a bare forward pass of transformers over the same micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.reference import ReferenceModel, ScoringSpec
from modeseek_ray.data.batching import pack
from modeseek_ray.objectives.collate import collate
from tests.gpu.measure import take
from tests.gpu.workload import Case

MICRO_BATCH_TOKENS = 8192


def figures(case: Case, model: Path, *, with_routes: bool = False) -> dict[str, Any]:
    """Tokens per second and peak memory of both, and how far their log-probabilities are apart."""
    spec = ScoringSpec(
        str(model),
        dtype="bfloat16",
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        gpus_per_worker=1.0 if case.device == "cuda" else 0.0,
        with_routes=with_routes,
    )
    scorer = ReferenceModel(spec)
    samples = case.rows()
    picks = [(0, i) for i in range(len(samples))]
    scored = take(lambda: scorer.score(picks, samples), case.device, case.repeats)
    bare_model = scorer._model.model
    cuts = pack(np.array([s.length for s in samples]), MICRO_BATCH_TOKENS)

    @torch.no_grad()
    def bare() -> np.ndarray:
        """Whole logits, as anyone would; a sample at a time through the softmax, or they would not fit."""
        log_prob_N = np.zeros(len(samples))
        for index_B in cuts:
            batch = collate(samples, index_B, pad_id=0).to(case.device)
            logits_BSV = bare_model(
                input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS, use_cache=False
            ).logits
            for b, i in enumerate(index_B):
                target_T = batch.input_ids_BS[b, 1:, None]
                log_prob_T = logits_BSV[b, :-1].log_softmax(-1, dtype=torch.float32).gather(1, target_T)[:, 0]
                trained_T = torch.from_numpy(samples[i].trained_T[1:]).to(case.device)
                log_prob_N[i] = float(log_prob_T[trained_T].double().sum())
        return log_prob_N

    plain = take(bare, case.device, case.repeats)
    off_N = np.abs(scorer.score(picks, samples) - bare()) / np.array([s.num_tokens for s in samples])
    return {
        "tokens_per_s": case.num_tokens / scored.seconds,
        "bare_tokens_per_s": case.num_tokens / plain.seconds,
        "over_bare": plain.seconds / scored.seconds,
        "peak_gib": scored.peak_bytes and scored.peak_bytes / 2**30,
        "bare_peak_gib": plain.peak_bytes and plain.peak_bytes / 2**30,
        "max_off_nats_per_token": float(off_N.max()),
    }
