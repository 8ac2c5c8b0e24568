"""The values that travel between the parts: frozen, numpy, small.

Legend of the shape suffixes, here and everywhere:

    N  samples of a batch or group      T  tokens of one sample
    P  prompts                          L  MoE layers       K  experts per token

Log-probabilities are in nats. `log_policy_N` and its sisters are summed over a sample's *trained*
tokens; tokens and per-token values stay behind a `Handle`, so that the driver stays small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class Prompt:
    """What a generator is asked to continue.

    >>> Prompt(ordinal=0, token_ids_T=np.array([1, 5, 9])).token_ids_T.shape
    (3,)
    """

    ordinal: int  # position in the prompt file; with job and round it fixes the sampling seed
    token_ids_T: NDArray[np.int32]
    reference: Mapping[str, Any] = field(default_factory=dict)  # the row's fields, for graders


@dataclass(frozen=True)
class Completion:
    """What a generator wrote for a prompt, and how: everything training needs, nothing re-tokenised.

    >>> c = Completion(token_ids_T=np.array([4, 2]), log_prob_T=np.array([-0.1, -0.7]), finish_reason="stop",
    ...                weight_version=3, seed=11)
    >>> c.num_tokens
    2
    """

    token_ids_T: NDArray[np.int32]  # written tokens, the end token included where it was written
    log_prob_T: NDArray[np.float32]  # under the distribution they were really drawn from, nats
    finish_reason: Literal["stop", "length"]
    weight_version: int  # of the weights that wrote all of it
    seed: int  # fixed by (job, prompt ordinal, round, which of the N)
    routes_TLK: NDArray[Any] | None = None  # [prompt + T - 1, L, K] experts, wire form of `routing.wire`

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids_T)


@dataclass(frozen=True)
class Sample:
    """One tokenised row: prompt and response in one sequence. Lives behind a `Handle`.

    `trained_T[t]` says that token t is predicted and trained on; `trained_T[0]` is always False,
    because nothing predicts the first token.

    >>> s = Sample(row=7, token_ids_T=np.array([1, 5, 9, 2]), trained_T=np.array([False, False, True, True]))
    >>> s.num_tokens, s.length
    (2, 4)
    """

    row: int  # stable id of the row within its file: the line or record number, counted from 0
    token_ids_T: NDArray[np.int32]
    trained_T: BoolArray
    prior: float = 1.0
    reward: float | None = None
    group: int = -1  # rows of one prompt share it; -1 = a group of its own
    log_behavior: float | None = None  # under the sampler that wrote it, summed over trained tokens
    log_behavior_T: NDArray[np.float32] | None = None  # the same per token; 0 where not trained
    is_replay: bool = False
    task: str = ""  # label for breaking evaluation down, as the data file names it
    problem: int = -1  # rows that are right answers to the same question share it; -1 = nothing to get right
    weight_version: int = -1  # of the weights that wrote it; -1 = imported
    routes_TLK: NDArray[Any] | None = None  # [length - 1, L, K] experts the sampler took, wire form
    start_routes_TLK: NDArray[Any] | None = None  # the same of pi_0, where the policy is scored under them

    @property
    def num_tokens(self) -> int:
        """Trained tokens: T_i of METHODS.md."""
        return int(self.trained_T.sum())

    @property
    def length(self) -> int:
        """All tokens, trained or not: what a forward pass costs."""
        return len(self.token_ids_T)


@dataclass(frozen=True)
class Handle:
    """Where the tokens of a group are: samples `index_N` of `block`.

    `block` is a list of `Sample` in local mode and a Ray object reference in a cluster. Only a
    pool hands it on; the driver never looks inside.
    """

    block: Any
    index_N: IntArray


@dataclass(frozen=True)
class Group:
    """The samples of one prompt, never split across batches: small columns and a payload handle.

    Columns a job does not need stay None and are never computed.

    >>> g = Group(prompt=0, row_N=np.array([7]), num_tokens_N=np.array([2]), length_N=np.array([4]),
    ...           payload=Handle(block=[], index_N=np.array([0])))
    >>> len(g)
    1
    """

    prompt: int
    row_N: IntArray
    num_tokens_N: IntArray
    length_N: IntArray
    payload: Handle
    prior_N: FloatArray | None = None
    is_replay_N: BoolArray | None = None
    rewards_N: FloatArray | None = None  # NaN = this row has no reward
    log_policy_N: FloatArray | None = None
    log_reference_N: FloatArray | None = None
    log_behavior_N: FloatArray | None = None
    sum_delta_N: FloatArray | None = None
    distance_N: FloatArray | None = None
    log_round_N: FloatArray | None = None
    weight_version_N: IntArray | None = None

    def __len__(self) -> int:
        return len(self.row_N)

    def with_columns(self, **columns: FloatArray | IntArray) -> Group:
        """A copy with some columns filled in."""
        return replace(self, **columns)  # type: ignore[arg-type]

    def take(self, index_N: IntArray) -> Group:
        """Some of its samples, every column and the handle alike."""
        columns = {
            f.name: column[index_N]
            for f in fields(self)
            if isinstance(column := getattr(self, f.name), np.ndarray)
        }
        payload = replace(self.payload, index_N=self.payload.index_N[index_N])
        return replace(self, payload=payload, **columns)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Evidence:
    """What `weigh` looks at: one entry per sample of the global batch.

    Log-probabilities are nats, summed over a sample's trained tokens; columns a weighting does not
    need may be None.

    >>> Evidence(log_policy_N=np.array([0., 1.]), log_reference_N=np.zeros(2), num_tokens_N=np.ones(2)).size
    2
    """

    log_policy_N: FloatArray | None  # log pi_theta(y|x)
    log_reference_N: FloatArray | None  # log pi_0(y|x), the frozen start
    num_tokens_N: IntArray | FloatArray
    log_behavior_N: FloatArray | None = None  # log mu-hat(y|x): an SFT checkpoint, or the sampler's own
    rewards_N: FloatArray | None = None  # NaN = no reward for this row
    group_N: IntArray | None = None  # equal numbers = same prompt
    prior_N: FloatArray | None = None  # a_i, default 1
    row_N: IntArray | None = None  # stable row ids, for moving averages and the ledger
    sum_delta_N: FloatArray | None = (
        None  # sum over tokens of (ratio_t - 1), the ratio being the weighting's `of`
    )
    distance_N: FloatArray | None = None  # KL(pi_0 || pi) of each sample, nats per trained token
    log_round_N: FloatArray | None = None  # log pi_k(y|x), the policy frozen when this round of fitting began
    is_replay_N: BoolArray | None = None

    @property
    def size(self) -> int:
        return len(self.num_tokens_N)

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Evidence:
        """Concatenate the columns of a global batch. A column missing in any group is None."""

        def column(name: str) -> Any:
            parts = [getattr(g, name) for g in groups]
            return None if any(p is None for p in parts) else np.concatenate(parts)

        return cls(
            group_N=np.repeat(np.arange(len(groups)), [len(g) for g in groups]),
            **{f.name: column(f.name) for f in fields(cls) if f.name != "group_N"},
        )


@dataclass(frozen=True)
class Weights:
    """What `weigh` returns: one number per sample and what decided it.

    >>> weights = Weights(values_N=np.ones(2), gamma=0.0, beta=None, ess_ratio=1.0, bound_by="noise")
    >>> float(weights.values_N.mean())
    1.0
    """

    values_N: FloatArray  # v_i, mean one over new rows and over the batch (unless normalise: false)
    gamma: float | None  # None where the weighting has no likelihood factor
    beta: float | None  # None where the weighting has no reward factor with a temperature
    ess_ratio: float  # (sum v)^2 / (n sum v^2) of the final v over new rows
    # What decided gamma: "fixed", "ess", "cap", "warmup", "noise", "schedule", "kl_budget", "bias_variance", "none".
    bound_by: str
    # Controller state, JSON-serialisable: hand it back next time.
    state: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)  # flat names; METHODS.md section 7
    warnings: tuple[str, ...] = ()
    # The loss whose gradient the weights give, where it is not the weighted NLL itself (preference pairs).
    loss: float | None = None
    token_parameters: Mapping[str, float] = field(
        default_factory=dict
    )  # of the token factor, from this batch


@dataclass(frozen=True)
class RatioClip:
    """Staleness: what becomes of rho_t = pi_theta / pi_old (METHODS.md section 4).

    `ppo`: c_t = rho_t 1[rho_t <= 1 + high] for v > 0, rho_t 1[rho_t >= 1 - low] for v < 0; `clamp`:
    rho_t kept within [1 - low, 1 + high]. `sequence` takes one ratio a sample, exp(mean_t log rho_t).
    """

    scheme: Literal["ppo", "clamp"] = "ppo"
    low: float = 0.2
    high: float = 0.27
    level: Literal["token", "sequence"] = "token"


@dataclass(frozen=True)
class Mismatch:
    """Trainer against engine: pi_old(trainer) / pi_sampler(engine), a detached factor beside the clip.

    `tis`: min(ratio, high); `mis`: the ratio, and zero outside [low, high]. `sequence` takes one
    ratio a sample, exp(mean_t log ratio_t).
    """

    scheme: Literal["tis", "mis"] = "tis"
    low: float = 0.5
    high: float = 2.0
    level: Literal["token", "sequence"] = "token"


@dataclass(frozen=True)
class Objective:
    """What the trainer minimises, fixed for the whole job. It knows nothing of sample weighting.

    >>> Objective().aggregation
    'token'
    """

    aggregation: Literal["token", "sequence", "sum"] = "token"
    token_factor: str = "none"  # a name in modeseek_ray.objectives.parameters
    token_parameters: Mapping[str, float] = field(default_factory=dict)
    kl_direction: Literal["forward", "reverse"] | None = None
    temperature: float = 1.0  # logits are divided by it, as the sampler did
    clip: RatioClip | None = None
    mismatch: Mismatch | None = None
    # MoE: whose routes the policy's forward passes take. R3 = the sampler's (they come with the samples),
    # R2 = the trainer's own under the policy the batch began with, None = live. R0 = those of pi_0, in the
    # passes that score a batch for its weights; steps and evaluations are live.
    routing_replay: Literal["R0", "R2", "R3"] | None = None
    router_aux_loss_coef: float = 0.0  # MoE: of the load-balancing loss (`routing.balance`)
    # Whose token ratios `begin` sums up to Evidence.sum_delta_N: the weighting's own `of`; None = nobody asks.
    delta_of: Literal["policy_over_initial", "initial_over_policy", "policy_over_data"] | None = None
    sample_kl: bool = False  # `begin` measures each sample's KL to pi_0, Evidence.distance_N

    @property
    def looks_back(self) -> bool:
        """Whether steps need what the policy was when the batch began: `Trainer.begin`."""
        return (
            self.clip is not None
            or self.mismatch is not None
            or self.routing_replay == "R2"
            or self.token_factor == "psft"
            or self.delta_of is not None
            or self.sample_kl
        )

    @property
    def delta_over_start(self) -> bool:
        """Whether those token ratios are taken against pi_0."""
        return self.delta_of in ("policy_over_initial", "initial_over_policy")


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: a number per sample, in the order of the groups handed to `step`.

    loss = - sum_i values_N[i] * sum_t c_it log pi(y_it) / denominator. With `token` aggregation the
    denominator is the number of trained tokens of the global batch; with `sequence` it is n and the
    inner sum is divided by T_i; with `sum` it is n and the inner sum stays whole.

    >>> StepPlan(step=0, values_N=np.ones(2), denominator=6.0, learning_rate=1e-5).kl_coefficient
    0.0
    """

    step: int
    values_N: FloatArray
    denominator: float
    learning_rate: float
    kl_coefficient: float = 0.0
    # What the token factor takes from this batch as a whole, over `Objective.token_parameters`.
    token_parameters: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did, over the global batch (sums over ranks, divided once).

    >>> StepReport(step=0, loss=2.0, nll=2.0, accuracy=.5, grad_norm=1., learning_rate=1e-5, num_tokens=6).num_tokens
    6
    """

    step: int
    loss: float  # as minimised: weighted, with regularisers
    nll: float  # unweighted mean negative log-probability per trained token, nats
    accuracy: float  # share of trained tokens that are the argmax
    grad_norm: float  # global, before clipping
    learning_rate: float
    num_tokens: int  # trained tokens
    num_padded: int = 0  # positions that were padding, of all positions computed
    num_positions: int = 0
    grad_norm_clipped: float | None = None  # global, as the optimizer got it
    kl_nats: float | None = None
    entropy: float | None = None  # of the policy, mean over trained tokens, nats
    seconds: Mapping[str, float] = field(default_factory=dict)  # by part: score, forward, backward, optimizer
    figures: Mapping[str, float] = field(default_factory=dict)  # more of METHODS.md section 7, flat names


@dataclass(frozen=True)
class EvalReport:
    """One evaluation of a file under the current policy.

    `accuracy` is the share of problems whose greedy answer is right: an answer is what greedy
    decoding writes exactly when each of its tokens is the argmax given those before it, so each
    accepted answer is checked in one forward pass and no text is generated.

    >>> EvalReport(nll=1.0, token_accuracy=.5, num_tokens=10).kl_nats is None
    True
    """

    nll: float  # per trained token, nats, over each problem's first answer
    token_accuracy: float
    num_tokens: int
    accuracy: float | None = None  # greedy exact match over problems; None where the file has none
    entropy: float | None = None  # of the policy, mean over trained tokens, nats
    kl_nats: float | None = None  # forward KL(pi_0 || pi) per trained token, exact vocabulary sum
    kl_reverse_nats: float | None = None  # KL(pi || pi_0), likewise
    by_task: Mapping[str, EvalReport] = field(default_factory=dict)
