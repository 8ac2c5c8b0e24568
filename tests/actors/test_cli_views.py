"""What the command line prints, read back from a recording console."""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from actors.cli import checks, doctor, tables
from actors.cli.follow import Follower, follow, panel, plain_line
from actors.network import free_port
from modeseek_ray.config import parse_config
from modeseek_ray.data.problems import Problems
from modeseek_ray.data.report import DataReport, FileReport
from modeseek_ray.errors import DataError, Warn
from modeseek_ray.jobs.models import ModelInfo
from modeseek_ray.jobs.plan import plan
from modeseek_ray.reports import JobSummary
from modeseek_ray.reports.results import JobRecord, Metrics
from modeseek_ray.retention import TaskChange


def recorder(width: int, **options: Any) -> Console:
    return Console(record=True, width=width, file=io.StringIO(), **options)


def printed(view: RenderableType, width: int = 120) -> str:
    console = recorder(width)
    console.print(view)
    return console.export_text()


def metrics_event(step: int, **figures: Any) -> dict[str, Any]:
    data = {"step": step, "total_steps": 40, "tokens_per_s": 812.4, "eta_s": 83.0, **figures}
    return {"type": "metrics", "level": "info", "message": "", "data": data}


START = {"type": "metrics", "data": {"step": 0, "retention.accuracy": 0.95, "validation.accuracy": 0.0}}
EVENTS = [
    {"type": "message", "level": "info", "message": "Trainers are ready.", "data": {}},
    START,
    metrics_event(1, loss=2.5, nll=2.6, ess_ratio=0.42, gamma=0.35, bound_by="ess"),
    {"type": "message", "level": "warn", "message": "Step 1: [gamma] is at its cap", "data": {}},
    metrics_event(2, loss=2.0, nll=2.1, ess_ratio=0.05, gamma=0.5, bound_by="cap"),
    {"type": "metrics", "data": {"step": 2, "retention.accuracy": 0.9, "retention.kl_nats": 0.0123}},
]


def test_live_panel_shows_figures_changes_and_messages() -> None:
    console = recorder(100)
    text = printed(panel(follow(EVENTS, console, title="demo [1]", live=False)), width=100)
    for piece in (
        "demo [1]",
        "step 2/40",
        "812 tokens/s",
        "ETA 1:23",
        "0.5 (cap)",
        "90.0 %  -5.0",
        "0.0123 nats",
        "Trainers are ready.",
        "[gamma] is at its cap",
    ):
        assert piece in text


def test_plain_lines_one_per_event() -> None:
    console = recorder(200)
    follow(EVENTS, console, live=False)
    lines = console.export_text().splitlines()
    assert len(lines) == len(EVENTS)
    assert lines[1] == "step 0  new task 0.0 %  old tasks 95.0 %"
    assert lines[2] == "step 1/40  loss 2.5  nll 2.6  ESS/n 0.42  γ 0.35 (ess)  812 tokens/s  ETA 1:23"
    assert lines[3] == "warning: Step 1: [gamma] is at its cap"


def test_a_console_that_is_no_terminal_gets_lines_and_a_terminal_the_panel() -> None:
    plain = recorder(100, force_terminal=False)
    with Follower(plain) as follower:
        follower.show(EVENTS[2])
    assert plain.export_text().startswith("step 1/40")
    terminal = recorder(100, force_terminal=True)
    with Follower(terminal, title="demo") as follower:
        follower.show(EVENTS[2])
    assert "╭─ demo" in terminal.export_text()


def test_messages_without_text_say_nothing() -> None:
    assert plain_line({"type": "message", "message": "", "data": None}) is None


JOB = {
    "id": "ftjob-1",
    "status": "failed",
    "model": "playground/moe",
    "created_at": 1_700_000_000,
    "method": {"type": "weighted", "weighted": {"preset": "anchored"}},
    "progress": {"step": 7, "total_steps": 40, "tokens_per_s": 812.0, "eta_s": 83},
    "error": {"code": "storage", "message": "the disk is full.", "param": None},
    "trained_tokens": 12345,
}


