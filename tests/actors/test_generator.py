"""One engine: the log-probabilities it says it sampled from, its routes, its requests, its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from actors.generator import GeneratorEngine, GeneratorSpec, Sampling, requests_of
from actors.modeling import load_causal_lm
from actors.weight_chunks import WeightChunk, combine_checksums
from modeseek_ray.errors import ConfigError, NumericsError, WorkerError
from modeseek_ray.routing import record_routes
from modeseek_ray.types import Completion, Prompt
from tests.actors.engines import Engine
from tests.conftest import byte_tokenizer

TOLERANCE = 1e-5  # nats a token, float32; ten times what was seen


def prompts(count: int = 6) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [
        Prompt(ordinal=i, token_ids_T=rng.integers(5, 250, 4 + 3 * i).astype(np.int32)) for i in range(count)
    ]


def whole(prompt: Prompt, completion: Completion) -> np.ndarray:
    return np.concatenate([prompt.token_ids_T, completion.token_ids_T])


def log_probs(model: Any, token_ids_T: np.ndarray, temperature: float) -> np.ndarray:
    """transformers' own, of each token but the first."""
    ids = torch.from_numpy(token_ids_T.astype(np.int64))
    with torch.no_grad():
        logits = model(ids[None]).logits[0].double()
    return (logits / temperature).log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0].numpy()


@pytest.mark.slow
def test_log_probabilities_are_those_of_the_distribution_that_was_sampled(
    moe_engine: Engine, vllm_moe: Path
) -> None:
    model = load_causal_lm(vllm_moe, "float32").eval()
    temperature = moe_engine.spec.sampling.temperature
    off_at_one = []
    for prompt, completions in zip(prompts(), moe_engine.sample(prompts()), strict=True):
        for completion in completions:
            own_T = log_probs(model, whole(prompt, completion), temperature)[-completion.num_tokens :]
            np.testing.assert_allclose(completion.log_prob_T, own_T, atol=TOLERANCE)
            raw_T = log_probs(model, whole(prompt, completion), 1.0)[-completion.num_tokens :]
            off_at_one.append(np.abs(completion.log_prob_T - raw_T).max())
            assert completion.weight_version == moe_engine.call("version")
    assert min(off_at_one) > 100 * TOLERANCE  # another temperature would have been noticed


@pytest.mark.slow
def test_scores_are_at_temperature_one_and_of_every_token(moe_engine: Engine, vllm_moe: Path) -> None:
    model = load_causal_lm(vllm_moe, "float32").eval()
    sequences = [p.token_ids_T for p in prompts()]
    for token_ids_T, scores_T in zip(sequences, moe_engine.call("score", sequences), strict=True):
        np.testing.assert_allclose(scores_T, log_probs(model, token_ids_T, 1.0), atol=TOLERANCE)


@pytest.mark.slow
def test_routes_are_the_experts_the_trainers_model_asks(moe_engine: Engine, vllm_moe: Path) -> None:
    model = load_causal_lm(vllm_moe, "float32").eval()
    for prompt, completions in zip(prompts(), moe_engine.sample(prompts()), strict=True):
        for completion in completions:
            ids_T = whole(prompt, completion)
            with torch.no_grad(), record_routes(model) as recording:
                model(torch.from_numpy(ids_T.astype(np.int64))[None])
            own_TLK = np.sort(np.asarray(recording.routes)[0, :-1], axis=-1)
            assert completion.routes_TLK is not None
            assert completion.routes_TLK.dtype == np.uint8
            assert completion.routes_TLK.shape == (len(ids_T) - 1, 2, 2)  # layer 0 of three is dense
            np.testing.assert_array_equal(np.sort(completion.routes_TLK, axis=-1), own_TLK)


@pytest.mark.slow
def test_the_same_requests_are_answered_alike_and_others_are_not(moe_engine: Engine) -> None:
    once, again = moe_engine.sample(prompts()), moe_engine.sample(prompts())
    for first, second in zip(once, again, strict=True):
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a.token_ids_T, b.token_ids_T)
    texts = {tuple(c.token_ids_T) for cs in [*once, *moe_engine.sample(prompts(), 1)] for c in cs}
    assert len(texts) == 4 * len(prompts())  # two of each prompt in each of two rounds, all different


