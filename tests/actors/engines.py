"""vLLM engines in Ray actors, kept for all tests: each takes a quarter of a minute to start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.cluster import RayWorker
from actors.environments import generator_environment
from actors.generator import GeneratorEngine, GeneratorSpec, Request, requests_of
from modeseek_ray.types import Completion, Prompt


class OpenEngine(GeneratorEngine):
    """A generator whose weight update can be spoilt, as it would be without our mend."""

    def repack(self, whether: bool) -> None:
        """`False`: leave packed weights as vLLM's own reload leaves them on a CPU."""
        import actors.vllm_weights as weights

        if not hasattr(weights, "repacks"):
            weights.repacks = weights.repack  # type: ignore[attr-defined]
        weights.repack = weights.repacks if whether else lambda model: None  # type: ignore[attr-defined]


class Engine:
    """One engine: `call` is a method of `OpenEngine`, synchronously; `worker` is for a pool that must not end it."""

    def __init__(self, ray: Any, spec: GeneratorSpec) -> None:
        self.spec = spec
        self._ray = ray
        environment = {"env_vars": generator_environment(spec)}
        self.handle = ray.remote(OpenEngine).options(num_cpus=1, runtime_env=environment).remote(spec)
        self.facts = self.call("setup")

    def call(self, method: str, *args: Any) -> Any:
        return self._ray.get(getattr(self.handle, method).remote(*args), timeout=120)

    def sample(self, prompts: Sequence[Prompt], round_: int = 0) -> list[list[Completion]]:
        requests: list[Request] = [r for p in prompts for r in requests_of(self.spec, p, round_)]
        written = self.call("sample", requests)
        n = self.spec.sampling.samples_per_prompt
        return [written[i : i + n] for i in range(0, len(written), n)]

    async def worker(self, index: int) -> RayWorker:
        return _Kept(self.handle, f"engine {index}")


class _Kept(RayWorker):
    """An engine that was set up before and goes on afterwards."""

    async def call(self, method: str, *args: Any) -> Any:
        return {} if method == "setup" else await super().call(method, *args)

    async def stop(self) -> None:
        """Other tests use it."""


class Engines:
    """Engines by model directory, started when they are first asked for."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._engines: dict[GeneratorSpec, Engine] = {}

    def of(self, path: Path, **changes: Any) -> Engine:
        spec = GeneratorSpec(model_path=str(path), max_length=64, kv_cache_gib=0.1, **changes)
        if spec not in self._engines:
            self._engines[spec] = Engine(self._ray, spec)
        return self._engines[spec]

    def stop(self) -> None:
        for engine in self._engines.values():
            self._ray.kill(engine.handle, no_restart=True)
