"""Text to tokens, with masks, from a Hugging Face directory and without transformers.

Loading transformers loads torch; the `tokenizers` package reads the same `tokenizer.json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from modeseek_ray.data.rows import Answer, Chat, Completion, Tokens
from modeseek_ray.data.template import ChatTemplate, Message, Span
from modeseek_ray.errors import DataError, ModelError
from modeseek_ray.types import BoolArray

_SPECIAL_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclass(frozen=True)
class Encoded:
    """Tokens of one row and which of them are trained on."""

    token_ids_T: NDArray[np.int32]
    trained_T: BoolArray


class ChatTokenizer:
    """The tokenizer and chat template of a model directory.

    Reads `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja`
    and `config.json`. Raises ModelError if the directory has no fast tokenizer, no end-of-sequence
    token, or a broken template.
    """

    def __init__(self, model_dir: Path | str) -> None:
        self.model_dir = Path(model_dir)
        self._tokenizer = _load_tokenizer(self.model_dir)
        settings = _read_json(self.model_dir / "tokenizer_config.json")
        model = _read_json(self.model_dir / "config.json")
        self.special_tokens = _special_tokens(self.model_dir, settings)
        """Named special tokens as texts: {"eos_token": "<|im_end|>", …}."""
        self.eos_token_id = self._named_id("eos_token")
        self.bos_token_id = self._named_id("bos_token")
        self.pad_token_id = self._named_id("pad_token")
        text_model = model.get("text_config") or model
        self.model_vocabulary: int | None = text_model.get("vocab_size")
        """Rows of the model's embedding, or None where its configuration does not say."""
        self.max_length: int | None = text_model.get("max_position_embeddings")
        """Most positions the model has, or None where its configuration does not say."""
        if self.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no eos_token, so completions could not end.",
                file=str(self.model_dir),
                mend="Name an eos_token of its vocabulary in tokenizer_config.json.",
                code="no_eos_token",
            )
        self.template = self._load_template(settings)
        self._joins_exactly = self._decodes_joined("a", "b")
        self.fingerprint = self._fingerprint()
        """Changes with anything that changes tokens: vocabulary, merges, template, special tokens."""

    def encode(self, rows: Sequence[Answer]) -> list[Encoded | DataError]:
        """Tokens and masks of many rows at once; a row the template refuses gives its error instead.

        Chat rows are the template's text tokenised as a whole; the assistant's characters, including
        the end-of-turn token, are trained. Prompt and completion are tokenised apart, because that
        is what the model meets when it is asked to continue the prompt, and an eos token is added.
        Recorded tokens stay as they are.
        Raises ModelError if a chat row comes and the model has no template.
        """
        chats = {i: row for i, row in enumerate(rows) if isinstance(row, Chat)}
        completions = {i: row for i, row in enumerate(rows) if isinstance(row, Completion)}
        found: dict[int, Encoded | DataError] = {
            i: _recorded(row) for i, row in enumerate(rows) if isinstance(row, Tokens)
        }
        if chats:
            found.update(zip(chats, self._encode_chats([*chats.values()]), strict=True))
        if completions:
            found.update(zip(completions, self._encode_completions([*completions.values()]), strict=True))
        return [found[i] for i in range(len(rows))]

    def encode_prompt(self, row: Sequence[Message] | str, tools: Any = None) -> NDArray[np.int32]:
        """What a generator is asked to continue: a plain prompt, or messages with the generation prompt."""
        if isinstance(row, str):
            return np.array(self._prompt_ids(self._tokenizer.encode(row)), dtype=np.int32)
        text = self._need_template().render(row, tools=tools, add_generation_prompt=True)
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def render(
        self, messages: Sequence[Message], *, tools: Any = None, add_generation_prompt: bool = False
    ) -> str:
        """The chat template's text. Raises ModelError without a template, DataError if it refuses."""
        return self._need_template().render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt
        )

    def decode(self, token_ids_T: Sequence[int] | NDArray[np.int32], *, skip_special: bool = False) -> str:
        return self._tokenizer.decode([int(t) for t in token_ids_T], skip_special_tokens=skip_special)

    def _encode_chats(self, chats: Sequence[Chat]) -> list[Encoded | DataError]:
        template = self._need_template()
        located: list[tuple[str, list[Span]] | DataError] = []
        for chat in chats:
            try:
                located.append(template.locate(chat.messages, chat.tools))
            except DataError as error:
                located.append(error)
        texts = [found[0] for found in located if not isinstance(found, DataError)]
        encodings = iter(self._tokenizer.encode_batch(texts, add_special_tokens=False))
        results: list[Encoded | DataError] = []
        for chat, found in zip(chats, located, strict=True):
            if isinstance(found, DataError):
                results.append(found)
            else:
                spans = [s for s, trained in zip(found[1], chat.trained, strict=True) if trained]
                results.append(_mask(next(encodings), spans))
        return results

    def _encode_completions(self, rows: Sequence[Completion]) -> list[Encoded | DataError]:
        if not self._joins_exactly:
            return self._encode_joined(rows)
        prompts = self._tokenizer.encode_batch_fast([r.prompt for r in rows])
        completions = self._tokenizer.encode_batch_fast(
            [r.completion for r in rows], add_special_tokens=False
        )
        return [self._with_eos(self._prompt_ids(p), c.ids) for p, c in zip(prompts, completions, strict=True)]

    def _encode_joined(self, rows: Sequence[Completion]) -> list[Encoded | DataError]:
        """For tokenizers that write a space before every text (SentencePiece): one text, cut by offsets."""
        encodings = self._tokenizer.encode_batch([r.prompt + r.completion for r in rows])
        results: list[Encoded | DataError] = []
        for row, encoding in zip(rows, encodings, strict=True):
            ids = self._prompt_ids(encoding)
            first = encoding.char_to_token(len(row.prompt))
            cut = len(ids) if first is None else first
            results.append(self._with_eos(ids[:cut], ids[cut:]))
        return results

    def _with_eos(self, prompt: list[int], completion: list[int]) -> Encoded:
        end = [] if completion[-1:] == [self.eos_token_id] else [self.eos_token_id]
        token_ids_T = np.array([*prompt, *completion, *end], dtype=np.int32)
        trained_T = np.zeros(len(token_ids_T), dtype=bool)
        trained_T[max(1, len(prompt)) :] = True  # nothing predicts the first token
        return Encoded(token_ids_T, trained_T)

    def _prompt_ids(self, encoding: Encoding) -> list[int]:
        """The ids without an eos that the tokenizer's own post-processing put at the end."""
        ids: list[int] = encoding.ids
        if ids and ids[-1] == self.eos_token_id and encoding.special_tokens_mask[-1]:
            return ids[:-1]
        return ids

    def _decodes_joined(self, first: str, second: str) -> bool:
        ids = [
            i for part in (first, second) for i in self._tokenizer.encode(part, add_special_tokens=False).ids
        ]
        return bool(self._tokenizer.decode(ids) == first + second)

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._tokenizer.token_to_id(token)

    def _load_template(self, settings: Mapping[str, Any]) -> ChatTemplate | None:
        source = _template_source(self.model_dir, settings)
        if source is None:
            return None
        added = self._tokenizer.get_added_tokens_decoder().values()
        special = {t.content for t in added if t.special} | set(self.special_tokens.values())
        try:
            return ChatTemplate(source, sorted(special), self.special_tokens)
        except jinja2.TemplateError as error:
            raise ModelError(
                f"the chat template cannot be compiled: {error}.",
                file=str(self.model_dir),
                mend="Mend chat_template.jinja.",
                code="bad_chat_template",
            ) from None

    def _need_template(self) -> ChatTemplate:
        if self.template is None:
            raise ModelError(
                "the model has no chat template, but the data has chat rows (`messages`).",
                file=str(self.model_dir),
                mend="Add chat_template.jinja to the model, or send rows of `prompt` and `completion`.",
                code="no_chat_template",
            )
        return self.template

    def _fingerprint(self) -> str:
        template = "" if self.template is None else self.template.source
        parts = [self._tokenizer.to_str(), template, json.dumps(self.special_tokens, sort_keys=True)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _recorded(row: Tokens) -> Encoded:
    position_T = np.arange(len(row.token_ids_T))
    return Encoded(row.token_ids_T, (position_T >= row.num_prompt) & (position_T > 0))


def _mask(encoding: Encoding, spans: Sequence[Span]) -> Encoded:
    """Train the tokens from the one holding a span's first character to the one holding its last."""
    token_ids_T = np.array(encoding.ids, dtype=np.int32)
    trained_T = np.zeros(len(token_ids_T), dtype=bool)
    for start, end in spans:
        if end > start and (first := encoding.char_to_token(start)) is not None:
            last = encoding.char_to_token(end - 1)
            trained_T[first : len(token_ids_T) if last is None else last + 1] = True
    trained_T[:1] = False  # nothing predicts the first token
    return Encoded(token_ids_T, trained_T)


def _load_tokenizer(model_dir: Path) -> Tokenizer:
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            "there is no tokenizer.json.",
            file=str(model_dir),
            mend="Save it with `AutoTokenizer.from_pretrained(…).save_pretrained(…)`.",
            code="no_tokenizer",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises bare Exception
        raise ModelError(
            f"the tokenizer cannot be read: {error}.",
            file=str(path),
            mend="Save it again with the installed version of tokenizers.",
            code="no_tokenizer",
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"cannot be parsed: {error}.", file=str(path), mend="Mend the file.") from None
    return data if isinstance(data, dict) else {}


def _special_tokens(model_dir: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Later formats keep them in tokenizer_config.json, earlier ones in a file of their own."""
    found = {**_read_json(model_dir / "special_tokens_map.json"), **settings}
    tokens = {}
    for name in _SPECIAL_NAMES:
        value = found.get(name)
        if isinstance(value, dict):  # a serialised AddedToken
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _template_source(model_dir: Path, settings: Mapping[str, Any]) -> str | None:
    path = model_dir / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    source = settings.get("chat_template")
    if isinstance(source, list):  # several named templates
        source = {t.get("name"): t.get("template") for t in source}.get("default")
    return source if isinstance(source, str) else None
