"""Model names and directories: what is found, what is refused, and what the files say."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from modeseek_ray.errors import ModelError
from modeseek_ray.jobs.models import ModelInfo, resolve_model
from modeseek_ray.jobs.paths import Home


def write_shard(path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    header = {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in tensors.items()}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "models" / "mine"
    path.mkdir(parents=True)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 100,
        "num_hidden_layers": 3,
        "hidden_size": 8,
        "max_position_embeddings": 64,
        "num_experts": 4,
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text("{}")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    write_shard(path / "model-00001-of-00002.safetensors", {"a": ("BF16", [100, 8]), "b": ("BF16", [8, 8])})
    write_shard(path / "model-00002-of-00002.safetensors", {"c": ("F32", [10])})
    return path


def change(model: Path, **config: Any) -> None:
    file = model / "config.json"
    settings = {**json.loads(file.read_text()), **config}
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


def test_what_the_files_say(model: Path) -> None:
    info = ModelInfo.read(model)
    assert info.num_parameters == 100 * 8 + 8 * 8 + 10
    assert info.dtype_bytes == 2
    assert (info.vocab_size, info.num_layers, info.hidden_size, info.max_length) == (100, 3, 8, 64)
    assert info.is_moe and info.has_chat_template
    change(model, num_experts=None)
    (model / "chat_template.jinja").unlink()
    info = ModelInfo.read(model)
    assert not info.is_moe and not info.has_chat_template


def test_a_real_model_that_transformers_wrote(tiny_moe: Path) -> None:
    from transformers import AutoModelForCausalLM

    info = ModelInfo.read(tiny_moe)
    real = AutoModelForCausalLM.from_pretrained(tiny_moe)
    assert info.num_parameters == sum(p.numel() for p in real.parameters())
    assert (info.dtype_bytes, info.is_moe, info.has_chat_template) == (4, True, True)


def refusal(path: Path) -> tuple[str, str]:
    with pytest.raises(ModelError) as caught:
        ModelInfo.read(path)
    assert caught.value.mend
    return caught.value.code, str(caught.value)


def test_pickled_weights_are_refused(model: Path) -> None:
    for shard in model.glob("*.safetensors"):
        shard.unlink()
    assert refusal(model)[0] == "model_not_found"
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    code, text = refusal(model)
    assert code == "unsafe_weights" and "pytorch_model.bin" in text


def test_own_code_is_refused(model: Path) -> None:
    change(model, auto_map={"AutoModel": "modeling.Mine"})
    assert refusal(model)[0] == "remote_code"


def test_a_missing_tokenizer_is_refused(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    assert refusal(model)[0] == "no_tokenizer"


@pytest.mark.parametrize(
    "name", ["vocab_size", "num_hidden_layers", "hidden_size", "max_position_embeddings"]
)
def test_an_incomplete_config_is_refused_by_name(model: Path, name: str) -> None:
    change(model, **{name: None})
    assert name in refusal(model)[1]


@pytest.mark.parametrize(
    "content", [b"", b"1234567", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"[]", bytes(100)]
)
def test_a_cut_weight_file_is_refused(model: Path, content: bytes) -> None:
    (model / "model-00002-of-00002.safetensors").write_bytes(content)
    assert "model-00002" in refusal(model)[1]


@pytest.mark.parametrize("content", ["", "[]", "{", "\ud800"])
def test_a_broken_config_is_refused(model: Path, content: str) -> None:
    (model / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    assert "config.json" in refusal(model)[1]


def test_names_lead_to_directories_under_the_roots_only(model: Path, tmp_path: Path) -> None:
    home, roots = Home(tmp_path / "home"), [tmp_path / "models"]
    assert resolve_model(str(model), home, roots) == model
    assert resolve_model(str(model) + "/../mine", home, roots) == model
    outside = tmp_path / "outside"
    model.rename(outside)
    (tmp_path / "models" / "link").symlink_to(outside)
    for name in (str(outside), str(tmp_path / "models" / "link"), f"{tmp_path}/models/../outside"):
        with pytest.raises(ModelError) as caught:
            resolve_model(name, home, roots)
        assert caught.value.code == "path_not_allowed"
    for name in ("outside", "Qwen/Qwen3", "models/mine", "a\0b", "https://x/y"):
        with pytest.raises(ModelError) as caught:
            resolve_model(name, home, roots)
        assert caught.value.code == "model_not_found"


def test_names_that_only_the_store_knows(model: Path, tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert resolve_model("ft:a", home, lookup={"ft:a": model}.get) == model
    with pytest.raises(ModelError, match="no model 'ft:b'"):
        resolve_model("ft:b", home, lookup={"ft:a": model}.get)
    with pytest.raises(ModelError):
        resolve_model("ft:a", home)


def test_the_playground_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="modeseek playground moe"):
        resolve_model("playground/moe", Home(tmp_path))
    with pytest.raises(ModelError):
        resolve_model("playground/../../etc", Home(tmp_path))
