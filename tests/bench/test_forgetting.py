"""The forgetting study: every method tried as often, runs stored once, selection and verdicts by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modeseek_ray.playground import new_task
from modeseek_ray.weights import Weighting
from tests.bench.forgetting import __main__ as command
from tests.bench.forgetting import analysis, drawing, page, study, tables, world
from tests.bench.forgetting.__main__ import SMALL_METHODS, parser
from tests.bench.forgetting.methods import DEMONSTRATIONS, FIVE_RATES, LORA_FACTOR, SAMPLES, methods_of
from tests.bench.forgetting.train import Setting

REPORT = study.report_units("dense")


@pytest.mark.parametrize("method", [*DEMONSTRATIONS, *SAMPLES], ids=lambda m: m.name)
def test_every_method_has_ten_trials_and_all_rates_in_the_first_five(method: Any) -> None:
    assert len(method.trials) == len({repr(t) for t in method.trials}) == 10
    factor = LORA_FACTOR if method.name == "lora" else 1.0
    first = sorted(trial.learning_rate / factor for trial in method.trials[:5])
    np.testing.assert_allclose(first, FIVE_RATES)
    for trial in method.trials:
        Weighting.model_validate(dict(trial.weighting))
    assert method.control is None or method.control in methods_of("standard")


def test_a_shuffled_control_differs_from_its_method_in_the_shuffle_alone() -> None:
    methods = methods_of("standard")
    for method in DEMONSTRATIONS:
        if method.control:
            shuffled = methods[method.control].trials
            assert [replace(t, shuffled=False) for t in shuffled] == list(method.trials)
            assert all(t.shuffled for t in shuffled)


def test_a_run_is_stored_once_and_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    store = study.Store(tmp_path / "runs.jsonl")
    store.add({"key": "a", "path": [1]})
    with store.file.open("a") as file:
        file.write('{"key": "b", "pa')  # killed here
    store.add({"key": "c", "path": [3]})
    store.add({"key": "a", "path": [4]})
    assert {key: row["path"] for key, row in store.rows().items()} == {"a": [1], "c": [3]}


def test_the_key_is_of_the_content() -> None:
    job = study.Job("dense", "standard", "sft", 0, 1, 1)
    assert job.key == study.Job("dense", "standard", "sft", 0, 1, 1).key
    others = [
        replace(job, trial=1),
        replace(job, data_seed=2),
        replace(job, base_seed=2),
        replace(job, variant="far"),
    ]
    assert len({job.key, *(other.key for other in others)}) == 5
    assert replace(job, method="mode_seeking").key != job.key


@pytest.mark.parametrize("arch", study.REPORT_BASES)
def test_validation_and_report_share_no_base(arch: str) -> None:
    units = study.report_units(arch)
    assert not {base for base, _ in study.VALIDATION} & {base for base, _ in units}
    assert len(set(units)) == 10 and {data for _, data in units[:5]} == {1}  # every base once, then again


def test_what_is_reported_on_depends_on_the_architecture() -> None:
    """The mixture's base of seed 8 does not hold its old tasks, the dense one does."""
    bases = {
        arch: {j.base_seed for j in study.report_jobs(arch, "far", {"sft": 0})} for arch in ("dense", "moe")
    }
    assert 8 in bases["dense"] and 8 not in bases["moe"] and len(bases["moe"]) == 5


def run_of(
    method: str, trial: int, unit: tuple[int, int], kept_at_end: float, success: float = 1.0
) -> dict[str, Any]:
    """A path from (0, 1) to (success, kept) in one straight line: retention at .9 is known by hand."""
    rows = [
        {"step": 0, "success": 0.0, "old_accuracy": 0.5, "text_nll": 4.0, "new_kl_nats": 0.0, "cpu_s": 0.0},
        {
            "step": 80,
            "success": success,
            "old_accuracy": 0.5 * kept_at_end,
            "text_nll": 5.0,
            "new_kl_nats": 1 - kept_at_end,
            "cpu_s": 8.0,
        },
    ]
    return {
        "key": f"{method}{trial}{unit}",
        "arch": "dense",
        "variant": "standard",
        "method": method,
        "trial": trial,
        "base_seed": unit[0],
        "data_seed": unit[1],
        "is_validation": unit in study.VALIDATION,
        "setting": asdict(Setting({}, 1e-3)),
        "path": rows,
        "extra_cpu_s": 0.0,
        "commit": "c",
        "cpu": "kind",
        "cores": 2,
        "device": "cpu",
        "versions": {"torch": "0"},
    }


