"""From a model's name to its directory, and what its files say about it. No torch.

Only directories with safetensors weights and a tokenizer are usable. Pickled weights run code when
loaded, and so does a model that brings its own classes; both are refused.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeseek_ray.errors import ModelError
from modeseek_ray.jobs.paths import Home, allowed_path

Lookup = Callable[[str], Path | None]

_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K_KEYS = ("num_experts_per_tok", "moe_topk", "moe_k", "num_selected_experts")
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class ModelInfo:
    """What a Hugging Face directory says about its model."""

    path: Path
    architecture: str
    num_parameters: int
    dtype_bytes: int  # per stored parameter, of the most common type
    vocab_size: int
    num_layers: int
    hidden_size: int
    max_length: int  # positions
    num_experts: int  # 0 = dense
    has_chat_template: bool
    num_expert_parameters: int = 0  # of all experts together
    experts_per_token: int = 0
    kv_values: int = 0  # values an engine keeps per position: keys and values of all layers
    tied_head: bool = False  # the embedding is the head, and stored once
    num_heads: int = 0  # of attention, in most layers; 0 = the files do not say

    @property
    def num_active_parameters(self) -> int:
        """Those that a position is multiplied with, the head left out: experts that are asked, no embedding."""
        unused = self.num_expert_parameters
        if self.num_experts:
            unused -= self.num_expert_parameters * self.experts_per_token // self.num_experts
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_head else 2)
        return max(0, self.num_parameters - unused - embeddings)

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 1

    @classmethod
    def read(cls, path: Path) -> ModelInfo:
        """Read `config.json` and the headers of the weight files. Raises `ModelError`."""
        config = _config(path)
        text_config = (
            {**config, **config["text_config"]} if isinstance(config.get("text_config"), dict) else config
        )
        if "auto_map" in config:
            raise ModelError(
                "brings its own code (`auto_map`), which is never run here.",
                file=str(path / "config.json"),
                mend="Use a model whose architecture transformers has itself.",
                code="remote_code",
            )
        if not (path / "tokenizer.json").is_file():
            raise ModelError(
                "there is no tokenizer.json.",
                file=str(path),
                mend="Save the fast tokenizer beside the model: tokenizer.save_pretrained(directory).",
                code="no_tokenizer",
            )
        num_parameters, num_expert_parameters, dtype_bytes = _count_parameters(path)
        try:
            return cls(
                path=path,
                architecture=str((config.get("architectures") or ["unknown"])[0]),
                num_parameters=num_parameters,
                dtype_bytes=dtype_bytes,
                vocab_size=int(text_config["vocab_size"]),
                num_layers=int(text_config["num_hidden_layers"]),
                hidden_size=int(text_config["hidden_size"]),
                max_length=int(text_config["max_position_embeddings"]),
                num_experts=next((int(text_config[k]) for k in _EXPERT_KEYS if text_config.get(k)), 0),
                has_chat_template=_has_chat_template(path),
                num_expert_parameters=num_expert_parameters,
                experts_per_token=next((int(text_config[k]) for k in _TOP_K_KEYS if text_config.get(k)), 0),
                kv_values=_kv_values(text_config),
                tied_head=bool(
                    text_config.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
                ),
                num_heads=int(text_config.get("num_attention_heads") or 0),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ModelError(
                f"says nothing usable about {error}.",
                file=str(path / "config.json"),
                mend="Only causal language models in Hugging Face's format can be trained.",
            ) from None


def resolve_model(name: str, home: Home, roots: Sequence[Path] = (), lookup: Lookup | None = None) -> Path:
    """The directory of a model, checked.

    `name` is `playground/moe` or `playground/dense`, an `ft:` name that `lookup` knows, or a
    directory under one of `roots`. Raises `ModelError` that says what would work.
    """
    if name.startswith("playground/"):
        path = _playground(name, home)
    elif name.startswith("ft:"):
        found = lookup(name) if lookup is not None else None
        if found is None:
            raise ModelError(
                f"there is no model {name!r}.",
                mend="List the models to see their names.",
                code="model_not_found",
            )
        path = found
    else:
        path = _under_roots(name, roots, home)
    ModelInfo.read(path)
    return path


def _playground(name: str, home: Home) -> Path:
    from modeseek_ray.playground import locate

    kind = name.removeprefix("playground/")
    path = locate(kind, home.storage)
    if path is None:
        raise ModelError(
            f"{name} has not been built on this machine yet.",
            mend=f"Run `modeseek playground {kind}` (some minutes, once).",
            code="model_not_found",
        )
    return path


def _under_roots(name: str, roots: Sequence[Path], home: Home) -> Path:
    """Symbolic links are followed before the comparison, those of the directory's files too: none leads out."""
    if "\0" in name or not Path(name).expanduser().is_absolute():
        raise ModelError(
            f"{name!r} is not a model that is known here.",
            mend="Give playground/moe, an ft: model, or the full path of a Hugging Face directory.",
            code="model_not_found",
        )
    path = allowed_path(Path(name).expanduser(), roots, home)
    files = path.iterdir() if path is not None and path.is_dir() else iter(())
    if path is None or not all(allowed_path(file, roots, home) for file in files):
        listed = ", ".join(str(root) for root in roots) or "none is set"
        raise ModelError(
            f"{name} is not under an allowed root ({listed}).",
            mend="Move it there, or start the service with --root DIRECTORY.",
            code="path_not_allowed",
        )
    return path


