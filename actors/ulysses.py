"""Attention over a sequence whose parts lie on several ranks (DeepSpeed-Ulysses, 2309.14509).

    B  samples     S  positions     C  = S / ranks, those of this rank
    H  heads       G  key-value heads     D  size of a head

Before attention each rank gives away the columns of the heads it will not compute and receives all
columns of those it will (all-to-all); behind it the other way round. The exchange is DeepSpeed's own
`DistributedAttention`, forward and backward. Its adapter for transformers (`UlyssesSPAttentionHF`) is not
used: it is made for one fixed number of samples per micro-batch, throws masks away, so that sliding windows
silently become full attention, and takes the place of "sdpa" for all models of the process for good, the
copy that is exported among them. Ours is an attention of its own name, asked for by this model alone, and
builds each layer's mask by the model's own rule, over the whole sequence.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from actors.sequence import Part, SequenceGroup
from modeseek_ray.config import Resources
from modeseek_ray.errors import ConfigError
from modeseek_ray.objectives.collate import Batch, collate
from modeseek_ray.objectives.model import ScoringModel, unwrap
from modeseek_ray.types import Sample

if TYPE_CHECKING:
    from actors.engine import ZeroEngine

ATTENTION = "modeseek_ulysses"  # what it is called in transformers' tables
# Layers in which positions meet otherwise than by attention are not exchanged: theirs would run over a part alone.
_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
# Largest (float32) or median (bfloat16, where a few tokens may ask other experts) relative difference of a
# hidden state from that of a whole pass. Positions that do not meet are off by far more.
_TOLERANCE = {"float32": 5e-4, "bfloat16": 5e-2}
_PROBE_POSITIONS = 4  # a rank


def parallelise(module: ScoringModel, resources: Resources, group: SequenceGroup) -> None:
    """Make the model attend over all columns of the group, in place. Nothing to do for a group of one.

    Raises `ConfigError` for a model that cannot.
    """
    if group.size == 1:
        return
    causal_lm = unwrap(module.model)
    _refuse(causal_lm, resources)
    attention = _Attention(group, resources)
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention.forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, attention.mask)
    causal_lm.set_attn_implementation(ATTENTION)
    if causal_lm.base_model.config._attn_implementation != ATTENTION:
        raise _refused(causal_lm, "does not take its attention from transformers' table")


class _Attention:
    """What transformers calls in the place of "sdpa"."""

    def __init__(self, group: SequenceGroup, resources: Resources) -> None:
        self._size = group.size
        self._resources = resources
        self._exchange = DistributedAttention(_attend, group.process_group, scatter_idx=2, gather_idx=1)

    def forward(
        self,
        module: nn.Module,
        query_BHCD: Tensor,
        key_BGCD: Tensor,
        value_BGCD: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As `sdpa_attention_forward`, over this rank's columns: [B, C, H, D], and no weights."""
        heads, pairs = query_BHCD.shape[1], key_BGCD.shape[1]
        self._resources.check_heads(heads)  # configurations give the heads of most layers, not of all
        # Fewer key-value heads than ranks, or heads that do not divide: each is sent to all that need it.
        copies = int(np.lcm(pairs, self._size)) // pairs
        if copies > 1:
            key_BGCD = key_BGCD.repeat_interleave(copies, dim=1)
            value_BGCD = value_BGCD.repeat_interleave(copies, dim=1)
        context_BCHD: Tensor = self._exchange(
            query_BHCD.transpose(1, 2),
            key_BGCD.transpose(1, 2),
            value_BGCD.transpose(1, 2),
            0,  # the dimension of samples
            attention_mask=attention_mask,
            is_causal=getattr(module, "is_causal", True),
            **{k: v for k, v in kwargs.items() if k != "is_causal"},
        )
        return context_BCHD.contiguous(), None

    def mask(self, *, q_length: int, kv_length: int, **kwargs: Any) -> Tensor | None:
        """The model's own mask, over the whole sequence; None where plain causality is all of it. A window is
        held as [S, S] booleans, on every rank, as sdpa has it."""
        mask: Tensor | None = sdpa_mask(
            q_length=q_length * self._size, kv_length=kv_length * self._size, **kwargs
        )
        return mask


