"""The benchmarks as pieces of one run: each measures side by side with its peer, in processes of its own.

A piece is a function that returns its lines. It calls the scripts beside this file with the sizes that
fit into the whole run; each script alone (`python -m tests.bench.NAME --help`) has more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from tests.bench.lines import Line, slope


@dataclass(frozen=True)
class Piece:
    """One of them. `seconds` is what it took on two cores, for the progress bar."""

    name: str
    says: str
    seconds: float
    run: Callable[[], list[Line]]


def train_step(vocabulary: int, name: str) -> list[Line]:
    """A step and its memory beside TRL's `SFTTrainer`; at 128k the slowest contenders are left out."""
    from tests.bench.train_step.__main__ import AIMS, run
    from tests.bench.train_step.contenders import CONTENDERS
    from tests.bench.train_step.workload import Case, build_model

    case = Case(vocabulary=vocabulary)
    contenders = [n for n in CONTENDERS if vocabulary < 100_000 or n in ("trl_sft", "our_sft")]
    with tempfile.TemporaryDirectory(prefix="modeseek-bench-") as scratch:
        model = build_model(case, Path(scratch) / "model")
        outcomes = {contender: run(contender, model, case) for contender in contenders}
    lines = []
    for aim in AIMS:
        if aim.over not in outcomes or aim.under not in outcomes:
            continue
        over, under = outcomes[aim.over], outcomes[aim.under]
        if aim.quantity == "memory":
            shown = [f"{o.peak_bytes / 1e9:.2f} GB" for o in (over, under)]
        else:
            shown = [f"{case.tokens_per_step / median(o.seconds):,.0f} tokens/s" for o in (over, under)]
        relation, bound = (">=" if aim.quantity == "tokens/s" else "<="), aim.bound
        what = f"{aim.name}, vocabulary {vocabulary:,}"
        lines.append(Line(name, what, *shown, aim.ratio(outcomes), relation, bound))  # type: ignore[arg-type]
    return lines


def step_growth() -> list[Line]:
    """Our training step and scorer over batches of 2, 4 and 8 samples."""
    from tests.bench.train_step.__main__ import run
    from tests.bench.train_step.workload import Case, build_model

    lines = []
    sizes = (2, 4, 8)
    with tempfile.TemporaryDirectory(prefix="modeseek-bench-") as scratch:
        model = build_model(Case(), Path(scratch) / "model")
        for contender, what in (("our_sft", "training step"), ("our_scorer", "scoring")):
            seconds = {n: median(run(contender, model, Case(batch_size=n)).seconds) for n in sizes}
            shown = ", ".join(f"{512 * n:,}: {s:.2f} s" for n, s in seconds.items())
            lines.append(Line("growth", f"{what} over tokens, log-log slope", shown, "", slope(seconds)))
    return lines


def weighing() -> list[Line]:
    """The weights of 10^3 to 10^6 samples, gamma beside bisection, and a small batch late in a job."""
    from tests.bench.weighing import gamma_root, late_in_the_job, scaling
    from tests.bench.weighing import slope as slope_from_10_000

    sizes = [10**3, 10**4, 10**5, 10**6]
    seconds = scaling(sizes)
    lines = [
        Line("weighing", f"{n:,} samples", f"{s * 1e3:.2f} ms", f"{s / n * 1e9:,.0f} ns each")
        for n, s in seconds.items()
    ]
    lines.append(
        Line("weighing", "log-log slope from 10⁴ samples", "", "", slope_from_10_000(seconds), "<=", 1.1)
    )
    root = gamma_root(10**6)
    shown = (f"{root.seconds * 1e3:.0f} ms", f"{root.bisection_seconds * 1e3:.0f} ms by 60 halvings")
    lines.append(Line("weighing", "gamma of 10⁶ samples, times faster", *shown, root.speed_up, ">=", 5.0))
    late = late_in_the_job(10**6)
    shown = (f"{late.late_seconds * 1e3:.2f} ms", f"{late.first_seconds * 1e3:.2f} ms as the job begins")
    lines.append(Line("weighing", "a batch of 64 when 10⁶ rows were met", *shown, late.ratio, "<=", 2.0))
    return lines


def rollout() -> list[Line]:
    """Tokens/s through the actor beside bare vLLM, and routes on beside off."""
    from tests.bench.rollout import Case, build_model, run_in_turns

    lines = []
    for moe in (False, True):
        case, kind = Case(moe=moe, num_prompts=12, repeats=3), "MoE" if moe else "dense"
        with tempfile.TemporaryDirectory(prefix="modeseek-bench-") as scratch:
            model = Path(scratch) / "model"
            build_model(case, model)
            names = ["bare_same", "actor", *(["actor_routes"] if moe else [])]
            found = run_in_turns(names, case, model)
        pairs = [("tokens/s over bare vLLM", "actor", "bare_same")]
        pairs += [("tokens/s, routes on over off", "actor_routes", "actor")] if moe else []
        for what, over, under in pairs:
            ratio = found[over]["tokens_per_second"] / found[under]["tokens_per_second"]
            shown = [f"{found[name]['tokens_per_second']:,.0f} tokens/s" for name in (over, under)]
            lines.append(Line("rollout", f"{what}, {kind}", *shown, ratio, ">=", 0.95))
            by_cpu = found[over]["tokens_per_cpu_second"] / found[under]["tokens_per_cpu_second"]
            lines.append(Line("rollout", f"the same by CPU time, {kind}", ratio=by_cpu))
    return lines


