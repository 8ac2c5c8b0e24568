"""A person's session with the page of a real service: `modeseek serve`, with Ray, DeepSpeed and vLLM behind it.

The tests are one session and run in order. MODESEEK_PAGE_PICTURES=DIRECTORY keeps what the eye should judge.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, expect

from modeseek_ray.client import Client
from modeseek_ray.playground import data_files
from tests.e2e.conftest import RunningService

Open = Callable[..., Page]
PICTURES = os.environ.get("MODESEEK_PAGE_PICTURES")
LOOKS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 900}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 900}},
    "phone": {"color_scheme": "light", "viewport": {"width": 390, "height": 844}},
}
START_MS = 120_000  # of a job's workers, on a machine that does other things as well
JOB_MS = 240_000
JOBS = Path(__file__).parents[4] / "deploy" / "jobs" / "data"
TRAINING = {
    "batch_size": 32,
    "learning_rate": 7e-4,
    "evaluate_every": 5,
    "checkpoint_every": 20,
    "epochs": 8,
}
NUM_STEPS = 64  # 256 rows in batches of 32, eight times
GRADER = {
    "type": "string_check",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.reference }}",
    "operation": "eq",
}
ONLINE = {
    "reward": {"scheme": "exponential", "beta": 0.2, "scope": "group"},
    "grader": GRADER,
    "rollout": {"samples_per_prompt": 8, "prompts_per_round": 8, "max_tokens": 12},
    "training": {"max_steps": 8, "learning_rate": 5e-4, "evaluate_every": 4},
}


@dataclass
class Session:
    """The service, and the jobs of this session by name."""

    url: str
    client: Client
    files: dict[str, str]
    questions: Path
    jobs: dict[str, str] = field(default_factory=dict)

    def submit(self, name: str, method: dict[str, Any], training_file: str = "training") -> None:
        told = {key: self.files[key] for key in ("validation", "retention")}
        body = {
            "model": "playground/moe",
            "training_file": self.files[training_file],
            "method": method,
            "suffix": name,
            **{f"{key}_file": file_id for key, file_id in told.items()},
        }
        self.jobs[name] = self.client.submit(body)["id"]

    def job(self, name: str) -> str:
        """The address of a job's page."""
        return f"{self.url}/#/jobs/{self.jobs[name]}"


@pytest.fixture(scope="module")
def session(
    tmp_path_factory: pytest.TempPathFactory, playground_moe: Path, modeseek_home: Path
) -> Iterator[Session]:
    home = tmp_path_factory.mktemp("home")
    (home / "playground").symlink_to(playground_moe.parent)
    questions = home / "questions.jsonl"
    lines = data_files(modeseek_home)["new-task.prompts"].read_text().splitlines()[:64]
    questions.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with RunningService(home, root=playground_moe.parent) as service, Client(service.url) as client:
        named = {
            "training": JOBS / "new-task.train.jsonl",
            "validation": JOBS / "new-task.valid.jsonl",
            "retention": JOBS / "old-tasks.retention.jsonl",
            "questions": questions,
        }
        files = {name: client.upload(path)["id"] for name, path in named.items()}
        yield Session(service.url, client, files, questions)


def show(page: Page, url: str) -> None:
    """Another place of the page, as a link would lead there."""
    page.goto(url)


def num_points(chart: Locator) -> int:
    return int(chart.get_attribute("data-points") or 0)


def chart(page: Page, title: str) -> Locator:
    return page.get_by_role("img", name=re.compile(f"^{re.escape(title)}\\."))


def is_drawn(stage: Locator, series: int) -> bool:
    """Whether the canvas has pixels of that series' colour."""
    return bool(
        stage.evaluate(
            """(node, name) => {
          const wanted = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
          const [r, g, b] = wanted.match(/[0-9a-f]{2}/gi).map((pair) => parseInt(pair, 16));
          const canvas = node.querySelector("canvas");
          const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          const isNear = (i) => Math.abs(data[i] - r) + Math.abs(data[i + 1] - g) + Math.abs(data[i + 2] - b) < 40;
          for (let i = 0; i < data.length; i += 4) if (isNear(i) && data[i + 3] > 200) return true;
          return false;
        }""",
            f"--series-{series}",
        )
    )


