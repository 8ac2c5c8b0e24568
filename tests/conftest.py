"""What tests share: small models, the playground, one Ray cluster, free ports.

The environment is set here, before anything heavy is imported, so that a bare `pytest` sees the
same machine as `make test`: CPU only, no downloads, one thread per process (tests start many).
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, settings

from tests.forks import environ, zygote

# How long an example takes measures whoever else uses the machine.
settings.register_profile("any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")

ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HEADS_FOR_VLLM = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


@pytest.fixture(scope="session")
def modeseek_home() -> Path:
    """Where the playground's models are cached between runs."""
    home = Path(os.environ.get("MODESEEK_HOME", Path.home() / ".modeseek"))
    home.mkdir(parents=True, exist_ok=True)
    return home


@pytest.fixture(scope="session")
def playground_moe(modeseek_home: Path) -> Path:
    """The playground's MoE model: a Hugging Face directory. Built (minutes) where it is not cached."""
    return _playground("moe", modeseek_home)


@pytest.fixture(scope="session")
def playground_dense(modeseek_home: Path) -> Path:
    """The playground's dense model."""
    return _playground("dense", modeseek_home)


def _playground(kind: str, home: Path) -> Path:
    """Built in a process of its own, with all the machine's threads; `make test` has done so before."""
    from modeseek_ray.playground import locate

    found = locate(kind, home)
    if found is None:
        command = [sys.executable, "-m", "modeseek_ray.playground", kind, "--home", str(home), "--quiet"]
        threads = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        subprocess.run(command, check=True, env=threads)
        found = locate(kind, home)
    assert found is not None
    return found


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE: 2 layers, 4 experts of which 2 are asked, width 32, byte-level tokenizer."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return save_tiny(
        tmp_path_factory.mktemp("tiny") / "moe",
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        decoder_sparse_step=1,
        norm_topk_prob=True,
    )


@pytest.fixture(scope="session")
def vllm_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_moe` with heads of 32, the smallest vLLM has CPU kernels for, after a dense first layer."""
    return _vllm_moe(tmp_path_factory.mktemp("vllm") / "moe", initializer_range=0.2)


@pytest.fixture(scope="session")
def quiet_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`vllm_moe` with weights a quarter as large: experts that are mixed up move log-probabilities by .15 at most."""
    return _vllm_moe(tmp_path_factory.mktemp("vllm") / "quiet", initializer_range=0.05)


def _vllm_moe(directory: Path, initializer_range: float) -> Path:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return save_tiny(
        directory,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        num_hidden_layers=3,
        mlp_only_layers=[0],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        decoder_sparse_step=1,
        norm_topk_prob=True,
        initializer_range=initializer_range,
        **HEADS_FOR_VLLM,
    )


@pytest.fixture(scope="session")
def vllm_dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_dense` with heads of 32 and a tied output layer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return save_tiny(
        tmp_path_factory.mktemp("vllm") / "dense",
        Qwen3Config,
        Qwen3ForCausalLM,
        tie_word_embeddings=True,
        initializer_range=0.2,
        **HEADS_FOR_VLLM,
    )


@pytest.fixture(scope="session")
def tiny_dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3: 2 layers, width 32, byte-level tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return save_tiny(tmp_path_factory.mktemp("tiny") / "dense", Qwen3Config, Qwen3ForCausalLM)


def save_tiny(directory: Path, config_class: Any, model_class: Any, **more: Any) -> Path:
    import torch

    tokenizer = byte_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "dtype": "float32",
    }
    config = config_class(**{**settings, **more})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model_class(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def byte_tokenizer() -> Any:
    """One token per byte, five special tokens, a chat template: 261 entries, nothing learnt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL_TOKENS[2:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
    )


def head_of(path: Path, rows: int, directory: Path) -> Path:
    """The first rows of a data file, as a file: most of a tiny job's time would go into the rest."""
    short = directory / path.name
    short.write_text(
        "".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:rows]), encoding="utf-8"
    )
    return short


@pytest.fixture(scope="session")
def forks() -> Iterator[dict[str, str]]:
    """The environment in which Ray's workers and `modeseek` commands are forks, seconds faster to start."""
    with zygote("--engines") as environment:
        yield environment


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory, forks: dict[str, str]) -> Iterator[Any]:
    """One Ray for the whole run: eight CPUs on paper (the cores are over-committed), token authentication."""
    import ray

    token = tmp_path_factory.mktemp("ray") / "token"
    token.touch(mode=0o600)
    token.write_text("0123456789abcdef" * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        with environ(forks):
            ray.init(
                num_cpus=8, include_dashboard=False, log_to_driver=False, object_store_memory=256 * 2**20
            )
        yield ray
        ray.shutdown()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Callable[[], str]]:
    """A real PostgreSQL, started from a wheel on a socket of its own. A function: the URL of a new database."""
    import pgserver

    # As root the wheel runs it as another user, who could not enter pytest's own directories.
    server = pgserver.get_server(Path(tempfile.mkdtemp(prefix="pg-")), cleanup_mode="delete")
    names = (f"store_{i}" for i in itertools.count())

    def create() -> str:
        name = next(names)
        server.psql(f"CREATE DATABASE {name};")
        url: str = server.get_uri(database=name)
        return url

    yield create
    # What is about to be removed need not be flushed, which would take half a minute.
    process = psutil.Process(server.get_pid())
    process.send_signal(signal.SIGQUIT)
    process.wait(30)
    server.cleanup()


@pytest.fixture
def free_port() -> Callable[[], int]:
    """A function that names a TCP port nobody listens on now. Use it at once: nothing reserves it."""
    from actors.network import free_port

    return free_port