def sync() -> list[Line]:
    """A verified hand-over between two processes, in copies of as many bytes; three sizes for its growth.

    Beside it what of that is the proof, and what vLLM's own loader takes of the same weights: on a CPU it packs each
    matrix anew for oneDNN, so that no hand-over can be faster.
    """
    from tests.bench.rollout import Case, build_model, run

    lines, seconds = [], {}
    for width, layers, repeats in ((128, 4, 5), (512, 16, 5), (1024, 12, 2)):
        case = Case(moe=False, width=width, layers=layers, vocabulary=512, repeats=repeats)
        with tempfile.TemporaryDirectory(prefix="modeseek-bench-") as scratch:
            model = Path(scratch) / "model"
            build_model(case, model)
            found = run("sync", case, model) | (run("reload", case, model) if width == 512 else {})
        size = found["sync_bytes"]
        seconds[size] = found["sync_seconds"]
        parts = ", ".join(
            f"{part} {found[f'sync_{part}_seconds'] * 1e3:.0f}" for part in ("gather", "load", "verify")
        )
        shown = (
            f"{found['sync_seconds'] * 1e3:.0f} ms ({parts})",
            f"copy {found['copy_seconds'] * 1e3:.1f} ms",
        )
        ratio = found["sync_seconds"] / found["copy_seconds"]
        aim = ("<=", 5.0) if width == 512 else (None, None)
        lines.append(Line("sync", f"{size / 1e6:.0f} MB, copies of them", *shown, ratio, *aim))  # type: ignore[arg-type]
        for name, what in (("unproven", "without the proof"), ("reload", "vLLM's loader alone")):
            own = found.get(f"{name}_seconds")
            if own is not None:
                ratio = own / found["copy_seconds"]
                lines.append(Line("sync", f"{size / 1e6:.0f} MB, {what}", f"{own * 1e3:.0f} ms", "", ratio))
    lines.append(Line("sync", "over bytes, log-log slope", "", "", slope(seconds)))
    return lines


def online(model: str) -> list[Line]:
    """Samples/s of the whole loop beside TRL's `GRPOTrainer`, and how long the trainer waits."""
    from tests.bench.online.case import Case, model_of
    from tests.bench.online.contenders import run_one
    from tests.bench.online.table import speed_up

    case = Case.of(model)  # type: ignore[arg-type]
    names = ["trl", "ours", "ours_overlapped", *(["ours_replayed"] if model == "playground" else [])]
    with tempfile.TemporaryDirectory(prefix="modeseek-bench-") as scratch:
        path = model_of(case, Path(scratch))
        found = {name: run_one(name, case, path) for name in names}
    where = "40 M parameters" if model == "40m" else "playground"
    shown = [f"{found[name]['samples_per_second']:.2f} samples/s" for name in ("ours", "trl")]
    aim = (">=", 3.0) if model == "40m" else (None, None)
    lines = [Line("online", f"samples/s over TRL GRPO, {where}", *shown, speed_up(found), *aim)]  # type: ignore[arg-type]
    by_cpu = speed_up(found, unit="samples_per_cpu_second")
    lines.append(Line("online", f"the same by CPU time, {where}", ratio=by_cpu))
    overlapped = speed_up(found, "ours_overlapped")
    lines.append(Line("online", f"the same with max_staleness 1, {where}", ratio=overlapped))
    for name, how in (("ours", "sync, max_staleness 0"), ("ours_overlapped", "overlapped, max_staleness 1")):
        figures = found[name]
        shown = [f"{figures['samples_per_second']:.2f} samples/s", "of wall time"]
        lines.append(Line("online", f"trainer waits, {how}, {where}", *shown, figures["wait_share"]))
    figures = found["ours"]
    busy = figures["sync_seconds"] - figures["sync_drain_seconds"]
    shown = [f"{busy * 1e3:.0f} ms", f"copy {figures['copy_seconds'] * 1e3:.2f} ms"]
    lines.append(
        Line("online", f"sync in copies, one process, {where}", *shown, busy / figures["copy_seconds"])
    )
    if "ours_replayed" in found:
        per_token = found["ours_replayed"]["route_bytes_per_token"]
        lines.append(Line("online", f"routes, {where}", f"{per_token:.1f} bytes a token"))
    return lines


def service() -> list[Line]:
    """Latency of submissions and of events, and how both grow with what is stored."""
    from tests.bench.service import event_delays, submissions

    lines = []
    measured: Mapping[str, Mapping[int, list[float]]] = {
        "submission, jobs stored": submissions([50, 200, 800]),
        "event to follower, events stored": event_delays([100, 1000, 10_000]),
    }
    for what, found in measured.items():
        for size, seconds in found.items():
            p50, p99 = np.percentile(seconds, [50, 99]) * 1e3
            lines.append(Line("service", f"{what}: {size:,}", f"p50 {p50:.1f} ms", f"p99 {p99:.1f} ms"))
        medians = {size: float(np.median(seconds)) for size, seconds in found.items()}
        lines.append(Line("service", f"{what}, log-log slope", "", "", slope(medians)))
    return lines


PIECES = {
    piece.name: piece
    for piece in (
        Piece("weighing", "weights of 10³ to 10⁶ samples", 20, weighing),
        Piece("service", "submissions and events over HTTP", 30, service),
        Piece(
            "train_step",
            "training and scoring beside TRL, 32k",
            140,
            lambda: train_step(32_000, "train_step"),
        ),
        Piece(
            "train_step_128k",
            "training beside TRL, vocabulary 128k",
            150,
            lambda: train_step(128_000, "train_step_128k"),
        ),
        Piece("growth", "training and scoring over tokens", 95, step_growth),
        Piece("rollout", "vLLM through the actor, routes", 190, rollout),
        Piece("sync", "weights from trainer to engine", 105, sync),
        Piece("online", "whole loop beside TRL GRPO, 40 M", 310, lambda: online("40m")),
        Piece("playground", "whole loop beside TRL GRPO, playground", 105, lambda: online("playground")),
    )
}
