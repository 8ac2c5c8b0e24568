"""Which GPU a worker is on. Loads nothing that an engine or a trainer would not load by itself."""

from __future__ import annotations

from modeseek_ray.errors import ConfigError


def card() -> str:
    """The UUID of this process's GPU, by which two processes know it is the same. Raises `ConfigError` without one."""
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            "weight_transfer ipc lends a GPU's memory, and this worker sees no GPU.",
            param="resources.weight_transfer",
            mend="Set it to object_store, or give workers GPUs and a CUDA build of torch (modeseek doctor).",
        )
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
