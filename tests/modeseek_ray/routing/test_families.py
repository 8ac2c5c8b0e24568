"""Recording and replaying in every MoE family of transformers, each as a tiny random model.

`models.FAMILIES` is the list; the table in modeseek_ray/routing/README.md is written from it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from modeseek_ray.errors import ModelError, RoutingError
from modeseek_ray.routing import moe_layers, record_routes, replay_routes
from modeseek_ray.routing.describe import find_routers
from tests.modeseek_ray.routing.models import FAMILIES, REFUSED, build, features, other_routes, tokens

README = Path(__file__).parents[3] / "modeseek_ray" / "routing" / "README.md"
LAYER_NUMBER = r"\.\d+\."


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@pytest.fixture
def model(family: Any) -> Iterator[Any]:
    """The family's model, without gradients of an earlier test."""
    yield family.eval()
    family.zero_grad(set_to_none=True)


def loss_of(model: Any, ids: Tensor) -> Tensor:
    return model(ids).logits.square().mean()


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def record(model: Any, ids: Tensor) -> np.ndarray:
    with torch.no_grad(), record_routes(model) as recording:
        model(ids)
    return recording.routes


def test_own_routes_change_no_bit_of_outputs_and_gradients(model: Any) -> None:
    ids = tokens()
    live = model(ids).logits
    live.square().mean().backward()
    live_gradients = gradients(model)
    model.zero_grad(set_to_none=True)

    with record_routes(model) as recording:
        recorded = model(ids).logits
    with replay_routes(model, recording.routes):
        replayed = model(ids).logits
    replayed.square().mean().backward()

    assert torch.equal(recorded, live)
    assert torch.equal(replayed, live)
    routers = find_routers(model)
    assert recording.routes.shape == (2, 5, len(routers), max(r.top_k for r in routers))
    assert gradients(model).keys() == live_gradients.keys()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, live_gradients[name]), name


def test_other_routes_are_taken_and_routers_learn_from_them(model: Any) -> None:
    ids = tokens()
    live = model(ids).logits.detach()
    other = other_routes(record(model, ids), find_routers(model))

    with replay_routes(model, other), record_routes(model) as recording:
        logits = model(ids).logits
    logits.square().mean().backward()

    assert (recording.routes == other).all()
    assert logits.isfinite().all() and not torch.equal(logits, live)
    for router in find_routers(model):
        slopes = [p.grad.abs().max() for p in router.module.parameters() if p.grad is not None]
        assert slopes and max(slopes) > 0, router


class RestlessRouters(TorchFunctionMode):
    """Routers that choose at random, another choice at every call: the worst noise there can be."""

    def __init__(self, seed: int, sizes: set[tuple[int, int]]) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)
        self._sizes = sizes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in (torch.topk, torch.Tensor.topk):
            return result
        size, k = args[0].shape[-1], result.indices.shape[-1]
        if (size, k) not in self._sizes or args[0].ndim == 4:
            return result
        rank = torch.rand(args[0].shape, generator=self._generator)
        rank[args[0] == args[0].amin(-1, keepdim=True)] = -1  # experts of groups that are not admitted
        index = rank.topk(k, dim=-1).indices
        return torch.return_types.topk((args[0].detach().gather(-1, index), index))


def two_passes(model: Any, ids: Tensor, routes: np.ndarray) -> dict[str, Tensor]:
    """Gradients of two forward passes, one replayed and one recorded, and then one backward pass."""
    sizes = {(r.num_experts, r.top_k) for r in find_routers(model)}
    model = copy.deepcopy(model).train()
    with RestlessRouters(0, sizes):
        with replay_routes(model, routes):
            one = loss_of(model, ids)
        with record_routes(model):
            two = loss_of(model, ids)
        (one + 3 * two).backward()
    return gradients(model)


def test_checkpointing_changes_no_gradient_however_restless_the_routers(model: Any) -> None:
    """Half of the replayed rows are live. What a router chose in a pass is what its recomputation asks."""
    if not model.supports_gradient_checkpointing:
        with pytest.raises(ValueError, match="does not support gradient checkpointing"):
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return
    ids = tokens()
    routes = other_routes(record(model, ids), find_routers(model))
    routes[:, ::2] = -1

    plain = two_passes(model, ids, routes)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    recomputed = two_passes(model, ids, routes)
    model.gradient_checkpointing_disable()

    assert recomputed.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(
            recomputed[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_routes_that_do_not_fit_are_refused(model: Any) -> None:
    routes = record(model, tokens())
    router = find_routers(model)[-1]
    outside = routes.copy()
    outside[-1, -1, -1, 0] = router.num_experts
    with pytest.raises(RoutingError, match=re.escape(f"{router.name} name expert {router.num_experts}")):
        replay_routes(model, outside)
    with (
        pytest.raises(RoutingError, match="did not run while routes were replayed"),
        replay_routes(model, routes),
    ):
        pass


def test_a_configuration_says_the_same_as_the_model(family: Any) -> None:
    assert moe_layers(family.config) == moe_layers(family)


@pytest.mark.parametrize("architecture", REFUSED)
def test_families_that_cannot_be_replayed_are_refused_by_name(architecture: str) -> None:
    model = build(architecture)
    with pytest.raises(ModelError, match=f"routes of {type(model).__name__} cannot be") as caught:
        record_routes(model)
    assert caught.value.code == "cannot_replay_routes"


def table() -> str:
    """The list of families as Markdown, read off the models."""
    lines = ["| `model_type` | Chooses in | Beside plain top-K |", "|---|---|---|"]
    for architecture in FAMILIES:
        model = build(architecture)
        where = {f"`{re.split(LAYER_NUMBER, r.name)[-1]}`" for r in find_routers(model)}
        lines.append(f"| `{architecture}` | {', '.join(sorted(where))} | {features(model)} |")
    for architecture in REFUSED:
        with pytest.raises(ModelError) as caught:
            record_routes(build(architecture))
        reason = caught.value.message.split(": ", 1)[1].rstrip(".")
        lines.append(f"| `{architecture}` | **refused** | {reason} |")
    return "\n".join(lines)


def test_the_table_of_families_is_this_one() -> None:
    """To mend it: `python -m tests.modeseek_ray.routing.test_families` writes it anew."""
    assert table() in README.read_text(encoding="utf-8")


def test_no_family_is_forgotten() -> None:
    """Every causal language model of transformers whose source has routers or experts is in one of the lists."""
    sources = Path(transformers.__file__).parent / "models"
    pattern = re.compile(
        r"^class \w*(?:Experts|Router|CDMoE|TopKGating|SparseMoe\w*|MoELayer|MoeBlock|MoE)\(", re.MULTILINE
    )
    known = {
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
        for name, kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
        if kind.endswith("ForCausalLM")
        and any(
            pattern.search(path.read_text(encoding="utf-8"))
            for path in (sources / model_type_to_module_name(name)).glob("modeling_*.py")
        )
    }
    listed = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] for name in (*FAMILIES, *REFUSED)}
    assert listed == known
    assert len(listed) == len(FAMILIES) + len(REFUSED)


if __name__ == "__main__":
    begin, end = (
        "<!-- families: written by tests/modeseek_ray/routing/test_families.py -->\n",
        "\n<!-- end -->",
    )
    before, rest = README.read_text(encoding="utf-8").split(begin)
    README.write_text(before + begin + table() + end + rest.split(end, 1)[1], encoding="utf-8")
