"""The page as people meet it: in Chromium, by mouse and keyboard, light, dark, narrow, and at length."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.modeseek_ray.reports import synthetic
from tests.modeseek_ray.service.browser.story import Story
from tests.modeseek_ray.service.conftest import ROWS

Open = Callable[..., Page]
FLOOD = 100_000
WORST_PAUSE_MS = 1000  # of the page's own thread; about 130 where nothing else runs, more beside other tests


@pytest.fixture(scope="module")
def finished(service: Any) -> dict[str, Story]:
    """Two jobs that ran, one that failed."""
    return {
        "plain": Story(service, "plain", gamma_max=0.0, forgets=0.45, learns=1.2).train().checkpoint().succeed(),
        "anchored": Story(service, "anchored").train().checkpoint().succeed(),
        "too-hot": Story(service, "too-hot").train(20).fail("numerics", "loss is nan. Lower the learning rate."),
    }  # fmt: skip


def job_url(service: Any, story: Story) -> str:
    return f"{service.url}/#/jobs/{story.id}"


def test_curves_grow_while_a_job_trains_and_cancel_ends_it(service: Any, open_page: Open) -> None:
    story = Story(service, "growing").train(30)
    page = open_page(job_url(service, story))
    loss = page.get_by_role("img", name=re.compile("^Loss\\."))
    expect(loss).to_be_visible()
    expect(page.locator(".facts")).to_contain_text("30 of 150")
    newest = loss.get_attribute("aria-label")
    story.train(60)
    expect(loss).not_to_have_attribute("aria-label", str(newest))
    expect(page.locator(".facts")).to_contain_text("60 of 150")
    for title in (
        "Effective sample size",
        "γ, and what bound it",
        "Retention, per old task",
        "Time of a step",
    ):
        expect(page.get_by_role("img", name=re.compile(f"^{title}"))).to_have_count(1)
    assert "Reward" in page.locator(".absent").first.inner_text()  # what is not measured is said
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("h1 + .status")).to_have_text("cancelled", timeout=20_000)
    expect(page.get_by_role("button", name="Cancel")).to_have_count(0)
    with service.client() as client:
        assert client.job(story.id)["status"] == "cancelled"


def test_a_job_is_paused_and_resumed(service: Any, open_page: Open) -> None:
    story = Story(service, "to-pause").train(5).checkpoint()
    page = open_page(job_url(service, story))
    page.get_by_role("button", name="Pause").click()
    status = page.locator("h1 + .status")
    expect(status).to_have_text("running (pausing)")
    assert story.obey() == "pause"
    expect(status).to_have_text("paused")
    page.get_by_role("button", name="Resume").click()
    expect(page.get_by_role("button", name="Resume")).to_have_count(0)
    expect(page.locator(".log")).to_contain_text("Attempt 2")


def test_what_is_drawn_is_what_was_told(service: Any, finished: dict[str, Story], open_page: Open) -> None:
    story = finished["anchored"]
    page = open_page(job_url(service, story))
    expect(page.get_by_text("this is all of it")).to_be_visible()
    rows = service.home.metrics_csv(story.id).read_text().splitlines()
    csv = [dict(zip(rows[0].split(","), row.split(","), strict=True)) for row in rows[1:]]
    figure = page.locator("figure", has=page.get_by_role("img", name=re.compile("^Loss\\.")))
    figure.locator("summary").click()
    last = figure.locator("tbody tr").last.locator("th, td").all_inner_texts()
    assert last[0] == csv[-1]["step"] == str(synthetic.NUM_STEPS)
    assert float(last[1]) == pytest.approx(float(csv[-1]["loss"]), rel=1e-3)
    assert float(last[2]) == pytest.approx(float(csv[-1]["nll"]), rel=1e-3)


def test_rows_checkpoints_configuration_and_files_of_a_finished_job(
    service: Any, finished: dict[str, Story], open_page: Open
) -> None:
    page = open_page(job_url(service, finished["anchored"]))
    expect(page.get_by_text("Collect more like these")).to_be_visible()
    expect(page.get_by_role("img", name=re.compile("^Histogram of mean weights: 480 rows"))).to_be_visible()
    expect(page.locator("table.rows .text").first).to_contain_text("roman")
    expect(page.get_by_role("group", name="Checkpoints")).to_contain_text("ckpt-step-150")
    shown = json.loads(page.get_by_role("group", name="The configuration as JSON").inner_text())
    assert shown["method"]["weighted"]["preset"] == "anchored"
    files = page.locator("section", has=page.get_by_role("heading", name="Result files"))
    expect(files).to_contain_text("metrics.csv")
    with page.expect_download() as download:
        files.get_by_role("button", name="Download metrics.csv").click()
    assert download.value.suggested_filename == "metrics.csv"
    with page.expect_download() as download:
        page.get_by_role("button", name="Report").click()
    assert "<title>report</title>" in download.value.path().read_text()


def test_rows_that_all_count_the_same_are_not_listed(
    service: Any, finished: dict[str, Story], open_page: Open
) -> None:
    page = open_page(job_url(service, finished["plain"]))
    expect(page.get_by_text("All 480 rows counted the same: mean weight 1.")).to_be_visible()
    expect(page.locator("table.rows")).to_have_count(0)


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_cut_off_or_too_small_to_read(
    service: Any, finished: dict[str, Story], open_page: Open, width: int
) -> None:
    page = open_page(service.url, viewport={"width": width, "height": 844})
    expect(page.get_by_label("Choose plain for comparison")).to_be_visible()
    assert page.locator(".scroll").evaluate("node => node.scrollWidth - node.clientWidth") <= 0
    page.goto(f"{service.url}/#/compare/{finished['plain'].id},{finished['anchored'].id}")
    letters = "document.querySelector('figure.scatter text.tick')?.getBoundingClientRect().height"
    page.wait_for_function(f"() => {letters} > 10")  # pixels, however narrow the chart
    expect(page.get_by_role("img", name=re.compile("^Loss on held-out rows"))).to_be_visible()
    clipped = "nodes => nodes.filter((node) => node.scrollHeight > node.clientHeight + 1).length"
    assert page.locator(".u-legend").evaluate_all(clipped) == 0
    page.goto(f"{service.url}/#/submit")
    expect(page.get_by_text("Still to do: training_file.")).to_be_in_viewport()  # at the top of a long form
    expect(page.get_by_role("button", name="Submit the job")).to_be_in_viewport()


def test_sampled_answers_stand_side_by_side_best_first(service: Any, open_page: Open) -> None:
    story = Story(service, "rounds").train(2).show_answers(1, [0.5, 0.5])
    page = open_page(job_url(service, story))
    section = page.locator("section", has=page.get_by_role("heading", name="Sampled answers"))
    expect(section).to_contain_text("All rewards are the same")
    story.show_answers(2, [0.1, 0.9, 0.4])
    expect(section.locator("li").first).to_contain_text("best, reward 0.9")
    assert [each.splitlines()[-1] for each in section.locator("li").all_inner_texts()] == [
        "answer 1",
        "answer 2",
        "answer 0",
    ]
    section.get_by_label("Round").select_option(label="Round 1: 2 samples.")
    expect(section.locator("li")).to_have_count(2)


def test_a_failed_job_says_why(service: Any, finished: dict[str, Story], open_page: Open) -> None:
    page = open_page(job_url(service, finished["too-hot"]))
    expect(page.get_by_role("alert")).to_contain_text("Lower the learning rate")
    expect(page.get_by_role("alert")).to_contain_text("numerics")
    expect(page.get_by_text("None: they are written at checkpoints and at the end")).to_be_visible()
    expect(page.get_by_role("button", name="Look now")).to_have_count(0)  # nothing more will come


def test_a_failed_job_goes_on_as_a_new_one(service: Any, open_page: Open) -> None:
    story = Story(service, "to-resume").train(5).checkpoint().fail("numerics", "loss is nan.")
    page = open_page(job_url(service, story))
    page.get_by_role("button", name="Resume as a new job").click()
    page.wait_for_url(lambda url: "#/jobs/" in url and story.id not in url)
    new = page.url.rpartition("/")[2]
    expect(page.locator("h1 + .status")).not_to_have_text("failed")
    with service.client() as client:
        assert client.job(new)["resumed_from"] == story.id


def test_jobs_are_chosen_and_compared(service: Any, finished: dict[str, Story], open_page: Open) -> None:
    page = open_page(service.url)
    for name in ("plain", "anchored"):
        page.get_by_label(f"Choose {name} for comparison").check()
    page.get_by_role("link", name="Compare 2 chosen").click()
    chart = page.get_by_role("img", name=re.compile("^New task against old tasks"))
    expect(chart).to_contain_text("anchored")
    rows = page.get_by_role("group", name="The jobs compared").locator("tbody tr")
    expect(rows).to_have_count(2)
    assert "anchored" in rows.filter(has_text="anchored").inner_text()
    assert rows.filter(has_text="anchored").locator("td").last.inner_text() == "yes"
    expect(page.get_by_role("img", name=re.compile("^Loss\\..*plain"))).to_be_visible()


def test_a_job_is_submitted_by_the_form_and_mistakes_are_shown_at_their_field(
    service: Any, open_page: Open
) -> None:
    service.upload(ROWS * 8, name="to-choose.jsonl")  # enough for the preset's floor on the ESS to bind
    page = open_page(f"{service.url}/#/submit")
    page.get_by_label("Model", exact=True).fill("/nowhere")
    page.get_by_label("Training file", exact=True).select_option(index=1)
    problem = page.locator(".field", has=page.get_by_label("Model", exact=True)).locator(".problem")
    expect(problem).to_contain_text("allowed")  # the service's own words, at the field it names
    page.get_by_label("Model", exact=True).fill(str(service.model))
    expect(page.get_by_text("This job would be accepted")).to_be_visible()
    page.get_by_label("Likelihood", exact=True).select_option("ratio_power")
    page.get_by_label("Gamma", exact=True).first.select_option("ess")
    page.get_by_label("Floor").fill("1.5")
    expect(page.get_by_text("Below 1.")).to_be_visible()
    page.get_by_label("Floor").fill("0.4")
    page.get_by_label("Suffix").fill("by-form")
    expect(page.get_by_text("This job would be accepted")).to_be_visible()
    page.get_by_role("button", name="Submit the job").click()
    expect(page.get_by_role("heading", name="by-form")).to_be_visible()
    with service.client() as client:
        job = client.job(page.url.rpartition("/")[2])
    assert job["method"]["weighted"]["likelihood"]["gamma"] == {"ess": {"floor": 0.4}}
    page.get_by_role("link", name="Again, with changes").click()
    expect(page.get_by_label("Floor")).to_have_value("0.4")


def test_a_key_is_asked_for_once_and_used_for_the_stream_too(start_service: Any, open_page: Open) -> None:
    service = start_service()
    story = Story(service, "private").train(5)
    key, _ = service.store.keys.create("mine")
    page = open_page(job_url(service, story))
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Key", exact=True).fill("msk_wrong_key")
    dialog.get_by_role("button", name="Use it").click()
    expect(dialog).to_contain_text("Give another key")
    dialog.get_by_label("Key", exact=True).fill(key)
    dialog.get_by_role("button", name="Use it").click()
    expect(page.get_by_role("img", name=re.compile("^Loss\\."))).to_be_visible()
    page.reload()
    expect(page.get_by_text("Following live")).to_be_visible()
    expect(dialog).not_to_be_visible()
    assert key not in page.content()


def test_a_cut_stream_goes_on_where_it_was(service: Any, open_page: Open) -> None:
    story = Story(service, "cut").train(10)
    page = open_page(job_url(service, story))
    expect(page.get_by_text("Following live.")).to_be_visible()
    page.context.set_offline(True)
    story.train(20)
    page.context.set_offline(False)
    expect(page.locator(".facts")).to_contain_text("20 of 150")
    stored = len(list(service.store.events.after(story.id, 0)))
    expect(page.get_by_text(f"{stored} events.")).to_be_visible(timeout=30_000)


def test_everything_is_reached_by_keyboard(service: Any, finished: dict[str, Story], open_page: Open) -> None:
    page = open_page(job_url(service, finished["anchored"]))
    chart = page.get_by_role("img", name=re.compile("^Loss\\."))
    expect(chart).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    for _ in range(12):
        page.keyboard.press("Tab")
        if chart.evaluate("node => node === document.activeElement"):
            break
    expect(chart).to_be_focused()
    page.keyboard.press("Home")
    expect(page.locator("figure").first.locator("[aria-live]")).to_contain_text(
        re.compile(r"^Step \d: weighted")
    )


@pytest.mark.parametrize("look", ["light", "dark", "narrow"])
def test_axe_finds_nothing_serious(
    service: Any, finished: dict[str, Story], open_page: Open, look: str
) -> None:
    options: dict[str, Any] = {"color_scheme": "dark" if look == "dark" else "light"}
    if look == "narrow":
        options["viewport"] = {"width": 390, "height": 844}
    both = f"{finished['plain'].id},{finished['anchored'].id}"
    page = open_page(service.url, **options, bypass_csp=True)
    for place, ready in {
        "#/": "anchored",
        f"#/jobs/{finished['anchored'].id}": "Collect more like these",
        f"#/jobs/{finished['too-hot'].id}": "Lower the learning rate",
        f"#/compare/{both}": "Pareto front",
        f"#/submit?like={finished['anchored'].id}": "As JSON",
    }.items():
        page.evaluate("hash => { location.hash = hash; }", place)
        expect(page.get_by_text(ready).first).to_be_visible()
        violations = Axe().run(page).response["violations"]
        assert [(v["id"], [n["html"] for n in v["nodes"]]) for v in violations] == [], place
        width = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert width <= 0, f"{place} is wider than the screen"


def test_a_hundred_thousand_events_stay_smooth(service: Any, open_page: Open) -> None:
    story = Story(service, "long").train(1)
    story.flood(FLOOD)
    page = open_page("about:blank")
    page.add_init_script(
        "window.longest = 0; new PerformanceObserver((list) => { for (const entry of list.getEntries())"
        " longest = Math.max(longest, entry.duration); }).observe({ entryTypes: ['longtask'] });"
    )
    started = time.monotonic()
    page.goto(job_url(service, story))
    expect(page.locator(".facts")).to_contain_text("Loss")
    expect(page.locator("main")).to_contain_text(re.compile(r"100,0\d\d events"), timeout=60_000)
    took_s = time.monotonic() - started
    longest_ms = page.evaluate("longest")
    redraw_ms = page.evaluate(
        "() => { const t = performance.now(); dispatchEvent(new Event('beforeprint')); return performance.now() - t; }"
    )
    print(
        f"{FLOOD} events in {took_s:.1f} s; longest task {longest_ms:.0f} ms; all figures drawn in {redraw_ms:.0f} ms"
    )
    assert longest_ms < WORST_PAUSE_MS
    assert redraw_ms < 2 * WORST_PAUSE_MS
