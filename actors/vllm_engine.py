"""What is asked of vLLM, in one place. Loaded by `GeneratorEngine.setup`, in the engine's process.

vLLM reads its environment when it is imported, so `build` sets it first.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from modeseek_ray.errors import ConfigError
from modeseek_ray.routing.wire import MoeLayers, from_vllm

if TYPE_CHECKING:
    from actors.generator import GeneratorSpec, Request
    from actors.weight_chunks import WeightChunk

_GIB = 2**30
_MEMORY_SHARE = 0.9  # of a GPU, for weights and cache


def environment(spec: GeneratorSpec) -> dict[str, str]:
    """What must be set before vLLM is imported.

    In one process: a core in a process of its own would outlive an actor that is killed, and start
    slower. No thread is bound to a core: engines, trainers and scorers share them.
    """
    values = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if not spec.gpus_per_worker:
        values["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return values


def build(spec: GeneratorSpec) -> VllmEngine:
    """Start an engine in this process, first forward pass included. Raises `ConfigError` for what vLLM refuses."""
    os.environ.update(environment(spec))
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # whole GiB only; the engine is told in bytes
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, int(spec.cpus_per_worker))))
    layers = _moe_layers(spec.model_path) if spec.with_routes else None
    import torch
    from vllm import LLM

    if not spec.gpus_per_worker:
        torch.cpu._init_amx()  # Linux wants to be asked; vLLM's bfloat16 kernels use it unasked, and die (SIGILL)
    from actors.vllm_weights import register

    is_guest = torch.distributed.is_initialized()  # of the trainer in this process (--local)
    backend = register() if spec.transfer == "chunks" else spec.transfer
    try:
        llm = LLM(**arguments(spec), weight_transfer_config={"backend": backend})
    except ValueError as error:  # pydantic's, too: an architecture it does not have, a length too long
        raise ConfigError(
            f"vLLM does not take this model or these settings: {error}",
            param="model",
            mend="Choose an architecture of vLLM's list, or change the setting it names.",
        ) from error
    engine = VllmEngine(llm, spec, layers, is_guest=is_guest)
    try:
        engine.score([np.zeros(2, dtype=np.int32)])
    except Exception as error:  # its kernels are chosen in the first forward pass
        raise ConfigError(
            f"vLLM loads this model, but cannot run it on this machine: {error}",
            param="model",
            mend="Choose a model with another head size or architecture; on a CPU, heads of 32 to 256.",
        ) from error
    return engine


def arguments(spec: GeneratorSpec) -> dict[str, Any]:
    """vLLM's own, but for how weights are handed over."""
    on_gpu = spec.gpus_per_worker > 0
    options: dict[str, Any] = {}
    if not on_gpu:
        options = {"distributed_executor_backend": "uni", "enforce_eager": True}
    else:
        # vLLM's default of one card for itself, cut to the share that was reserved of it.
        options["gpu_memory_utilization"] = round(_MEMORY_SHARE * min(1.0, spec.gpus_per_worker), 3)
        options["enable_sleep_mode"] = spec.sleeps
        options["enable_expert_parallel"] = spec.expert_parallel
    kv_cache_gib = spec.kv_cache_gib or (None if on_gpu else 1.0)
    if kv_cache_gib is not None:
        options["kv_cache_memory_bytes"] = int(kv_cache_gib * _GIB)
    return {
        "model": spec.model_path,
        "dtype": spec.dtype,
        "seed": spec.seed % 2**31,
        "max_model_len": spec.max_length,
        "max_num_seqs": spec.max_num_seqs,
        "tensor_parallel_size": spec.tensor_parallel,
        "trust_remote_code": False,
        "logprobs_mode": spec.logprobs_mode,
        "enable_return_routed_experts": spec.with_routes,
        **options,
    }