@pytest.fixture
def runs() -> list[Mapping[str, Any]]:
    """sft keeps .5 at the end, anchored .6 and its control .55 in each unit, mode_seeking .3, flow never learns."""
    kept = {"sft": 0.5, "anchored": 0.6, "shuffled_anchored": 0.55, "mode_seeking": 0.3, "flow": 0.9}
    made = []
    for name, at_end in kept.items():
        success = 0.6 if name == "flow" else 1.0
        for trial in range(5):
            chosen = trial == 3
            best = (at_end if chosen else 0.1, success if chosen else 0.9 * success)
            made.extend(run_of(name, trial, unit, *best) for unit in study.VALIDATION)
        made.extend(run_of(name, 3, unit, at_end, success) for unit in REPORT[:3])
    return made


def test_the_best_validation_trial_is_reported_and_the_verdicts_follow(runs: list[Mapping[str, Any]]) -> None:
    trials, common = analysis.selected(runs, "dense", "standard")
    assert set(trials.values()) == {3} and common == 5
    units = analysis.units_of(runs, "dense", "standard")
    assert units == [(5, 1), (6, 1), (7, 1)]
    lines = {line.method: line for line in analysis.headline(runs, "dense", "standard", units)}
    assert lines["sft"].retention == pytest.approx(1 - 0.9 * 0.5)
    anchored = lines["anchored"].difference
    assert (
        anchored is not None and anchored.low == pytest.approx(0.09) and anchored.high == pytest.approx(0.09)
    )
    assert lines["anchored"].verdict == "wins"
    assert lines["mode_seeking"].verdict == "loses"
    assert lines["flow"].verdict == "did not always reach .9"
    assert (lines["flow"].reached, lines["flow"].difference) == (0, None)
    # flow goes straight from (0, 1) to (.6, .9): at .6 it kept .9, and sft, on its way to (1, .5), .7
    matched = lines["flow"].matched
    assert matched is not None and matched.mean == pytest.approx(0.2)
    assert lines["flow"].matched_success == pytest.approx(0.6)
    assert lines["anchored"].matched == lines["anchored"].difference
    assert lines["anchored"].matched_control == lines["anchored"].to_control
    assert lines["anchored"].both_reached == (lines["anchored"].difference, 3)
    assert lines["flow"].both_reached is None


def test_a_trial_that_reaches_on_all_validation_units_is_preferred_to_one_that_keeps_more_on_one() -> None:
    def path(success: float, kept: float) -> list[dict[str, float]]:
        return [{"success": 0.0, "old_accuracy": 0.5}, {"success": success, "old_accuracy": 0.5 * kept}]

    both = study.score_of([path(1.0, 0.3), path(1.0, 0.3)])
    one = study.score_of([path(1.0, 0.9), path(0.8, 0.9)])
    assert both > one > study.score_of([path(0.8, 1.0), path(0.8, 1.0)])
    assert study.score_of([path(0.8, 1.0), path(0.6, 1.0)]) == (0, pytest.approx(0.7))


def test_a_method_that_only_equals_its_shuffled_control_does_not_win(runs: list[Mapping[str, Any]]) -> None:
    better = [r for r in runs if r["method"] != "shuffled_anchored"]
    better += [run_of("shuffled_anchored", 3, unit, 0.6) for unit in REPORT[:3]]
    better += [
        run_of("shuffled_anchored", t, unit, 0.6 if t == 3 else 0.1)
        for t in range(5)
        for unit in study.VALIDATION
    ]
    units = analysis.units_of(better, "dense", "standard")
    lines = {line.method: line for line in analysis.headline(better, "dense", "standard", units)}
    assert lines["anchored"].verdict == "above, but not above its shuffled control"