def test_curves_grow_while_a_job_trains(session: Session, open_page: Open, picture: Any) -> None:
    session.submit("sft", {"type": "supervised", "supervised": {"training": TRAINING}})
    page = open_page(session.job("sft"))
    loss = chart(page, "Loss")
    expect(loss).to_be_visible(timeout=START_MS)
    seen: list[int] = []
    deadline = time.monotonic() + 60
    while len(seen) < 4 and time.monotonic() < deadline:
        now = num_points(loss)
        if now and (not seen or now > seen[-1]):
            seen.append(now)
            if len(seen) == 3:
                picture(session.job("sft"), "job-live", "Following live")
        page.wait_for_timeout(400)
    assert len(seen) == 4, seen
    assert is_drawn(loss, 2)  # all weights are one: the first curve lies under it
    print(f"points of the loss, as seen: {seen}")


def test_a_job_is_submitted_by_the_form_and_a_mistake_is_told_as_one_types(
    session: Session, open_page: Open, picture: Any
) -> None:
    page = open_page(f"{session.url}/#/submit")
    page.get_by_label("Upload a training file").set_input_files(JOBS / "new-task.train.jsonl")
    expect(page.get_by_text("new-task.train.jsonl is stored")).to_be_visible()
    for name, file in (("Validation file", "validation"), ("Retention file", "retention")):
        page.get_by_label(name, exact=True).select_option(session.files[file])
    model = page.get_by_label("Model", exact=True)
    model.fill("playground/mo")
    problem = page.locator(".field", has=model).locator(".problem")
    expect(problem).to_contain_text(
        "playground/moe", timeout=20_000
    )  # the service's own words: how to mend it
    model.fill("playground/moe")
    page.get_by_text("The optimisation, whatever the weighting.").click()
    page.get_by_label("Epochs", exact=True).fill("2.5")
    expect(page.get_by_text("A whole number is needed.")).to_be_visible()
    picture_of(page, "form-mistake-light")
    page.get_by_label("Epochs", exact=True).fill("8")
    for name, value in {"Batch size": "32", "Learning rate": "7e-4", "Evaluate every": "5"}.items():
        page.get_by_label(name, exact=True).fill(value)
    page.get_by_label("Suffix", exact=True).fill("anchored")
    expect(page.get_by_text("This job would be accepted")).to_be_visible(timeout=20_000)
    page.get_by_role("button", name="Submit the job").click()
    expect(page.get_by_role("heading", name="anchored", exact=True)).to_be_visible(timeout=20_000)
    session.jobs["anchored"] = page.url.rpartition("/")[2]
    job = session.client.job(session.jobs["anchored"])
    assert job["method"]["weighted"]["training"]["learning_rate"] == 7e-4


def test_a_queued_job_is_cancelled(session: Session, open_page: Open) -> None:
    session.submit("not-wanted", {"type": "supervised", "supervised": {"training": TRAINING}})
    page = open_page(session.job("not-wanted"))
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("h1 + .status")).to_have_text("cancelled", timeout=60_000)


def test_a_running_job_is_paused_and_resumed(session: Session, open_page: Open) -> None:
    page = open_page(session.job("anchored"))
    loss = chart(page, "Loss")
    expect(loss).to_be_visible(timeout=JOB_MS)
    page.get_by_role("button", name="Pause").click()
    status = page.locator("h1 + .status")
    expect(status).to_have_text("paused", timeout=60_000)
    before = num_points(loss)
    assert before < NUM_STEPS
    page.get_by_role("button", name="Resume").click()
    expect(status).to_have_text("succeeded", timeout=JOB_MS)
    assert num_points(loss) >= NUM_STEPS > before
    expect(page.locator(".log")).to_contain_text("Attempt 2")


def test_answers_of_an_online_job_are_seen_with_their_rewards(
    session: Session, open_page: Open, picture: Any
) -> None:
    session.submit("online", {"type": "online", "online": ONLINE}, training_file="questions")
    cut_short = {**TRAINING, "max_length": 12}  # tokens, fewer than the rows have
    session.submit("too-long", {"type": "supervised", "supervised": {"training": cut_short}})
    page = open_page(session.job("online"))
    section = page.locator("section", has=page.get_by_role("heading", name="Sampled answers"))
    expect(section.locator("li")).to_have_count(8, timeout=JOB_MS)
    expect(section).to_contain_text("rotate")
    expect(section.locator("li").first).to_contain_text("reward")
    expect(chart(page, "Reward")).to_be_visible()
    expect(page.locator("h1 + .status")).to_have_text("succeeded", timeout=JOB_MS)