class VllmEngine:
    """A running vLLM behind the few calls that `GeneratorEngine` makes."""

    def __init__(self, llm: Any, spec: GeneratorSpec, layers: MoeLayers | None, *, is_guest: bool) -> None:
        """`layers`: whose routes are recorded. `is_guest`: the process group is somebody else's, and stays."""
        self._is_guest = is_guest
        self._llm = llm
        self._engine = llm.llm_engine
        self._spec = spec
        self._scores = 0
        self._layers = layers

    @property
    def core(self) -> Any:
        """vLLM's own engine, for requests that each say how they are sampled."""
        return self._engine

    def add(self, request: Request) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = self._spec.sampling
        parameters = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=request.seed,
            stop=list(sampling.stop) or None,
            detokenize=bool(sampling.stop),
            logprobs=0,  # of the token that was drawn, and of no other
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._engine.add_request(request.id, _tokens(request.prompt), parameters)

    def step(self) -> list[Any]:
        """One forward pass of the running batch. Returns the requests it finished."""
        return [output for output in self._engine.step() if output.finished]

    def abort(self, ids: Sequence[str]) -> None:
        self._engine.abort_request(list(ids))
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def sleep(self) -> None:
        """Weights to host memory, the cache forgotten. vLLM does it on GPUs alone."""
        if self._spec.gpus_per_worker > 0:
            self._llm.sleep(level=1)

    def wake(self) -> None:
        if self._spec.gpus_per_worker > 0:
            self._llm.wake_up()

    def score(self, sequences: Sequence[NDArray[np.int32]]) -> list[NDArray[np.float64]]:
        """See `GeneratorEngine.score`. vLLM returns prompt log-probabilities before temperature."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            max_tokens=1,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        positions = {}
        for position, token_ids_T in enumerate(sequences):
            self._scores += 1
            name = f"score-{self._scores}"
            positions[name] = position
            self._engine.add_request(name, _tokens(token_ids_T), parameters)
        found: list[NDArray[np.float64]] = [np.zeros(0)] * len(sequences)
        while self._engine.has_unfinished_requests():
            for output in self.step():
                found[positions[output.request_id]] = np.asarray(output.prompt_logprobs.logprobs)
        for token_ids_T, log_prob_T in zip(sequences, found, strict=True):
            if len(log_prob_T) != len(token_ids_T) - 1:
                raise RuntimeError(f"{len(log_prob_T)} log-probabilities for {len(token_ids_T)} tokens")
        return found

    def begin_update(self) -> None:
        self._llm.start_weight_update()

    def update(self, chunk: WeightChunk) -> None:
        self._llm.update_weights({"update_info": {"chunk": chunk}})

    def finish_update(self) -> None:
        self._llm.finish_weight_update()
        self.forget_text()

    def native(self, method: str, arguments: Mapping[str, Any]) -> None:
        getattr(self._llm, method)(**arguments)
        if method == "finish_weight_update":
            self.forget_text()

    def forget_text(self) -> None:
        """Keys and values computed with other weights must not be found again."""
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("the prefix cache is in use; requests are still inside")

    def routes(self, output: Any) -> NDArray[Any]:
        """[prompt + T - 1, L, K] in wire form: the experts each token was sent to. The last token took none."""
        assert self._layers is not None
        return from_vllm(np.asarray(output.routed_experts), self._layers)

    def close(self) -> None:
        """Free the model. In a process shared with a trainer, close the trainer after this."""
        core, self._engine, self._llm = self._engine.engine_core, None, None
        if self._is_guest:
            _leave_quietly(core.engine_core)
        else:
            core.shutdown()
        gc.collect()


def _leave_quietly(core: Any) -> None:
    """vLLM's own shutdown, but for the process group, in which the trainer of this process goes on."""
    import torch
    from vllm.distributed import parallel_state

    core.model_executor.shutdown()
    core.scheduler.shutdown()
    gc.unfreeze()
    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        parallel_state._WORLD.destroy()
    parallel_state._WORLD = None


def _tokens(token_ids_T: NDArray[np.int32]) -> dict[str, Any]:
    return {"type": "token", "prompt_token_ids": token_ids_T.tolist()}


def _moe_layers(model_path: str) -> MoeLayers:
    """The routers of the model, as the trainer counts them. Raises `ConfigError` where there are none."""
    from transformers import AutoConfig

    from modeseek_ray.routing.describe import moe_layers

    layers = moe_layers(AutoConfig.from_pretrained(model_path, local_files_only=True))
    if not len(layers):
        raise ConfigError(
            "routes can only be recorded of an MoE model.",
            param="routing_replay",
            mend="Drop routing_replay, or choose an MoE model.",
        )
    return layers
