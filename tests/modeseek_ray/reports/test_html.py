"""The HTML reports of made-up jobs: self-contained, complete, safe, the same bytes every time."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modeseek_ray.errors import ConfigError, StorageError
from modeseek_ray.reports import summarize, write_comparison, write_report
from modeseek_ray.reports.html import verdict
from modeseek_ray.reports.results import JobRecord, MetricsWriter, write_job
from modeseek_ray.reports.texts import LONGEST, RowText, row_text, row_texts
from tests.modeseek_ray.reports.synthetic import OLD_TASKS, write_demo, write_job_directory

HOSTILE = "</script><img src=https://example.org/x onerror=alert(1)>"
VOID = {"meta", "br", "img", "hr", "link", "input"}


class Page(html.parser.HTMLParser):
    """Collects what the tests ask about; complains about tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.references += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    write_demo(root)
    return root


@pytest.fixture(scope="module")
def report(demo: Path) -> str:
    """The weighted job's page."""
    return write_report(demo / "weighted", demo / "report.html", texts=demo / "new-task.jsonl").read_text()


def test_a_job_report_is_complete_and_asks_nothing_of_the_network(report: str) -> None:
    text = report
    page = Page(text)
    assert page.tags.count("figure") == page.tags.count("svg") == page.tags.count("figcaption") == 9
    assert len(page.ids) == len(set(page.ids))
    assert all(reference.startswith("#") for reference in page.references)
    assert set(re.findall(r"https?://[^\s\"'<)]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "<script" not in text
    for piece in (*OLD_TASKS, "weighted succeeded", "480 rows were used", "roman", "learning_rate 0.0005"):
        assert piece in page.text
    assert "starved_rows" in page.text
    config = re.search(r"<pre><code>(.*?)</code></pre>", text, re.DOTALL)
    assert config is not None
    assert json.loads(html.unescape(config.group(1)))["method"]["type"] == "weighted"


def test_every_reference_inside_the_drawings_resolves(report: str) -> None:
    ids = set(Page(report).ids)
    used = set(re.findall(r"url\(#([^)]+)\)", report)) | set(re.findall(r'href="#([^"]+)"', report))
    assert used
    assert used <= ids


def test_colours_follow_the_page(report: str) -> None:
    """Everything drawn uses a variable that the style sheet defines for light and for dark."""
    drawings = " ".join(re.findall(r"<svg.*?</svg>", report, re.DOTALL))
    assert re.findall(r"#[0-9a-f]{6}\b", drawings) == []
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", report))
    defined = re.findall(r"--([a-z0-9-]+):", report)
    assert used <= set(defined)
    assert all(defined.count(name) == 2 for name in used - {"sans", "mono"})


def test_the_same_results_give_the_same_bytes(demo: Path, report: str, tmp_path: Path) -> None:
    again = write_report(demo / "weighted", tmp_path / "again.html", texts=demo / "new-task.jsonl")
    assert again.read_text() == report


def test_most_and_least_weighted_rows_are_told_with_their_text(demo: Path, tmp_path: Path) -> None:
    texts = {row: RowText(f"question {row}", f"answer {row}") for row in range(480)}
    page = Page(write_report(demo / "weighted", tmp_path / "r.html", texts=texts).read_text())
    shown = [int(row) for row in re.findall(r"question (\d+)", page.text)]
    assert len(shown) == 20
    # Distance from the start grows with row % 4, and this job's weights with distance.
    assert {row % 4 for row in shown[:10]} == {3}
    assert {row % 4 for row in shown[10:]} == {0}
    more, less = page.text.index("Collect more like these"), page.text.index("Sample less of these")
    assert more < page.text.index(f"question {shown[0]} ") < less < page.text.index(f"question {shown[10]} ")


def test_plain_fine_tuning_advises_nothing(demo: Path, tmp_path: Path) -> None:
    text = write_report(demo / "sft", tmp_path / "r.html").read_text()
    assert "Rows with the largest mean weight" in text
    assert "Collect more" not in text


def test_the_users_text_stays_text(tmp_path: Path) -> None:
    directory = write_job_directory(
        tmp_path / "job",
        gamma_max=1.0,
        forgets=0.1,
        learns=1.0,
        name=HOSTILE,
        status="failed",
        error={"code": "storage", "message": HOSTILE, "param": HOSTILE, "mend": HOSTILE},
        warnings=({"code": None, "message": HOSTILE, "param": None},),
    )
    texts = {row: RowText(HOSTILE, HOSTILE) for row in range(480)}
    page = Page(write_report(directory, tmp_path / "r.html", texts=texts).read_text())
    both = Page(write_comparison([directory, directory], tmp_path / "c.html").read_text())
    for each in (page, both):
        assert "img" not in each.tags
        assert "script" not in each.tags
        assert "alert(1)" in each.text


def test_a_job_that_has_only_begun(tmp_path: Path) -> None:
    write_job(tmp_path, JobRecord(id="ftjob-1", name="young", config={"model": "m"}, model="m"))
    page = Page(write_report(tmp_path, tmp_path / "report.html").read_text())
    assert "young running" in page.text
    assert "Nothing was evaluated" in page.text
    MetricsWriter(tmp_path).append(1, {"loss": 2.0, "nll": 2.0, "bound_by": "none"})
    assert "figure" in Page(write_report(tmp_path, tmp_path / "report.html").read_text()).tags


def test_a_single_evaluation_is_enough(tmp_path: Path) -> None:
    write_job(tmp_path, JobRecord(id="ftjob-1", name="young", config={}, model="m"))
    MetricsWriter(tmp_path).append(
        0, {"validation.accuracy": 0.0, "retention.accuracy": 1.0, "retention.kl_nats": 0.0}
    )
    Page(write_report(tmp_path, tmp_path / "report.html").read_text())
    Page(write_comparison([tmp_path], tmp_path / "comparison.html").read_text())


def test_comparison_has_both_jobs_and_what_they_differ_in(demo: Path, tmp_path: Path) -> None:
    out = write_comparison([demo / "sft", demo / "weighted"], tmp_path / "comparison.html")
    page = Page(out.read_text())
    assert len(page.ids) == len(set(page.ids))
    assert "2 jobs compared" in page.text
    assert "old: sort" in page.text
    assert "method.weighted.likelihood.of – initial_over_policy" in page.text
    assert "training_file" not in page.text  # the same in both


def test_nothing_to_compare_and_no_results_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to compare"):
        write_comparison([], tmp_path / "c.html")
    with pytest.raises(StorageError, match=r"no job\.json"):
        write_report(tmp_path, tmp_path / "r.html")


def test_the_summary_and_its_sentence(tmp_path: Path) -> None:
    write_job(tmp_path, JobRecord("ftjob-1", "j", {}, "m", started_at=100.0, finished_at=160.0))
    writer = MetricsWriter(tmp_path)
    writer.evaluated(
        0, {"validation.accuracy": 0.0, "retention.accuracy": 0.8, "retention.sort.accuracy": 0.9}
    )
    writer.append(1, {"loss": 1.0, "num_tokens": 30, "ess_ratio": 0.5})
    writer.evaluated(
        1, {"validation.accuracy": 0.5, "retention.accuracy": 0.9, "retention.sort.accuracy": 1.0}
    )
    writer.append(2, {"loss": 1.0, "num_tokens": 40, "ess_ratio": 0.7})
    writer.evaluated(
        2, {"validation.accuracy": 0.9, "retention.accuracy": 0.6, "retention.sort.accuracy": 0.75}
    )
    found = summarize(tmp_path)
    assert (found.num_steps, found.num_tokens, found.seconds) == (2, 70, 60.0)
    assert found.ess_ratio == pytest.approx(0.6)
    assert found.forgetting == {"sort": 0.25}  # from its best, 1.0
    assert verdict(found) == (
        "New task solved: 90.0 %, before 0.0 %. Old tasks solved: 60.0 %, before 80.0 % (75.0 % of it kept)."
    )


def test_texts_are_found_by_row_number_in_jsonl_and_parquet(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(5)]
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text("\n".join([json.dumps(rows[0]), "{broken", *map(json.dumps, rows[2:])]) + "\n")
    assert row_texts(jsonl, [0, 1, 3, 99]) == {0: RowText("p0", "c0"), 3: RowText("p3", "c3")}
    parquet = tmp_path / "file-abc"
    pq.write_table(pa.Table.from_pylist(rows), parquet, row_group_size=2)
    assert row_texts(parquet, [4, 0]) == {0: RowText("p0", "c0"), 4: RowText("p4", "c4")}


def test_long_texts_are_cut_and_unknown_rows_left_out() -> None:
    cut = row_text({"prompt": "x" * 10_000, "completion": "y"})
    assert cut is not None
    assert len(cut.prompt) == LONGEST
    assert row_text({"input": "something else"}) is None


def test_an_old_task_that_was_never_solved_is_told_by_its_loss(tmp_path: Path) -> None:
    write_job(tmp_path, JobRecord("ftjob-1", "j", {}, "m"))
    writer = MetricsWriter(tmp_path)
    for step, loss in ((0, 2.0), (1, 2.5)):
        figures = {"retention.text.accuracy": 0.0, "retention.text.nll": loss, "validation.accuracy": 0.0}
        writer.evaluated(step, {**figures, "validation.nll": 1.0, "retention.sort.accuracy": 1.0 - step / 2})
    found = summarize(tmp_path)
    assert {c.task: (c.measure, c.before, c.after) for c in found.old_tasks} == {
        "text": ("nll", 2.0, 2.5),
        "sort": ("accuracy", 1.0, 0.5),
    }
    assert found.new_task is not None
    assert found.new_task.measure == "accuracy"  # not learnt is a result
    page = Page(write_report(tmp_path, tmp_path / "r.html").read_text())
    assert "text 2 → 2.5 –" in page.text