def _attend(
    query_BShD: Tensor, key_BSgD: Tensor, value_BSgD: Tensor, *, is_causal: bool, **kwargs: Any
) -> Tensor:
    """Over all columns, for this rank's h = H / ranks heads."""
    groups = query_BShD.shape[2] // key_BSgD.shape[2]
    context_BShD, _ = sdpa_attention_forward(
        SimpleNamespace(num_key_value_groups=groups, is_causal=is_causal),  # type: ignore[arg-type]
        query_BShD.transpose(1, 2),
        key_BSgD.transpose(1, 2),
        value_BSgD.transpose(1, 2),
        **kwargs,
    )
    return context_BShD


# --- refusing what would silently be wrong


class Probe(NamedTuple):
    """A few tokens, and what the whole model makes of them."""

    batch: Batch
    hidden_MD: Tensor


@torch.no_grad()
def probe(module: ScoringModel, group: SequenceGroup) -> Probe | None:
    """Hidden states of a pass over whole sequences, one of them padded. Before `parallelise`, every rank by itself."""
    if group.size == 1:
        return None
    longest = _PROBE_POSITIONS * group.size
    vocabulary = unwrap(module.model).config.get_text_config().vocab_size
    rng = np.random.default_rng(0)
    samples = [
        Sample(
            row=row,
            token_ids_T=rng.integers(0, vocabulary, length).astype(np.int32),
            trained_T=np.arange(length) > 0,
        )
        for row, length in enumerate((longest, longest - 1))
    ]
    batch = collate(samples, range(2), pad_id=0, multiple_of=group.size)
    device = next(module.parameters()).device
    was_training = module.training
    module.eval()
    scores = module(*Part(group, batch, batch.to(device)).inputs, keep_hidden=True)
    module.train(was_training)
    return Probe(batch, scores.hidden_M.cpu())


@torch.no_grad()
def verify(module: ScoringModel, engine: ZeroEngine, group: SequenceGroup, expected: Probe | None) -> None:
    """Compare with `probe`, now that the sequence is shared. Collective over all ranks.

    Raises `ConfigError` on every rank where the hidden states differ: the architecture lets positions meet
    somewhere else than in the attention that is exchanged.
    """
    if expected is None:
        return
    part = group.part(expected.batch.to(engine.device))
    was_training = module.training
    module.eval()
    scores = module(*part.inputs, keep_hidden=True)
    module.train(was_training)
    hidden_mD = part.of_tokens(expected.hidden_MD.to(engine.device)).float()
    largest = expected.hidden_MD.float().abs().max()
    off_m = (scores.hidden_M.float() - hidden_mD).abs().amax(1) / largest.to(engine.device)
    off = float(off_m.max() if engine.dtype == "float32" else off_m.median()) if len(off_m) else 0.0
    worst = max(engine.collect(off), key=lambda value: np.inf if np.isnan(value) else value)
    if not worst <= _TOLERANCE[engine.dtype]:
        raise _refused(
            unwrap(module.model),
            f"computes something else from a sequence in parts than from the whole ({worst:.2g} relative)",
        )


def _refuse(causal_lm: Any, resources: Resources) -> None:
    config = causal_lm.base_model.config.get_text_config()
    resources.check_heads(getattr(config, "num_attention_heads", 0))
    if config._attn_implementation != "sdpa":
        raise _refused(causal_lm, f"computes attention by {config._attn_implementation}, not by sdpa")
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYERS)
    if others:
        raise _refused(causal_lm, f"has layers of {', '.join(others)}, in which positions meet unexchanged")
    for name, submodule in causal_lm.named_modules():
        kinds = getattr(submodule, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            # Their frequencies follow the longest position that is seen, and parts see different ones.
            if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
                raise _refused(causal_lm, f"scales its positions by the length of a pass ({kind}, {name})")


def _refused(causal_lm: Any, why: str) -> ConfigError:
    return ConfigError(
        f"{type(causal_lm).__name__} cannot share a sequence between ranks: it {why}.",
        param="resources.sequence_parallel",
        mend="Set it to 1, or choose another model.",
    )