def test_a_failed_job_says_why_and_what_to_do(session: Session, open_page: Open) -> None:
    page = open_page(session.job("too-long"))
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("too_long", timeout=JOB_MS)
    expect(alert).to_contain_text("truncate")  # how to mend it
    expect(page.get_by_text("None: they are written at checkpoints and at the end")).to_be_visible()
    expect(page.locator("main").get_by_text(" yet")).to_have_count(0)  # nothing more is to come


def test_what_a_finished_job_left(session: Session, open_page: Open) -> None:
    page = open_page(session.job("anchored"))
    expect(page.get_by_role("img", name=re.compile("^Histogram of mean weights: 256 rows"))).to_be_visible()
    expect(page.locator("table.rows .text").first).to_contain_text("rotate")
    expect(page.get_by_role("group", name="Checkpoints")).to_contain_text(f"ckpt-step-{NUM_STEPS}")
    shown = json.loads(page.get_by_role("group", name="The configuration as JSON").inner_text())
    assert shown["method"]["weighted"]["preset"] == "anchored"


def test_jobs_are_compared(session: Session, open_page: Open) -> None:
    page = open_page(session.url)
    for name in ("sft", "anchored", "online"):
        page.get_by_label(f"Choose {name} for comparison").check()
    page.get_by_role("link", name="Compare 3 chosen").click()
    rows = page.get_by_role("group", name="The jobs compared").locator("tbody tr")
    expect(rows).to_have_count(3)
    assert "yes" in [row.locator("td").last.inner_text() for row in rows.all()]
    expect(page.get_by_role("img", name=re.compile("^Loss\\..*anchored"))).to_be_visible()


@pytest.mark.parametrize("look", LOOKS)
def test_every_view_is_readable(session: Session, open_page: Open, picture: Any, look: str) -> None:
    """axe finds nothing; nothing is wider than the screen; pictures are taken."""
    page = open_page(session.url, **LOOKS[look], bypass_csp=True)
    compared = ",".join(session.jobs[name] for name in ("sft", "anchored", "online"))
    for name, (place, ready) in {
        "jobs": ("#/", "too-long"),
        "job-finished": (f"#/jobs/{session.jobs['anchored']}", "Mean weight of a row"),
        "job-online": (f"#/jobs/{session.jobs['online']}", "Sampled answers"),
        "job-failed": (f"#/jobs/{session.jobs['too-long']}", "The job failed"),
        "compare": (f"#/compare/{compared}", "Pareto front"),
        "form": (f"#/submit?like={session.jobs['anchored']}", "This job would be accepted"),
    }.items():
        page.evaluate("hash => { location.hash = hash; }", place)
        expect(page.get_by_text(ready).first).to_be_visible(timeout=30_000)
        # Its rules are of colours and names; those of a phone are the light ones.
        violations = [] if look == "phone" else Axe().run(page).response["violations"]
        assert [(v["id"], [n["html"] for n in v["nodes"]]) for v in violations] == [], (look, place)
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, (look, place)
        picture_of(page, f"{name}-{look}")


@pytest.fixture
def picture(browser: Browser) -> Callable[[str, str, str], None]:
    """`picture(url, name, ready)` takes one of each look, once the words `ready` are there."""

    def take_all(url: str, name: str, ready: str) -> None:
        for look, options in LOOKS.items() if PICTURES else ():
            with _context(browser, **options) as page:
                page.goto(url)
                expect(page.get_by_text(ready).first).to_be_visible()
                picture_of(page, f"{name}-{look}")

    return take_all


def picture_of(page: Page, name: str) -> None:
    if PICTURES:
        page.evaluate("dispatchEvent(new Event('beforeprint'))")  # charts out of sight are drawn too
        page.wait_for_timeout(500)
        page.screenshot(path=Path(PICTURES) / f"{name}.png", full_page=True)


@contextmanager
def _context(browser: Browser, **options: Any) -> Iterator[Page]:
    context = browser.new_context(**options)
    try:
        yield context.new_page()
    finally:
        context.close()
