"""vLLM as a worker: N samples a prompt, the log-probabilities they were drawn from, their routes.

A plain class; this file loads neither vLLM nor torch, so that the driver may import it to start
engines elsewhere. Tokens go in and tokens come out: nothing is tokenised again on the way.

    T  tokens of one completion      L  MoE layers      K  experts per token
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from actors.weight_chunks import combine_checksums
from modeseek_ray.errors import ConfigError, ModeseekError, NumericsError, WorkerError
from modeseek_ray.types import Completion, Prompt

if TYPE_CHECKING:
    from actors.weight_chunks import WeightChunk

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    samples_per_prompt: int = 1
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    max_tokens: int = 256  # of a completion; the model's length bounds it, too
    stop: tuple[str, ...] = ()  # texts that end a completion, besides the model's own end tokens


@dataclass(frozen=True)
class GeneratorSpec:
    """Everything an engine needs to know, the same for all engines of a job.

    Raises `ConfigError` for sampling whose log-probabilities could not be used as promised.
    """

    model_path: str  # a Hugging Face directory: version 0 of the weights
    sampling: Sampling = field(default_factory=Sampling)
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    max_length: int = 2048  # prompt and completion together, tokens
    with_routes: bool = False  # MoE: record which experts every token took
    # Whether ratios to the sampler are formed. With top_p below one they are not what they seem: the
    # sampler's distribution has no mass where the trainer's has some.
    ratios_used: bool = True
    max_num_seqs: int = 128  # completions written at once; as many again wait inside the engine
    kv_cache_gib: float | None = None  # None: 1 GiB on the CPU, what is left of the memory on a GPU
    tensor_parallel: int = 1  # GPUs of one engine
    expert_parallel: bool = False  # MoE: whole experts are dealt out over the tensor-parallel GPUs
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0  # of each tensor-parallel part; a fraction is a share of the device's memory
    # Between rollouts the engine gives its GPU's memory up, for the trainer it shares the device with.
    sleeps: bool = False
    # How new weights come: chunks through the object store, or by vLLM's own engines, broadcast from another GPU
    # (nccl) or lent by a trainer on the same one (ipc).
    transfer: Literal["chunks", "nccl", "ipc"] = "chunks"
    # What log-probabilities are of: the distribution really drawn from (after temperature and top_p),
    # which ratios need, or the model's own at temperature one, which people expect of an answer.
    logprobs_mode: Literal["processed_logprobs", "raw_logprobs"] = "processed_logprobs"
    # A broken engine ends its process, so that its pool starts another; never in a user's own process.
    exit_when_broken: bool = False

    def __post_init__(self) -> None:
        sampling = self.sampling
        if sampling.temperature != 0 and not 0.01 <= sampling.temperature <= 100:
            raise ConfigError(
                f"a temperature of {sampling.temperature} cannot be sampled from.",
                param="sampling.temperature",
                mend="Choose 0 (greedy), or a number from 0.01 to 100.",
            )
        if sampling.temperature == 0 and (sampling.samples_per_prompt > 1 or self.ratios_used):
            raise ConfigError(
                "greedy decoding writes one completion a prompt, and none of it is drawn from a distribution.",
                param="sampling.temperature",
                mend="Raise the temperature; 0 is for one sample a prompt that no ratio is formed of.",
            )
        if sampling.top_p < 1 and self.ratios_used:
            raise ConfigError(
                f"top_p of {sampling.top_p} cuts tokens off that the trained policy can still write,"
                " so ratios to the sampler would be wrong.",
                param="sampling.top_p",
                mend="Set it to 1, or choose a weighting without ratios to the sampler.",
            )
        if self.tensor_parallel > 1 and not self.gpus_per_worker:
            raise ConfigError(
                f"tensor_parallel of {self.tensor_parallel} needs GPUs.",
                param="tensor_parallel",
                mend="Set it to 1, and start more engines instead.",
            )


@dataclass(frozen=True)
class Request:
    """One completion to be written. Asked twice, it is the same request: its seed depends on what it is for."""

    id: str
    prompt: NDArray[np.int32]
    seed: int


def requests_of(spec: GeneratorSpec, prompt: Prompt, round_: int) -> list[Request]:
    """The N requests of a prompt, in the order of the completions.

    Raises `ConfigError` for a prompt that leaves no room for an answer.
    """
    if not 0 < len(prompt.token_ids_T) < spec.max_length:
        raise ConfigError(
            f"prompt {prompt.ordinal} has {len(prompt.token_ids_T)} tokens; prompt and answer together"
            f" may have {spec.max_length}.",
            param="training.max_length",
            mend="Raise it (up to what the model can), or leave out the prompt.",
        )
    return [
        Request(
            id=f"{prompt.ordinal}.{round_}.{i}",
            prompt=prompt.token_ids_T,
            seed=seed_of(spec.seed, prompt.ordinal, round_, i),
        )
        for i in range(spec.sampling.samples_per_prompt)
    ]


def seed_of(job_seed: int, ordinal: int, round_: int, index: int) -> int:
    """63 bits that depend on all four and on nothing else: no machine, no Python's hash, no order."""
    digest = hashlib.blake2b(f"{job_seed}/{ordinal}/{round_}/{index}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "big") >> 1


class GeneratorEngine:
    """One vLLM engine. `setup` first; calls are made one at a time.

    `turn` may leave requests unfinished inside, which the next `turn` goes on with. Weights are
    replaced by `begin_update`, `update` for each chunk, `finish_update`, with no request inside.
    """

    def __init__(self, spec: GeneratorSpec) -> None:
        self._spec = spec
        self._llm: Any = None
        self._inside: dict[str, Request] = {}
        self._version = 0
        self._update: _Update | None = None

    def setup(self) -> dict[str, Any]:
        """Load the model. Returns what was built. Raises `ConfigError` for a model vLLM does not take."""
        from actors.vllm_engine import build

        started = time.monotonic()
        self._llm = build(self._spec)
        return {
            "engine": "vllm",
            "dtype": self._spec.dtype,
            "seconds": round(time.monotonic() - started, 3),
            "pid": os.getpid(),
        }

    def version(self) -> int:
        """Of the weights that write now; -1 between `begin_update` and `finish_update`."""
        return self._version

    def turn(
        self, requests: Sequence[Request], leave: int = 0, slice_s: float | None = None
    ) -> list[tuple[str, Completion]]:
        """Take these in, and write until at most `leave` requests are unfinished or `slice_s` has passed.

        Returns the completions finished since the last turn, by request id. Every one of them was
        written by one version of the weights, because nothing may be inside during an update.
        """
        self._add(requests)
        ends = None if slice_s is None else time.monotonic() + slice_s
        finished = []
        try:
            while len(self._inside) > leave:
                for output in self._llm.step():
                    request = self._inside.pop(output.request_id)
                    finished.append((request.id, self._completion(request, output.outputs[0])))
                if ends is not None and time.monotonic() >= ends:
                    break
        except ModeseekError:
            raise
        except Exception as error:
            self._broke(error)
        return finished

    def sample(self, requests: Sequence[Request]) -> list[Completion]:
        """Write all of these and nothing else, in their order."""
        written = dict(self.turn(requests))
        return [written[request.id] for request in requests]

    def abort(self) -> list[str]:
        """Throw away what is unfinished. Returns the ids; their text is lost and must be asked for again."""
        ids = list(self._inside)
        self._inside.clear()
        self._llm.abort(ids)
        return ids

    def score(self, sequences: Sequence[NDArray[np.int32]]) -> list[NDArray[np.float64]]:
        """Log-probability of each token but the first, given those before it, at temperature one, nats.

        A forward pass over the whole sequence, nothing from the prefix cache. No request may be inside.
        """
        self._refuse_busy("score")
        try:
            return self._llm.score(sequences)  # type: ignore[no-any-return]
        except Exception as error:
            self._broke(error)

    def install(self, version: int, checksum: str, *chunks: WeightChunk) -> None:
        """A whole update in one call: `begin_update`, `update` for each chunk, `finish_update`."""
        self.begin_update()
        for chunk in chunks:
            self.update(chunk)
        self.finish_update(version, checksum)

    def begin_update(self) -> None:
        """From here to `finish_update` the model is torn and writes nothing."""
        self._refuse_busy("update")
        self._version, self._update = -1, _Update()
        try:
            self._llm.begin_update()
        except Exception as error:
            self._broke(error)

    def update(self, chunk: WeightChunk) -> None:
        """Load some of the weights. Raises `NumericsError` where the bytes are not those that were sent."""
        if self._update is None:
            raise RuntimeError("begin_update() was not called")
        self._update.check(chunk)
        try:
            self._llm.update(chunk)
        except Exception as error:
            self._broke(error)

    def finish_update(self, version: int, checksum: str) -> None:
        """Write with the new weights as `version`; `checksum` is over all chunks, in order.

        Text cached under the old weights is forgotten. Raises `NumericsError` if chunks are missing,
        and then the engine stays torn: its pool starts the update again, or another engine.
        """
        if self._update is None:
            raise RuntimeError("begin_update() was not called")
        self._update.check_all(checksum)
        try:
            self._llm.finish_update()
        except Exception as error:
            self._broke(error)
        self._version, self._update = version, None

    def sleep(self) -> None:
        """Give the device's memory up: weights go to host memory, what is cached is forgotten. Nothing on a CPU."""
        self._refuse_busy("sleep")
        try:
            self._llm.sleep()
        except Exception as error:
            self._broke(error)

    def wake(self) -> None:
        """Be as before `sleep`, at the same version."""
        try:
            self._llm.wake()
        except Exception as error:
            self._broke(error)

    def native(self, method: str, arguments: Mapping[str, Any]) -> None:
        """One of vLLM's own weight-transfer calls; `transfers` says in which order."""
        self._refuse_busy("update")
        try:
            self._llm.native(method, arguments)
        except Exception as error:
            self._broke(error)
        if method == "start_weight_update":
            self._version = -1
        elif method == "finish_weight_update":
            self._version = int(arguments["weight_version"])

    def card(self) -> str:
        """The UUID of this engine's GPU. Raises `ConfigError` where there is none."""
        from actors.cards import card

        return card()

    def close(self) -> None:
        """Free the model."""
        if self._llm is not None:
            self._llm.close()
            self._llm = None

    def _add(self, requests: Sequence[Request]) -> None:
        if self._version < 0:
            raise RuntimeError("the weights are being replaced; finish_update() first")
        for request in requests:
            if request.id in self._inside:
                raise RuntimeError(f"request {request.id} is being written already")
            try:
                self._llm.add(request)
            except Exception as error:
                self._broke(error)
            self._inside[request.id] = request

    def _completion(self, request: Request, output: Any) -> Completion:
        log_prob_T = np.asarray(output.logprobs.logprobs, dtype=np.float32)
        if output.finish_reason not in ("stop", "length") or len(log_prob_T) != len(output.token_ids):
            raise RuntimeError(
                f"request {request.id} ended as {output.finish_reason!r} with {len(output.token_ids)} tokens"
                f" and {len(log_prob_T)} log-probabilities"
            )
        if not np.isfinite(log_prob_T).all():
            raise NumericsError(
                f"a log-probability of prompt {request.id.split('.')[0]}'s completion is not finite"
                f" (weights of version {self._version}).",
                mend="Lower the learning rate; the last checkpoint is intact.",
            )
        return Completion(
            token_ids_T=np.asarray(output.token_ids, dtype=np.int32),
            log_prob_T=log_prob_T,
            finish_reason=output.finish_reason,
            weight_version=self._version,
            seed=request.seed,
            routes_TLK=self._llm.routes(output) if self._spec.with_routes else None,
        )

    def _refuse_busy(self, what: str) -> None:
        if self._inside:
            raise RuntimeError(
                f"{len(self._inside)} requests are being written; finish or abort them to {what}"
            )

    def _broke(self, error: Exception) -> NoReturn:
        """After an exception inside vLLM nothing is known of its state."""
        if self._spec.exit_when_broken:
            _log.critical("the engine broke; this process ends so that another starts", exc_info=error)
            logging.shutdown()
            os._exit(1)
        raise WorkerError(
            f"the vLLM engine broke: {error!r}.", mend="Start another; this one's state is not known."
        ) from error


class _Update:
    """What has come of the weights so far."""

    def __init__(self) -> None:
        self._checksums: list[str] = []

    def check(self, chunk: WeightChunk) -> None:
        found = chunk.compute_checksum()
        if found != chunk.checksum:
            raise NumericsError(
                f"chunk {len(self._checksums)} of the weights arrived with the checksum {found},"
                f" it was sent with {chunk.checksum}.",
                mend="Memory or network is damaged; start the job again on another node.",
            )
        self._checksums.append(found)

    def check_all(self, checksum: str) -> None:
        found = combine_checksums(self._checksums)
        if found != checksum:
            raise NumericsError(
                f"{len(self._checksums)} chunks of the weights arrived, together with the checksum {found};"
                f" {checksum} was sent.",
                mend="Report this: chunks were lost, doubled or mixed up.",
            )