def test_job_list_and_details() -> None:
    listed = printed(tables.job_list([JOB]))
    assert all(piece in listed for piece in ("ftjob-1", "failed", "weighted", "7/40"))
    long = "ftjob-" + "x" * 24
    assert long in printed(tables.job_list([{**JOB, "id": long, "suffix": "a-name"}]), width=80)
    assert "modeseek submit" in printed(tables.job_list([]))
    details = printed(tables.job_details(JOB))
    assert all(
        p in details for p in ("storage: the disk is full.", "12,345", '"preset": "anchored"', "812 tokens/s")
    )


def test_checkpoints() -> None:
    checkpoint = {
        "id": "ftckpt-1",
        "fine_tuned_model_checkpoint": "ft:moe:local::1:step-20",
        "step_number": 20,
        "created_at": 1_700_000_000,
        "metrics": {"train_loss": 1.25, "retention.accuracy": 0.875},
    }
    other = {**checkpoint, "metrics": {"train_loss": 1.5}}
    shown = printed(tables.checkpoint_list([checkpoint, other]))
    assert all(piece in shown for piece in ("ft:moe:local::1:step-20", "20", "1.25", "0.875", "–"))
    assert "ESS/n" not in shown  # no checkpoint has it


def summary(name: str, kept: float) -> JobSummary:
    return JobSummary(
        record=JobRecord(id=f"ftjob-{name}", name=name, config={}, model="m"),
        metrics=Metrics.of([]),
        new_task=TaskChange("new task", 0.0, 0.875),
        old_tasks=(TaskChange("sort", 1.0, kept), TaskChange("prose", 2.0, 2.5, "nll")),
        retention=TaskChange("old tasks", 0.95, kept),
        forgetting={"sort": 1.0 - kept},
        kl_nats=0.0421,
        ess_ratio=0.4,
        gamma=None,
        num_steps=40,
        num_tokens=12_345,
        seconds=83.0,
    )


def test_comparison_has_a_column_per_job_and_a_row_per_old_task() -> None:
    lines = printed(tables.comparison([summary("sft", 0.5), summary("weighted", 0.75)])).splitlines()
    rows = {line.split("  ")[1].strip(): line for line in lines if "  " in line}
    assert "0.0 % → 87.5 %" in rows["new task"]
    assert "100.0 % → 50.0 %" in rows["old: sort"]
    assert "100.0 % → 75.0 %" in rows["old: sort"]
    assert "2 → 2.5" in rows["old: prose"]
    assert rows["time"].count("1:23") == 2


def test_data_view_names_file_and_line_of_each_problem() -> None:
    problems = Problems("a.jsonl")
    for line in range(3, 18):
        problems.add(DataError("the completion is empty.", mend="Drop it.", code="empty_completion"), line)
    training = FileReport("a.jsonl", "training", problems, rows=12, samples=12, lengths=[5, 20, 21])
    report = DataReport({"training": training}, (Warn("truncated", "2 samples are cut."),))
    shown = printed(checks.show_data(report.to_dict()))
    assert "15 problems" in shown
    assert "a.jsonl:3: the completion is empty. Drop it." in shown
    assert "and 3 more (empty_completion)" in shown
    assert "warning: 2 samples are cut." in shown


def test_plan_view_shows_processes_formulas_and_assumptions() -> None:
    config = parse_config(
        {"model": "playground/moe", "training_file": "a.jsonl", "resources": {"trainers": 2}}
    )
    model = ModelInfo(
        path=Path("/m"),
        architecture="Qwen3MoeForCausalLM",
        num_parameters=1_250_000,
        dtype_bytes=4,
        vocab_size=1000,
        num_layers=4,
        hidden_size=128,
        max_length=512,
        num_experts=8,
        has_chat_template=True,
    )
    training = FileReport("a.jsonl", "training", Problems("a.jsonl"), rows=320, samples=320, lengths=[20])
    planned = plan(config, model, DataReport({"training": training}))
    brief, shown = printed(checks.show_plan(planned)), printed(checks.show_plan(planned, in_full=True))
    assert "2 × trainer" in brief and "Adam keeps" not in brief and "--plan says" in brief
    assert "2 × trainer" in shown
    table = " ".join(shown.split())
    assert "parameters 5.0 MB" in table
    assert "optimizer 7.5 MB" in table  # 12 bytes x 1.25e6 / 2 ranks
    assert re.search(r"trainer +optimizer +12 A / R", shown)
    assert "Adam keeps two float32 moments" in shown
    assert "epochs: 3" in shown  # picked, and why


