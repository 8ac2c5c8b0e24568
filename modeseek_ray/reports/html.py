"""The HTML report: one self-contained file per job, and one that compares several.

No scripts, no requests to anywhere; the same result directory gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from modeseek_ray.errors import ConfigError
from modeseek_ray.reports import figures
from modeseek_ray.reports.distribution import read_distribution
from modeseek_ray.reports.every_figure import every_figure, every_text
from modeseek_ray.reports.figures import FigureView
from modeseek_ray.reports.results import Metrics
from modeseek_ray.reports.rows import Texts, ledger_view, steering_of
from modeseek_ray.reports.summary import JobSummary, summarize
from modeseek_ray.reports.weight_figures import weight_bands, weight_ridges
from modeseek_ray.retention import TaskChange, retention_at_success

HEADLINE_SUCCESS = 0.9


def write_report(result_dir: Path, out: Path, texts: Texts | None = None) -> Path:
    """Write the report of one job, finished or still running, and return its path.

    `texts` are the training rows' texts, or the training file to look them up in by row number.
    Raises `StorageError` if `result_dir` is not a job's.
    """
    summary = summarize(result_dir)
    course, ledger = read_distribution(result_dir)
    metrics = summary.metrics
    page = render(
        "job.html.jinja",
        summary=summary,
        verdict=verdict(summary),
        facts=_facts(summary),
        outcome=_present(
            figures.paths({summary.name: metrics}),
            figures.retention(metrics),
            figures.kl(metrics),
            figures.parameter_distance(metrics),
        ),
        training=_present(
            figures.loss(metrics),
            figures.ess(metrics),
            figures.exponent(metrics, "gamma"),
            figures.exponent(metrics, "beta"),
            figures.entropy(metrics),
            figures.gradient_norm(metrics),
        ),
        weighting=_present(weight_bands(course), weight_ridges(course)),
        ledger=ledger_view(ledger, texts, steering_of(summary.record.config)),
        every_figure=every_figure(metrics),
        every_text=every_text(metrics),
        config=json.dumps(summary.record.config, indent=2, ensure_ascii=False, default=str),
    )
    return write_page(out, page)


def write_comparison(result_dirs: Sequence[Path], out: Path) -> Path:
    """Write one page that compares several jobs, in the order given. Raises `StorageError`, `ConfigError`."""
    if not result_dirs:
        raise ConfigError("there is nothing to compare.", mend="Name at least one job.")
    jobs = _distinct([summarize(directory) for directory in result_dirs])
    metrics = {name: summary.metrics for name, summary in jobs.items()}
    page = render(
        "comparison.html.jinja",
        jobs=jobs,
        tasks=list(dict.fromkeys(c.task for s in jobs.values() for c in s.old_tasks)),
        at_success={name: _kept_at_success(m) for name, m in metrics.items()},
        headline=HEADLINE_SUCCESS,
        outcome=_present(figures.paths(metrics), *_outcome_curves(metrics)),
        training=_present(*_training_curves(metrics)),
        differences=_differences({name: s.record.config for name, s in jobs.items()}),
    )
    return write_page(out, page)


def verdict(summary: JobSummary) -> str:
    """The job in one sentence: what it learnt and what it kept."""
    sentences = []
    new, old = summary.new_task, summary.retention
    if new is not None and new.measure == "accuracy":
        sentences.append(f"New task solved: {_percent(new.after)}, before {_percent(new.before)}.")
    elif new is not None:
        sentences.append(f"Loss on the new task: {new.after:.3f} nats per token, before {new.before:.3f}.")
    if old is not None and old.measure == "accuracy":
        kept = f" ({_percent(old.kept)} of it kept)" if old.kept is not None else ""
        sentences.append(f"Old tasks solved: {_percent(old.after)}, before {_percent(old.before)}{kept}.")
    elif old is not None:
        sentences.append(f"Loss on the old tasks: {old.after:.3f} nats per token, before {old.before:.3f}.")
    return (
        " ".join(sentences) or "Nothing was evaluated: the job had neither a validation nor a retention file."
    )


def _facts(summary: JobSummary) -> list[tuple[str, str]]:
    """The numbers at the top of the page."""
    facts = [
        ("new task", _change(summary.new_task)),
        ("old tasks", _change(summary.retention)),
        ("KL to the start", "" if summary.kl_nats is None else f"{summary.kl_nats:.3g} nats/token"),
        ("ESS/n, median", "" if summary.ess_ratio is None else f"{summary.ess_ratio:.2f}"),
        ("γ, median", "" if summary.gamma is None else f"{summary.gamma:.2f}"),
        ("steps", f"{summary.num_steps:,}"),
        ("trained tokens", f"{summary.num_tokens:,}"),
        ("time", _duration(summary.seconds)),
    ]
    return [(label, value) for label, value in facts if value]


def _outcome_curves(metrics: Mapping[str, Metrics]) -> list[FigureView | None]:
    return [
        figures.compare(
            metrics,
            "retention.accuracy",
            name="retention",
            title="Old tasks solved",
            caption="Greedy accuracy over the whole retention file. A line that falls is forgetting.",
            percent=True,
        ),
        figures.compare(
            metrics,
            "validation.accuracy",
            name="success",
            title="New task solved",
            caption="Greedy accuracy on held-out problems of the new task.",
            percent=True,
        ),
        figures.compare(
            metrics,
            "retention.kl_nats",
            name="kl",
            title="Distance from the start",
            caption="KL(π₀‖π) in nats per token over the retention file, the whole vocabulary summed.",
        ),
    ]


def _training_curves(metrics: Mapping[str, Metrics]) -> list[FigureView | None]:
    return [
        figures.compare(
            metrics,
            "nll",
            name="nll",
            title="Training loss, unweighted",
            caption="Nats per trained token, every token counted alike, so that weightings can be compared.",
        ),
        figures.compare(
            metrics,
            "validation.nll",
            name="validation",
            title="Validation loss",
            caption="Nats per token of held-out rows of the new task.",
        ),
        figures.compare(
            metrics,
            "ess_ratio",
            name="ess",
            title="Effective sample size",
            caption="ESS/n with its healthy band; 1 is plain fine-tuning.",
            decorate=figures.healthy_band,
        ),
    ]


def _kept_at_success(metrics: Metrics) -> float | None:
    return retention_at_success(*figures.success_and_retention(metrics), target=HEADLINE_SUCCESS)


def _differences(configs: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The settings in which the jobs differ: path, and each job's value ("" = not given)."""
    flat = {name: dict(_leaves(config)) for name, config in configs.items()}
    keys = list(dict.fromkeys(key for leaves in flat.values() for key in leaves))
    rows = [(key, [leaves.get(key, "") for leaves in flat.values()]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _leaves(value: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [
            leaf
            for key, part in value.items()
            for leaf in _leaves(part, f"{path}.{key}" if path else str(key))
        ]
    return [(path, value if isinstance(value, str) else json.dumps(value, default=str))]


def _distinct(summaries: Sequence[JobSummary]) -> dict[str, JobSummary]:
    """By name; jobs of the same name are told apart by their ids."""
    names = [summary.name for summary in summaries]
    return {
        (name if names.count(name) == 1 else f"{name} ({summary.record.id})"): summary
        for name, summary in zip(names, summaries, strict=True)
    }


def _present(*views: FigureView | None) -> list[FigureView]:
    return [view for view in views if view is not None]


def _change(change: TaskChange | None) -> str:
    if change is None:
        return ""
    if change.measure == "accuracy":
        return f"{_percent(change.before)} → {_percent(change.after)}"
    return f"{change.before:.3f} → {change.after:.3f} nats"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or value != value else f"{value:.{digits}g}"


def _fixed(value: float) -> str:
    """Two decimals, so that a column of weights lines up."""
    return "–" if value != value else f"{value:.2f}".replace("-", "−")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("modeseek_ray.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _percent,
        "number": _number,
        "fixed": _fixed,
        "change": _change,
        "duration": _duration,
        "svg": Markup,  # our own drawing, labels already escaped
    }
    return environment


def render(template: str, **values: Any) -> str:
    """A page from one of `templates/`."""
    return _environment().get_template(template).render(**values)


def write_page(out: Path, page: str) -> Path:
    """Whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(out)
    return out
