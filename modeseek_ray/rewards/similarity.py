"""`text_similarity`: OpenAI's metrics, each by a library that is known for it. All from 0 to 1, none downloads.

| metric | what it is exactly |
|---|---|
| `fuzzy_match` | `rapidfuzz.fuzz.ratio` over 100, after its `default_process` (case, punctuation) |
| `bleu` | sacreBLEU of one sentence: 13a tokens, orders 1-4 as far as there are any, exponential smoothing |
| `gleu` | Google BLEU of one sentence, NLTK, orders 1-4 on the same 13a tokens |
| `meteor` | METEOR, NLTK: equal words, then equal Porter stems. Without WordNet: no synonyms |
| `rouge_1` … `rouge_5` | F1 of n-grams, Google's `rouge-score`, without stemming |
| `rouge_l` | F1 of the longest common subsequence, by rapidfuzz: the same number in far less time |
| `cosine` | of the two texts' word counts: a bag of words, not an embedding (OpenAI's is, and is for evals only) |

Words of ROUGE, METEOR and cosine are runs of letters and digits in lower case, as `rouge-score` has them,
but of any script; scripts without spaces (Chinese, Japanese, Thai) count by the character.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from modeseek_ray.rewards.grader import GradeItem, SampleError
from modeseek_ray.rewards.parameters import TextSimilarity
from modeseek_ray.rewards.template import parse_template

Metric = Callable[[str, str], float]  # (text, reference) -> [0, 1]


def text_similarity(section: TextSimilarity) -> Callable[[GradeItem], float]:
    """A reference without a single word is the row's error: every answer would get the same zero."""
    left, right = parse_template(section.input), parse_template(section.reference)
    metric = METRICS[section.evaluation_metric]

    def grade_one(item: GradeItem) -> float:
        text, reference = left.render(item), right.render(item)
        if not words(reference):
            raise SampleError(f"the reference {reference[:50]!r} has no words to compare with")
        return min(max(metric(text, reference), 0.0), 1.0) if text else 0.0

    return grade_one


@cache
def _word() -> Any:
    import regex

    alone = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*"
    return regex.compile(rf"{alone}|(?:(?!{alone})[\p{{L}}\p{{N}}\p{{M}}])+")


def words(text: str) -> list[str]:
    """
    >>> words("Don't panic_at 12.5 % — naïve 日本"), words("?!")
    (['don', 't', 'panic', 'at', '12', '5', 'naïve', '日', '本'], [])
    """
    found: list[str] = _word().findall(text.lower())
    return found


def fuzzy_match(text: str, reference: str) -> float:
    """1 - insertions and deletions over the summed lengths, by the character.

    Not `WRatio`, which is kinder to parts: "the" alone gets .9 of "the cat sat on the mat", and a model
    that is trained on such a reward soon says nothing else.
    """
    from rapidfuzz import fuzz, utils

    return fuzz.ratio(text, reference, processor=utils.default_process) / 100


def bleu(text: str, reference: str) -> float:
    import sacrebleu

    score: float = sacrebleu.sentence_bleu(text, [reference]).score
    return score / 100


def gleu(text: str, reference: str) -> float:
    from nltk.translate.gleu_score import sentence_gleu
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    split = Tokenizer13a()
    score: float = sentence_gleu([split(reference).split()], split(text).split())
    return score


class _NoWordNet:
    """WordNet is a download of its own; where it lies would change the grades."""

    def synsets(self, word: str) -> list[Any]:
        return []


def meteor(text: str, reference: str) -> float:
    from nltk.translate.meteor_score import single_meteor_score

    score: float = single_meteor_score(words(reference), words(text), wordnet=_NoWordNet())
    return score


class _Words:
    """`words` as a tokenizer of rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def rouge_n(text: str, reference: str, *, order: int) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    name = f"rouge{order}"
    score: float = RougeScorer([name], tokenizer=_Words()).score(reference, text)[name].fmeasure
    return score


def rouge_l(text: str, reference: str) -> float:
    from rapidfuzz.distance import LCSseq

    theirs, ours = words(reference), words(text)
    return 2 * LCSseq.similarity(ours, theirs) / (len(ours) + len(theirs))  # F1 of LCS/m and LCS/n


def cosine(text: str, reference: str) -> float:
    ours, theirs = Counter(words(text)), Counter(words(reference))
    dot = sum(count * theirs[word] for word, count in ours.items())
    norms = math.sqrt(sum(n * n for n in ours.values()) * sum(n * n for n in theirs.values()))
    return dot / norms if norms else 0.0


METRICS: dict[str, Metric] = {
    "cosine": cosine,
    "fuzzy_match": fuzzy_match,
    "bleu": bleu,
    "gleu": gleu,
    "meteor": meteor,
    **{f"rouge_{n}": partial(rouge_n, order=n) for n in range(1, 6)},
    "rouge_l": rouge_l,
}