def _config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(
            "is not a Hugging Face model directory: there is no config.json.",
            file=str(path),
            mend="Give the directory that save_pretrained wrote.",
            code="model_not_found",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot be read: {error}.", file=str(file), mend="Save the model again.") from None
    if not isinstance(config, dict):
        raise ModelError("is not a JSON object.", file=str(file), mend="Save the model again.")
    return config


def _kv_values(config: dict[str, Any]) -> int:
    """2 L (key and value heads) (head size); as if every layer had full attention."""
    heads = int(config.get("num_attention_heads") or 0)
    if not heads:
        return 0
    size = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    return 2 * int(config["num_hidden_layers"]) * int(config.get("num_key_value_heads") or heads) * size


def _count_parameters(path: Path) -> tuple[int, int, int]:
    """All parameters, those of experts, and the bytes of one."""
    shards = sorted(path.glob("*.safetensors"))
    if not shards:
        pickled = next((p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern)), None)
        found = f"only pickled weights ({pickled})" if pickled else "no weights"
        raise ModelError(
            f"there are {found}; safetensors are needed.",
            file=str(path),
            mend="Save it with save_pretrained(directory, safe_serialization=True).",
            code="unsafe_weights" if pickled else "model_not_found",
        )
    by_type: dict[str, int] = {}
    in_experts = 0
    for shard in shards:
        for name, tensor in _header(shard).items():
            if isinstance(tensor, dict) and "shape" in tensor:
                dtype, count = str(tensor.get("dtype")), _num_values(tensor["shape"], shard)
                by_type[dtype] = by_type.get(dtype, 0) + count
                in_experts += count if ".experts." in name else 0
    if not by_type:
        raise ModelError("there are no tensors in it.", file=str(shards[0]), mend="Save the model again.")
    return sum(by_type.values()), in_experts, _DTYPE_BYTES.get(max(by_type, key=lambda t: by_type[t]), 4)


def _num_values(shape: Any, shard: Path) -> int:
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        raise ModelError(f"a tensor has the shape {str(shape)[:64]}.", file=str(shard), mend="Save it again.")
    return math.prod(shape)


def _header(shard: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file: its length as 8 bytes little-endian, then itself."""
    try:
        with shard.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is not an object")
    except (OSError, ValueError, RecursionError, struct.error) as error:
        raise ModelError(
            f"is not a whole safetensors file: {error}.", file=str(shard), mend="Copy or save it again."
        ) from None
    return header


def _has_chat_template(path: Path) -> bool:
    if (path / "chat_template.jinja").is_file() or (path / "chat_template.json").is_file():
        return True
    try:
        settings = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(settings, dict) and bool(settings.get("chat_template"))