@pytest.mark.slow
def test_requests_may_stay_inside_between_turns_and_be_aborted(moe_engine: Engine) -> None:
    requests = [r for p in prompts() for r in requests_of(moe_engine.spec, p, 2)]
    assert moe_engine.call("turn", requests[:2], 0, 0.0) == []  # one forward pass, and time is up
    finished = moe_engine.call("turn", requests[2:6], 4, None)
    assert sorted(name for name, _ in finished) == sorted(r.id for r in requests[:2])  # they had a lead
    finished += moe_engine.call("turn", requests[6:8], 0, None)
    assert sorted(name for name, _ in finished) == sorted(r.id for r in requests[:8])
    assert moe_engine.call("turn", requests[8:], 0, 0.0) == []
    assert sorted(moe_engine.call("abort")) == sorted(r.id for r in requests[8:])
    assert moe_engine.call("turn", [], 0, None) == []
    assert len(moe_engine.call("sample", requests[8:])) == len(requests) - 8


@pytest.mark.slow
def test_a_completion_ends_with_a_stop_text_an_end_token_or_at_its_length(dense_engine: Engine) -> None:
    tokenizer = byte_tokenizer()
    completions = [c for cs in dense_engine.sample(prompts()) for c in cs]
    for completion in completions:
        text = tokenizer.decode(completion.token_ids_T[:-1], skip_special_tokens=True)
        assert "e" not in text
        assert tokenizer.eos_token_id not in completion.token_ids_T[:-1]
        ended = completion.token_ids_T[-1] in (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("e"))
        assert completion.finish_reason == ("stop" if ended else "length")
        assert ended or completion.num_tokens == 40
        assert len(completion.log_prob_T) == completion.num_tokens
    assert {c.finish_reason for c in completions} == {"stop", "length"}


class FakeVllm:
    """Takes anything; answers what it was told to."""

    def __init__(self, *outputs: Any) -> None:
        self.outputs = list(outputs)
        self.loaded: list[WeightChunk] = []

    def add(self, request: Any) -> None: ...

    def step(self) -> list[Any]:
        output = self.outputs.pop(0)
        if isinstance(output, Exception):
            raise output
        return [output]

    def begin_update(self) -> None: ...

    def update(self, chunk: WeightChunk) -> None:
        self.loaded.append(chunk)

    def finish_update(self) -> None: ...


def engine_with(llm: FakeVllm, **changes: Any) -> GeneratorEngine:
    engine = GeneratorEngine(GeneratorSpec(model_path="-", **changes))
    engine._llm = llm
    return engine


def output_of(engine: GeneratorEngine, *log_probs: float, finish_reason: str = "stop") -> tuple[Any, Any]:
    (request,) = requests_of(engine._spec, prompts(1)[0], 0)
    logprobs = SimpleNamespace(logprobs=list(log_probs))
    written = SimpleNamespace(token_ids=(7, 8), logprobs=logprobs, finish_reason=finish_reason)
    return request, SimpleNamespace(request_id=request.id, outputs=[written])


def chunks() -> list[WeightChunk]:
    weights = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.arange(5, dtype=torch.bfloat16)}
    return [WeightChunk.pack([item]) for item in weights.items()]


def test_weights_of_a_version_are_all_there_and_whole() -> None:
    llm = FakeVllm()
    engine = engine_with(llm)
    engine.begin_update()
    assert engine.version() == -1
    with pytest.raises(RuntimeError, match="being replaced"):
        engine.sample(requests_of(engine._spec, prompts(1)[0], 0))
    for chunk in chunks():
        engine.update(chunk)
    engine.finish_update(3, combine_checksums([c.checksum for c in chunks()]))
    assert engine.version() == 3
    assert [c.names for c in llm.loaded] == [("a.weight",), ("b.weight",)]


def test_a_damaged_chunk_is_not_loaded() -> None:
    llm = FakeVllm()
    engine = engine_with(llm)
    (chunk, _) = chunks()
    data = chunk.data[0].copy()
    data[3] ^= 1
    engine.begin_update()
    with pytest.raises(NumericsError, match=chunk.checksum):
        engine.update(replace(chunk, data=(data, *chunk.data[1:])))
    with pytest.raises(NumericsError):
        engine.update(replace(chunk, names=("other.weight",)))
    assert llm.loaded == []
    assert engine.version() == -1