def test_doctor_says_what_to_mend(tmp_path: Path) -> None:
    pinned = tmp_path / "cpu.txt"
    pinned.write_text("# pinned\nrich==0.0.1\nno-such-package==1.0\n")
    check = doctor.check_packages(pinned)
    assert not check.ok
    assert "pinned 0.0.1" in check.detail
    assert "no-such-package missing" in check.detail
    shown = printed(doctor.show([check, doctor.Check("disk", True, "80 GB")]))
    assert "pip install" in shown.replace("\n", " ")
    assert "1 to mend" in shown


def test_doctor_finds_this_machine_fit_and_an_unwritable_home_not(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert doctor.check_home(tmp_path / "new").ok
    assert not doctor.check_home(blocked / "home").ok
    assert doctor.check_disk(tmp_path / "not" / "yet").detail.endswith(str(tmp_path))
    names = [check.name for check in doctor.collect(tmp_path, f"http://127.0.0.1:{free_port()}")]
    assert names == [
        "Python", "packages", "home", "disk", "memory", "GPU", "service", "clock", "Ray", "playground",
    ]  # fmt: skip


class Stranger(BaseHTTPRequestHandler):
    """Answers 404 to everything, or 200 at /healthz with a clock an hour slow."""

    def do_GET(self) -> None:
        healthy = self.server.server_name == "healthy" and self.path == "/healthz"
        self.send_response_only(200 if healthy else 404)
        self.send_header("Date", self.date_time_string(self.server.now_s))  # type: ignore[attr-defined]
        self.end_headers()


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Stranger)
    server.now_s = doctor.time.time() - 3600  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_doctor_tells_our_service_from_another_program_and_compares_clocks(server: HTTPServer) -> None:
    url = f"http://127.0.0.1:{server.server_port}"
    service, clock = doctor.check_service(url)
    assert not service.ok
    assert "something else answers" in service.detail
    server.server_name = "healthy"
    service, clock = doctor.check_service(url)
    assert service.ok
    assert not clock.ok
    assert re.search(r"360\d s from", clock.detail)
    free, _ = doctor.check_service(f"http://127.0.0.1:{free_port()}")
    assert free.ok
    assert "is free" in free.detail


def test_doctor_looks_at_the_recorded_ray_head(tmp_path: Path, server: HTTPServer) -> None:
    (tmp_path / "ray").mkdir()
    record = tmp_path / "ray" / "head.json"
    head = {"pid": 1, "address": "127.0.0.1:6379", "dashboard": f"http://127.0.0.1:{server.server_port}"}
    record.write_text(json.dumps(head))
    assert doctor.check_ray(tmp_path).ok
    record.write_text(json.dumps(head | {"dashboard": f"http://127.0.0.1:{free_port()}"}))
    assert not doctor.check_ray(tmp_path).ok  # process 1 lives, nobody listens
    record.write_text(json.dumps(head | {"dashboard": f"http://127.0.0.1:{free_port()}", "pid": 2**22}))
    assert doctor.check_ray(tmp_path).ok  # gone: the service starts another


def test_the_panel_fits_eighty_columns() -> None:
    events = [
        metrics_event(step, loss=1.0 / step, gamma=0.123456, bound_by="warmup") for step in range(1, 41)
    ]
    progress = follow([*EVENTS, *events], recorder(100), live=False)
    lines = printed(panel(progress), width=80).splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert any("0.0123 nats" in line for line in lines)
    assert any("0.1235 (warmup)" in line for line in lines)