def test_equal_compute_is_of_steps_on_the_same_device(runs: list[dict[str, Any]]) -> None:
    """anchored takes twice the seconds of an sft step on either device, of which one is ten times slower."""

    def on(device: str, run: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        path = [{**row, "cpu_s": seconds * row["cpu_s"]} for row in run["path"]]
        return {**run, "device": device, "path": path}

    slower = {"anchored": 2.0, "sft": 1.0}
    known = [r for r in runs if r["method"] in slower]
    mixed = [
        on("cpu", r, 10 * slower[r["method"]])
        if r["base_seed"] == REPORT[0][0]
        else on("card", r, slower[r["method"]])
        for r in known
    ]
    cost = analysis.seconds_per_step(mixed, "dense")
    for run in mixed:
        if run["method"] == "anchored":
            assert analysis.cost_in_baseline_steps(run, cost, "sft") == (pytest.approx(2.0), 0.0)
    units = analysis.units_of(mixed, "dense", "standard")
    lines = {line.method: line for line in analysis.headline(mixed, "dense", "standard", units)}
    assert lines["sft"].reached_at_equal_compute == 3
    assert lines["anchored"].reached_at_equal_compute == 0  # 80 steps cost what 160 of the 120 cost
    extra = {**mixed[0], "extra_cpu_s": 40 * cost[mixed[0]["device"], "sft"]}
    assert analysis.cost_in_baseline_steps(extra, cost, "sft") == (pytest.approx(1.0), pytest.approx(40))


def test_a_unit_that_a_method_lacks_is_left_out(runs: list[Mapping[str, Any]]) -> None:
    partial = [r for r in runs if not (r["method"] == "flow" and r["base_seed"] == 6)]
    assert analysis.units_of(partial, "dense", "standard") == [(5, 1), (7, 1)]


def test_results_come_back_from_their_file(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    analysis.write_results(runs, tmp_path / "results.parquet")
    again = analysis.read_results(tmp_path / "results.parquet")
    assert analysis.headline(again, "dense", "standard", [(5, 1)]) == analysis.headline(
        runs, "dense", "standard", [(5, 1)]
    )


def test_a_share_reports_only_on_what_all_shares_have_selected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other share still has one validation run to do: a choice among fewer trials would be another."""
    titles: list[str] = []
    monkeypatch.setattr(command, "work", lambda *given: titles.append(given[-1]) or True)
    words = ["run", "--home", str(tmp_path), "--trials", "2", "--share", "1/2", "--piece", "standard"]
    options = parser().parse_args([*words, "--methods", "sft", "dft"])
    jobs = [j for j in study.validation_jobs("dense", "standard", 2) if j.method in ("sft", "dft")]
    store = command.store_of(tmp_path)
    for job in jobs[:-1]:
        store.add({"key": job.key, "path": run_of(job.method, job.trial, (1, 0), 0.5)["path"]})
    assert command.run(options) == 0 and titles == ["standard: validation"]
    store.add({"key": jobs[-1].key, "path": run_of("dft", 1, (2, 0), 0.5)["path"]})
    assert command.run(options) == 0 and titles[1:] == ["standard: validation", "standard: report"]


def test_bootstrap_of_three_bases_spans_them() -> None:
    found = analysis.hierarchical_bootstrap({(1, 1): 0.0, (2, 1): 0.3, (3, 1): 0.6})
    assert found.mean == pytest.approx(0.3)
    assert found.low == pytest.approx(0.0, abs=0.11) and found.high == pytest.approx(0.6, abs=0.11)


def test_rewards_of_an_answer_by_hand() -> None:
    assert new_task.rotated("ABC") == "BCA"
    assert world.reward_of("ABC", "BCA") == 1.0
    assert world.reward_of("ABC", "BAC") == pytest.approx(0.5 / 3)
    assert world.reward_of("ABC", "B-C-A") == world.reward_of("ABC", "") == 0.0


def test_the_reduced_set_has_the_headline_and_its_loser() -> None:
    assert {"sft", "mode_seeking", "anchored"} <= set(SMALL_METHODS) <= set(methods_of("standard"))
    assert "MODESEEK_HOME" in parser().format_help()


@pytest.fixture
def both(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same runs for the mixture, where anchored keeps what sft keeps; its fifth base is another."""
    mixture = []
    for run in runs:
        name = "sft" if run["method"] == "anchored" else run["method"]
        twin = next(r for r in runs if r["key"] == run["key"].replace(run["method"], name))
        path = twin["path"] if run["method"] == "anchored" else run["path"]
        mixture.append({**run, "key": "moe" + run["key"], "arch": "moe", "path": path})
    return [*runs, *mixture]


def test_the_report_is_one_page_and_one_file_of_both_architectures(
    both: list[dict[str, Any]], tmp_path: Path
) -> None:
    analysis.write_results(both, tmp_path / "results.parquet")
    written = page.write(tmp_path, tmp_path / "out", tmp_path / "results.parquet")
    names = {file.name for file in written}
    assert {"standard-dense-fronts.svg", "standard-moe-fronts.svg", "forgetting.html"} <= names
    html = (tmp_path / "out" / "forgetting.html").read_text()
    markdown = (tmp_path / "out" / "tables.md").read_text()
    for arch, title in tables.ARCHITECTURES.items():
        assert f"<h2>{title}</h2>" in html and f"(`standard`, {arch})" in markdown
    assert html.count("<svg") == sum(name.endswith(".svg") for name in names) == 8
    assert "src=" not in html and "Not run, or not on one whole unit: `long`, `rewards`" in markdown


def test_figures_keep_each_methods_own_colour(both: list[dict[str, Any]], tmp_path: Path) -> None:
    """A palette once made one colour of two methods."""
    analysis.write_results(both, tmp_path / "results.parquet")
    page.write(tmp_path, tmp_path / "out", tmp_path / "results.parquet")
    of_method = dict(zip(methods_of("standard"), drawing.COLORS, strict=True))
    assert len(set(of_method.values())) == len(of_method)
    fronts = (tmp_path / "out" / "standard-dense-fronts.svg").read_text()
    html = (tmp_path / "out" / "forgetting.html").read_text()
    for name in {run["method"] for run in both}:
        assert of_method[name] in fronts and of_method[name] in html and f">{name}</text>" in html


def test_both_architectures_beside_each_other_say_where_they_agree(both: list[dict[str, Any]]) -> None:
    says = {row[0]: row[-1] for row in tables.beside(both)}
    assert says == {
        "mode_seeking": "both: less",
        "anchored": "dense more, mixture nothing shown",
        "flow": "both: more",
        "shuffled_anchored": "both: more",
    }
    assert tables.beside([run for run in both if run["arch"] == "dense"]) == []


def test_the_committed_tables_and_page_are_of_the_committed_results() -> None:
    """Every row of every table of RESULTS.md; and a page that a browser opens at once."""
    runs = analysis.read_results(tables.HERE / "results.parquet")
    told = (tables.HERE / "RESULTS.md").read_text(encoding="utf-8").splitlines()
    for arch in tables.ARCHITECTURES:
        for variant in tables.TITLES:
            units = analysis.units_of(runs, arch, variant)
            for line in analysis.headline(runs, arch, variant, units) if units else []:
                assert f"| {' | '.join(tables.cells(line))} |" in told, (arch, variant, line.method)
    for row in tables.beside(runs):
        assert f"| {' | '.join(row)} |" in told
    assert (tables.HERE / "results" / "forgetting.html").stat().st_size < 1_500_000
