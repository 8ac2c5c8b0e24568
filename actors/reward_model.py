"""A sequence classifier that grades: conversations in, one `Grade` each out. And a pool of them.

A plain class. `modeseek_ray.rewards` knows it as `Classifier` and never as what it is.

    N  conversations asked for      B  of one micro-batch      C  labels
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from actors.workers import Worker
from modeseek_ray.data.batching import pack
from modeseek_ray.errors import ConfigError, ModelError
from modeseek_ray.rewards import Grade
from modeseek_ray.rewards.grader import failed, grade_of
from modeseek_ray.rewards.score_model import Conversation
from modeseek_ray.types import FloatArray

# Conversations handed to one worker at once. Micro-batches are cut within such a chunk, so that the bits of
# a score depend on the data and not on the number of workers.
CHUNK = 64


@dataclass(frozen=True)
class RewardModelSpec:
    """The classifier and how it computes. Everything here but the last three changes bits of the scores."""

    model_path: str  # a Hugging Face directory
    label: str | None = None  # the label whose probability is the score; None = the single logit itself
    dtype: Literal["float32", "bfloat16"] = "float32"
    micro_batch_tokens: int = 8192  # most positions computed at once, padding included
    cpus_per_worker: float = 1.0  # also torch's threads, rounded down, at least one
    gpus_per_worker: float = 0.0
    name: str | None = None  # what the job calls the model; None = its path

    @property
    def key(self) -> tuple[str, str | None]:
        """What a grader calls it by."""
        return self.name or self.model_path, self.label

    @property
    def num_threads(self) -> int:
        return max(1, int(self.cpus_per_worker))


class RewardModel:
    """The weights never change, so a worker that was started again answers as the one before it."""

    def __init__(self, spec: RewardModelSpec) -> None:
        self._spec = spec
        self._model: Any = None

    def setup(self) -> None:
        """Load the model, once; `score` does it where nobody has.

        Raises `ModelError` for a model that cannot be loaded, or whose labels are not what the spec says.
        """
        if self._model is not None:
            return
        import torch
        from transformers import AutoTokenizer

        from actors.modeling import load_sequence_classifier

        spec = self._spec
        if spec.gpus_per_worker and not torch.cuda.is_available():
            raise ConfigError(
                "the job asks for GPUs, and torch finds none in this process.",
                param="resources.gpus_per_worker",
                mend="Set it to 0, or install the CUDA requirements.",
            )
        torch.set_num_threads(spec.num_threads)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                spec.model_path, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ModelError(
                f"its tokenizer cannot be loaded: {error}",
                file=spec.model_path,
                mend="`tokenizer.save_pretrained(directory)`",
                code="no_tokenizer",
            ) from error
        model = load_sequence_classifier(spec.model_path, spec.dtype).eval()
        self._config = model.config
        self._column = self._find_label()
        self._device = torch.device("cuda" if spec.gpus_per_worker else "cpu")
        self._model = model.to(self._device)  # type: ignore[arg-type]

    def _find_label(self) -> int | None:
        labels: Mapping[int, str] = self._config.id2label
        if self._spec.label is None and self._config.num_labels == 1:
            return None
        found = [column for column, name in labels.items() if name == self._spec.label]
        if len(found) == 1 and self._config.num_labels > 1:
            return found[0]
        names = ", ".join(map(str, labels.values()))
        raise ModelError(
            f"it has {self._config.num_labels} label(s), {names}; the grader's label is {self._spec.label!r}.",
            file=self._spec.model_path,
            mend="With several labels name the one whose probability is the score; with one leave `label` away.",
        )

    def score(self, conversations: Sequence[Conversation]) -> list[Grade]:
        """One grade per conversation, [N]; one that cannot be scored gets its reason."""
        self.setup()
        grades: list[Grade | None] = [None] * len(conversations)
        encoded: dict[int, Mapping[str, Any]] = {}
        for n, conversation in enumerate(conversations):
            try:
                encoded[n] = self._encode(conversation)
            except Exception as error:  # a chat template may raise anything
                grades[n] = failed(error)
        where_N = list(encoded)
        length_N = np.array([len(encoded[n]["input_ids"]) for n in where_N], dtype=np.int64)
        # Without a padding token the model reads its answer off the last position: one at a time.
        alone = self._config.get_text_config().pad_token_id is None
        for index_B in pack(length_N, self._spec.micro_batch_tokens, max_samples=1 if alone else None):
            batch = [where_N[i] for i in index_B]
            for n, score in zip(batch, self._forward([encoded[n] for n in batch]), strict=True):
                try:
                    grades[n] = grade_of(score)
                except Exception as error:
                    grades[n] = failed(error)
        return [grade for grade in grades if grade is not None]

    def _encode(self, conversation: Conversation) -> Mapping[str, Any]:
        """Token ids, through the chat template where there is one; else one text, or a question and an answer."""
        messages = [
            {**message, "role": "system" if message["role"] == "developer" else message["role"]}
            for message in conversation
        ]
        if self._tokenizer.chat_template:
            row = self._tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
        elif len(messages) <= 2:
            row = self._tokenizer(*(message["content"] for message in messages))
        else:
            raise ValueError("the classifier has no chat template and takes one message, or two as a pair")
        length, longest = len(row["input_ids"]), self._longest()
        if not 1 <= length <= longest:
            raise ValueError(f"{length} tokens; the classifier takes 1 to {longest}")
        return dict(row)

    def _longest(self) -> int:
        """The smaller of two limits: a model may keep some of its positions for itself, as RoBERTa does."""
        positions = getattr(self._config.get_text_config(), "max_position_embeddings", None)
        return int(min(positions or 10**9, self._tokenizer.model_max_length))

    def _forward(self, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """Padded on the right; a row's score is the same in any company, up to rounding."""
        import torch

        pad_id = self._config.get_text_config().pad_token_id or 0
        longest = max(len(row["input_ids"]) for row in rows)
        batch = {}
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            if name in rows[0]:
                fill = pad_id if name == "input_ids" else 0
                padded = [[*row[name], *[fill] * (longest - len(row[name]))] for row in rows]
                batch[name] = torch.tensor(padded, device=self._device)
        with torch.inference_mode():
            logits_BC = self._model(**batch).logits.double().cpu().numpy()
        return self._read(logits_BC).tolist()

    def _read(self, logits_BC: FloatArray) -> FloatArray:
        if self._column is None:
            return logits_BC[:, 0]
        if self._config.problem_type == "multi_label_classification":
            return 1 / (1 + np.exp(-logits_BC[:, self._column]))
        shifted_BC = np.exp(logits_BC - logits_BC.max(axis=1, keepdims=True))
        return shifted_BC[:, self._column] / shifted_BC.sum(axis=1)

    def close(self) -> None:
        """Nothing outlives the object; pools call this on every worker."""


class ClassifierPool:
    """`modeseek_ray.rewards.Classifier` over workers, several for each model and label a job's grader names."""

    def __init__(self, workers: Mapping[tuple[str, str | None], Sequence[Worker]]) -> None:
        """The workers of each model and label, as `RewardModelSpec.key` has them."""
        self._workers = workers

    async def setup(self) -> None:
        """Load every model now, so that what is wrong with one comes out before the first sample is written."""
        await asyncio.gather(*(worker.call("setup") for worker in self._all()))

    async def score(
        self, model: str, label: str | None, conversations: Sequence[Conversation]
    ) -> list[Grade]:
        """Chunks go round the workers; grades come back in order."""
        workers = self._workers[model, label]
        starts = range(0, len(conversations), CHUNK)
        parts = await asyncio.gather(
            *(
                workers[k % len(workers)].call("score", list(conversations[start : start + CHUNK]))
                for k, start in enumerate(starts)
            )
        )
        return [grade for part in parts for grade in part]

    async def close(self) -> None:
        await asyncio.gather(*(worker.stop() for worker in self._all()), return_exceptions=True)

    def _all(self) -> list[Worker]:
        return [worker for workers in self._workers.values() for worker in workers]
