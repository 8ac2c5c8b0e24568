"""Every metric against a number worked out by hand, and against its library where that has one."""

from __future__ import annotations

import math
import socket
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz import fuzz
from rouge_score.rouge_scorer import RougeScorer

from modeseek_ray.rewards import Grade, GradeItem, build_grader
from modeseek_ray.rewards.parameters import TextSimilarity
from modeseek_ray.rewards.similarity import METRICS, words

REFERENCE = "the cat sat on the mat"
ANSWER = "the cat sat on mat"  # n-grams of the reference: 5 of 5, 3 of 4, 2 of 3, 1 of 2, 0 of 1


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("cosine", 6 / math.sqrt(5 * 8)),  # counts (1,1,1,1,1) and (2,1,1,1,1)
        ("bleu", math.exp(1 - 6 / 5) * (5 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)),
        ("gleu", 11 / 18),  # 5 + 3 + 2 + 1 of the reference's 6 + 5 + 4 + 3
        # P = 1, R = 5/6, F = PR / (.9 P + .1 R); words "the" is matched to the last "the": 3 chunks of 5
        ("meteor", (5 / 6) / (0.9 + 0.1 * 5 / 6) * (1 - 0.5 * (3 / 5) ** 3)),
        ("rouge_1", 10 / 11),
        ("rouge_2", 2 * 3 / (4 + 5)),
        ("rouge_3", 2 * 2 / (3 + 4)),
        ("rouge_4", 2 * 1 / (2 + 3)),
        ("rouge_5", 0.0),
        ("rouge_l", 10 / 11),
        ("fuzzy_match", 36 / 40),  # 18 characters of 22 in order: 2 * 18 / (18 + 22)
    ],
)
def test_by_hand(metric: str, expected: float) -> None:
    assert METRICS[metric](ANSWER, REFERENCE) == pytest.approx(expected)


def test_every_metric_of_the_section_is_there_and_none_else() -> None:
    assert set(METRICS) == set(TextSimilarity.model_fields["evaluation_metric"].annotation.__args__)  # type: ignore[union-attr]


@pytest.mark.parametrize("metric", METRICS)
def test_the_same_text_is_as_good_as_can_be_and_another_is_not(metric: str) -> None:
    same = METRICS[metric](REFERENCE, REFERENCE)
    # METEOR takes a little off even then: 0.5 (1 chunk / 6 words)^3.
    assert same == pytest.approx(1 - 0.5 / 6**3 if metric == "meteor" else 1.0)
    assert METRICS[metric]("quick brown foxes jump", REFERENCE) < 0.5


def test_meteor_matches_stems_but_no_synonyms() -> None:
    assert METRICS["meteor"]("the cats sat", "the cat sat") == pytest.approx(1 - 0.5 / 27)
    assert METRICS["meteor"]("big", "large") == 0.0


def test_fuzzy_match_looks_past_case_and_punctuation_and_a_part_is_not_the_whole() -> None:
    assert METRICS["fuzzy_match"]("PARIS!", "paris") == 1.0
    assert METRICS["fuzzy_match"]("the", REFERENCE) == pytest.approx(2 * 3 / 25)
    assert fuzz.WRatio("the", REFERENCE) == pytest.approx(90)  # why it is another function


ASCII_WORDS = st.lists(st.sampled_from("a b c The cat, sat. 12 x-y it's".split()), max_size=12).map(" ".join)


@settings(deadline=None)
@given(ASCII_WORDS, ASCII_WORDS.filter(str.strip))
def test_rouge_is_google_s_on_plain_english(text: str, reference: str) -> None:
    names = [*(f"rouge{n}" for n in range(1, 6)), "rougeL"]
    theirs = RougeScorer(names).score(reference, text)
    for name in names:
        ours = METRICS["rouge_l" if name == "rougeL" else f"rouge_{name[-1]}"](text, reference)
        assert ours == pytest.approx(theirs[name].fmeasure)


@pytest.mark.parametrize("metric", ["cosine", "meteor", "rouge_1", "rouge_l"])
def test_words_are_words_in_any_script(metric: str) -> None:
    assert METRICS[metric]("Привет, мир", "привет мир") > 0.9
    assert METRICS[metric]("日本に行く", "日本へ行く") == pytest.approx(
        0.8 if metric != "meteor" else 0.8 * (1 - 0.5 * (2 / 4) ** 3)
    )


def grader(metric: str, **more: Any) -> Any:
    fields = {"input": "{{ sample.output_text }}", "reference": "{{ item.reference }}", **more}
    return build_grader(TextSimilarity(evaluation_metric=metric, **fields))


@pytest.mark.parametrize("metric", METRICS)
async def test_odd_texts_are_graded_or_refused_one_by_one(metric: str) -> None:
    texts = ["", "?!", "\x00\ud7ff", "a" * 20_000, "a b " * 5_000]
    found = await grader(metric).grade([GradeItem(text, {"reference": REFERENCE}, 1) for text in texts])
    assert found[0] == Grade(0.0)
    assert all(grade.reward is not None and 0 <= grade.reward < 0.3 for grade in found)

    [grade] = await grader(metric).grade([GradeItem("?!", {"reference": "?!"}, 1)])
    assert grade.error == "the reference '?!' has no words to compare with"


async def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a metric wants the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for metric in METRICS:
        [grade] = await grader(metric).grade([GradeItem(ANSWER, {"reference": REFERENCE}, 5)])
        assert grade.error is None


def test_words() -> None:
    assert words("x\u0301y A1_b2") == ["x\u0301y", "a1", "b2"]