@pytest.mark.parametrize("arrived", [[0], [1, 0], [0, 0, 1]])
def test_lost_doubled_and_mixed_up_chunks_are_noticed(arrived: list[int]) -> None:
    engine = engine_with(FakeVllm())
    engine.begin_update()
    for i in arrived:
        engine.update(chunks()[i])
    with pytest.raises(NumericsError, match="lost, doubled or mixed up"):
        engine.finish_update(1, combine_checksums([c.checksum for c in chunks()]))
    assert engine.version() == -1


def test_nothing_is_updated_while_requests_are_inside() -> None:
    engine = engine_with(FakeVllm())
    request, output = output_of(engine, -1.0, -2.0)
    engine._llm.outputs = [output]
    engine._add([request])
    with pytest.raises(RuntimeError, match="1 requests are being written"):
        engine.begin_update()
    assert engine.version() == 0
    assert len(engine.turn([])) == 1
    engine.begin_update()


@pytest.mark.parametrize(
    ("log_probs", "reason", "error"),
    [
        ((-1.0, float("nan")), "stop", NumericsError),
        ((-1.0, -2.0), "abort", WorkerError),
        ((-1.0,), "stop", WorkerError),
    ],
)
def test_what_cannot_be_trained_on_is_no_completion(
    log_probs: tuple[float, ...], reason: str, error: type[Exception]
) -> None:
    engine = engine_with(FakeVllm())
    request, output = output_of(engine, *log_probs, finish_reason=reason)
    engine._llm.outputs = [output]
    with pytest.raises(error):
        engine.sample([request])


def test_an_engine_that_broke_ends_its_process_where_it_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    def end(status: int) -> None:
        ended.append(status)
        raise SystemExit(status)

    monkeypatch.setattr("actors.generator.os._exit", end)
    engine = engine_with(FakeVllm(OSError("gone")))
    request, _ = output_of(engine)
    with pytest.raises(WorkerError, match="gone"):
        engine.sample([request])
    assert ended == []
    engine = engine_with(FakeVllm(OSError("gone")), exit_when_broken=True)
    with pytest.raises(SystemExit):
        engine.sample([request])
    assert ended == [1]


def test_routes_of_a_dense_model_are_refused_before_the_engine_starts(vllm_dense: Path) -> None:
    spec = GeneratorSpec(model_path=str(vllm_dense), sampling=Sampling(), with_routes=True)
    with pytest.raises(ConfigError, match="MoE"):
        GeneratorEngine(spec).setup()


def test_chunks_are_the_tensors_bit_for_bit_and_share_memory() -> None:
    weights = [
        ("scalar", torch.tensor(3.5)),
        ("half", torch.randn(5, 7).to(torch.bfloat16)),
        ("turned", torch.randn(4, 3).t()),
        ("whole", torch.arange(3)),
    ]
    chunk = WeightChunk.pack(weights)
    found = dict(chunk.tensors())
    for name, tensor in weights:
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    chunk.data[0][:] = 0
    assert found["scalar"] == 0.0  # the same memory, not a copy
    assert weights[0][1] == 3.5


def test_a_chunk_that_is_not_copied_notices_that_its_weights_changed() -> None:
    weight, turned = torch.ones(8, 8), torch.randn(4, 3).t()
    live, kept = (WeightChunk.pack([("w", weight), ("turned", turned)], copy=copy) for copy in (False, True))
    assert live.checksum == kept.checksum == live.compute_checksum()
    weight[3, 3] = 2.0
    assert dict(live.tensors())["w"][3, 3] == 2.0 and dict(kept.tensors())["w"][3, 3] == 1.0
    assert live.compute_checksum() != live.checksum and kept.compute_checksum() == kept.checksum
    assert kept.num_bytes == 4 * (64 + 12)


@pytest.mark.parametrize(
    "change",
    [
        {"names": ("b", "a")},
        {"shapes": ((3, 2), (6,))},
        {"dtypes": ("float32", "int32")},
        {"data": (np.ones(24, np.uint8), np.zeros(24, np.uint8))},
    ],
)
def test_the_checksum_is_of_everything_a_chunk_says(change: dict[str, Any]) -> None:
    chunk = WeightChunk.pack([("a", torch.zeros(2, 3)), ("b", torch.zeros(6))])
    assert replace(chunk, **change).compute_checksum() != chunk.checksum
