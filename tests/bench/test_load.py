"""The service under a few dozen clients for a few seconds: nothing lost, nothing doubled, no 5xx."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.bench.load.__main__ import Size, figures, run
from tests.bench.load.clients import Seen, problems
from tests.modeseek_ray.service.conftest import write_model


async def test_nothing_is_lost_or_doubled_under_load(tmp_path: Path) -> None:
    model = write_model(tmp_path / "models" / "base")
    size = Size(seconds=5, submitters=16, pollers=20, listeners=20, drivers=4)
    outcome = await run(size, tmp_path, model)
    assert outcome.problems == []
    seen = outcome.seen
    assert set(seen.statuses) <= {200, 409}  # 409: the same key at the same moment
    assert seen.repeated > 0 and len(seen.answers) > 16
    assert seen.polled_s and seen.queued_s and seen.listed_s
    assert len(seen.streams) == 20 and len(seen.written) == 4
    assert "lost or doubled | nothing" in figures(outcome, size)


def test_what_is_lost_or_doubled_is_found() -> None:
    seen = Seen(statuses=Counter({200: 5, 503: 1}), written=Counter({"job-a": 3}))
    seen.answers["one"] = {"job-a", "job-b"}
    seen.answers["two"] = {"job-c"}
    seen.streams = [("job-a", [1, 2, 4]), ("job-a", [1, 2])]
    found = problems(seen, {"one": "job-a"}, {"job-a": 4})
    assert [text.split()[0] for text in found] == ["1", "key", "key", "a", "a"]
    assert problems(Seen(), {}, {}) == []
