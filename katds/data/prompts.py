"""Training and evaluation prompts: rendered, tokenised, and dealt out from an endless shuffled stream.

Invariants: a batch is a pure function of (seed, cursor, count), so resuming needs only the number of prompts consumed;
every epoch holds each prompt once.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from katds.core.counter import key
from katds.core.types import Prompt
from katds.data.rows import read_rows
from katds.errors import ConfigError, first_sentence
from katds.sections import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_ROWS = 1000
REMEDY_NO_TEMPLATE = "Set data.chat_template=false, or put a chat_template into the tokenizer"
_ABSENT: Any = object()  # a column that a row lacks; what it holds may be null


class PromptSet:
    """Prompts with a stateless cursor.

    Epoch e visits the prompts in the order of `counter.key(seed, e, index)`, smallest first: SplitMix64, so the order
    never depends on a library's version.
    """

    def __init__(
        self,
        token_ids: list[array[int]],
        answers: list[str | None],
        *,
        seed: int,
        shuffle: bool,
        teachers: list[int] | None = None,
        teacher_ids: list[array[int]] | None = None,
    ) -> None:
        assert len(token_ids) == len(answers) > 0, f"{len(token_ids)} prompts, {len(answers)} answers"
        self._token_ids, self._answers, self._teachers = token_ids, answers, teachers or [0] * len(answers)
        self._teacher_ids = teacher_ids
        self._seed, self._shuffle = seed, shuffle
        self._order = lru_cache(maxsize=2)(self._make_order)  # a batch touches at most few epochs, in order

    def __len__(self) -> int:
        return len(self._token_ids)

    def __getitem__(self, index: int) -> Prompt:
        other = () if self._teacher_ids is None else tuple(self._teacher_ids[index])
        return Prompt(index, tuple(self._token_ids[index]), self._answers[index], self._teachers[index], other)

    def __iter__(self) -> Iterator[Prompt]:
        return (self[index] for index in range(len(self)))

    def batch(self, cursor: int, count: int) -> list[Prompt]:
        """The prompts at positions cursor..cursor+count of the endless stream; may cross epochs."""
        places = (divmod(position, len(self)) for position in range(cursor, cursor + count))
        return [self[self._order(epoch)[offset]] for epoch, offset in places]

    def steps_for(self, epochs: float, prompts_per_step: int) -> int:
        """Steps that show every prompt at least `epochs` times; the last step may run into the next epoch."""
        # Rounded, because 0.1 * 30 is a little more than 3.
        return max(1, math.ceil(round(epochs * len(self), 6) / prompts_per_step))

    def _make_order(self, epoch: int) -> array[int]:
        indices = range(len(self))
        return array(
            "q", sorted(indices, key=lambda index: key(self._seed, epoch, index)) if self._shuffle else indices
        )


class _Item(NamedTuple):
    place: str
    prompt: str | list[dict[str, Any]]
    answer: str | None
    teacher: int


def load_prompts(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    *,
    seed: int = 0,
    shuffle: bool | None = None,
    limit: int | None = None,
    field: str = "data.train",
    section: str = "data",
    teachers: Sequence[str] = (),
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> PromptSet:
    """Prompts of a file or folder. `shuffle` defaults to data.shuffle; `limit` takes the first rows. `teachers` are the names that
    data.teacher_column may hold; without them it is not read. `teacher_tokenizer`: each prompt also as a teacher with a tokenizer
    of its own reads it, by that one's chat template (with data.chat_template teacher by that alone).

    `field` is the setting that named `path`, `section` the one that named the columns, for errors. Raises ConfigError with file
    and line: unreadable data, missing column or value, no chat template, prompt too long.
    """
    own = data.chat_template is True
    other = (
        ", or set it to teacher: the student then reads prompts as they are" if teacher_tokenizer is not None else ""
    )
    _check_template("student", tokenizer, own, REMEDY_NO_TEMPLATE + other)
    if teacher_tokenizer is not None:
        _check_template("teacher", teacher_tokenizer, bool(data.chat_template), REMEDY_NO_TEMPLATE)
    items = _read(path, data, limit, field, section, teachers)
    token_ids = _tokenise_all(items, tokenizer, data, own, data.max_prompt_tokens)
    teacher_ids = None
    if teacher_tokenizer is not None:
        teacher_ids = _tokenise_all(items, teacher_tokenizer, data, bool(data.chat_template), None)
    shuffle = data.shuffle if shuffle is None else shuffle
    answers, owners = [item.answer for item in items], [item.teacher for item in items]
    return PromptSet(token_ids, answers, seed=seed, shuffle=shuffle, teachers=owners, teacher_ids=teacher_ids)


def _check_template(owner: str, tokenizer: PreTrainedTokenizerBase, templated: bool, remedy: str) -> None:
    if templated and not tokenizer.chat_template:
        raise ConfigError(
            f"data.chat_template asks for the {owner}'s chat template, but its tokenizer has none. {remedy}."
        )


def _read(
    path: Path, data: DataConfig, limit: int | None, field: str, section: str, teachers: Sequence[str]
) -> list[_Item]:
    items: list[_Item] = []
    answered = data.answer_column is None
    columns: dict[str, None] = {}
    for place, row in read_rows(path, field):
        if len(items) == limit:
            break
        value = _cell(row, data.prompt_column)
        if value is _ABSENT:
            _no_column(place, f"{section}.prompt_column", data.prompt_column, _names(row), "")
        answered = answered or _cell(row, str(data.answer_column)) is not _ABSENT
        if not answered:
            columns.update(dict.fromkeys(_names(row)))
        prompt, answer = _prompt(value, place, data), _answer(row, place, data)
        items.append(_Item(place, prompt, answer, _teacher(row, place, data, teachers)))
    if not items:
        raise ConfigError(f"{field} is {path}, which holds no rows. Give a file with at least one prompt.")
    if not answered:
        _no_column(
            str(path), f"{section}.answer_column", str(data.answer_column), list(columns), ", or null for no answers"
        )
    return items


def _cell(row: Mapping[str, Any], column: str) -> Any:
    """What is in a column, or in a field of the object in it ("reward_model.ground_truth"); _ABSENT where there is none."""
    if column in row:
        return row[column]
    outer, dot, inner = column.partition(".")
    nested = row.get(outer) if dot else None
    return _cell(nested, inner) if isinstance(nested, dict) else _ABSENT


def _names(row: Mapping[str, Any]) -> list[str]:
    """The columns of a row, and the fields of the objects in them."""
    return [
        name
        for column, value in row.items()
        for name in (column, *(f"{column}.{inner}" for inner in (_names(value) if isinstance(value, dict) else ())))
    ]


def _no_column(place: str, field: str, name: str, found: list[str], more: str) -> None:
    close = get_close_matches(name, found, 1)
    remedy = f"Set {field}={close[0]}" if close else f"Set {field} to one of them"
    columns = ", ".join(found) or "none"
    raise ConfigError(f"{place} has no column {name!r} ({field}). Columns found: {columns}. {remedy}{more}.")


def _prompt(value: Any, place: str, data: DataConfig) -> str | list[dict[str, Any]]:
    if isinstance(value, str) and value.strip():
        return value + data.prompt_suffix
    if not value or isinstance(value, str):
        raise ConfigError(f"{place}: column {data.prompt_column!r} is empty. Give it a prompt or remove the row.")
    if not isinstance(value, list) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value):
        kind = type(value).__name__
        raise ConfigError(
            f"{place}: column {data.prompt_column!r} is a {kind}. Give text or a list of {{role, content}}."
        )
    if data.chat_template is not True:
        raise ConfigError(f"{place}: the prompt is a list of messages. Set data.chat_template=true.")
    last = value[-1]
    if last["role"] == "assistant":
        raise ConfigError(f"{place}: the last message is the assistant's. Remove it: the student writes the response.")
    if not data.prompt_suffix:
        return value
    if not isinstance(last["content"], str):
        raise ConfigError(
            f"{place}: the last message is not plain text. Remove data.prompt_suffix, or write text there."
        )
    return [*value[:-1], {**last, "content": last["content"] + data.prompt_suffix}]


def _answer(row: dict[str, Any], place: str, data: DataConfig) -> str | None:
    value = _cell(row, data.answer_column) if data.answer_column is not None else None
    if value is None or value is _ABSENT:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of numbers with a gap, or with one fraction, is read as floats: 27 as 27.0
    if isinstance(value, str | int | float):
        return str(value).strip() or None
    kind = type(value).__name__
    raise ConfigError(f"{place}: column {data.answer_column!r} is a {kind}. Give text or a number.")


def _teacher(row: dict[str, Any], place: str, data: DataConfig, teachers: Sequence[str]) -> int:
    if not teachers or data.teacher_column is None:
        return 0
    name = _cell(row, data.teacher_column)
    if name is _ABSENT:
        _no_column(place, "data.teacher_column", data.teacher_column, _names(row), "")
    if name is None or not str(name).strip():
        return 0
    if str(name).strip() not in teachers:
        raise ConfigError(
            f"{place}: column {data.teacher_column!r} is {str(name)!r}, which names no teacher. Teachers are {', '.join(teachers)}, or "
            "nothing for the first one."
        )
    return 1 + list(teachers).index(str(name).strip())


def _tokenise_all(
    items: list[_Item], tokenizer: PreTrainedTokenizerBase, data: DataConfig, templated: bool, longest: int | None
) -> list[array[int]]:
    starts = range(0, len(items), BATCH_ROWS)
    return [ids for at in starts for ids in _tokenise(items[at : at + BATCH_ROWS], tokenizer, data, templated, longest)]


def _tokenise(
    items: list[_Item], tokenizer: PreTrainedTokenizerBase, data: DataConfig, templated: bool, longest: int | None
) -> list[array[int]]:
    texts = [_render(item, tokenizer, data) if templated else str(item.prompt) for item in items]
    # A template writes the start token itself; a second one would shift the model off its training distribution.
    batch = tokenizer(texts, add_special_tokens=not templated, return_attention_mask=False)["input_ids"]
    for item, ids in zip(items, batch, strict=True):
        if not ids:
            raise ConfigError(f"{item.place}: the prompt has no tokens. Give it a prompt or remove the row.")
        if longest is not None and len(ids) > longest:
            raise ConfigError(
                f"{item.place}: the prompt has {len(ids)} tokens, more than data.max_prompt_tokens "
                f"{longest}. Raise data.max_prompt_tokens or remove the row."
            )
    return [array("i", ids) for ids in batch]


def _render(item: _Item, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> str:
    messages = [{"role": "user", "content": item.prompt}] if isinstance(item.prompt, str) else item.prompt
    options: dict[str, Any] = dict(data.template_options)
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options))
    except Exception as error:  # templates raise what they like
        reason = first_sentence(error)
        raise ConfigError(f"{item.place}: the chat template refused it ({reason}). Change the messages.") from None
