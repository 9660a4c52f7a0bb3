"""Prompts: reading, rendering, messages about bad rows, and the stateless shuffled stream."""

from __future__ import annotations

import csv
import json
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from messages import refused
from zoo import tokenizer

from katds.data.prompts import PromptSet, load_prompts
from katds.sections import DataConfig

TOKENIZER = tokenizer()
ROWS: list[dict[str, Any]] = [{"prompt": f"w{i} w1", "answer": f"a{i}"} for i in range(5)]


def load(path: Path, **data: Any) -> PromptSet:
    keywords = {name: data.pop(name) for name in ("limit", "shuffle", "seed") if name in data}
    return load_prompts(path, TOKENIZER, DataConfig(train=path, **data), **keywords)


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def as_file(folder: Path, kind: str) -> Path:
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        return jsonl(path, [*ROWS[:2], "", *ROWS[2:]])
    if kind == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "answer"])
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "parquet":
        Dataset.from_list(ROWS).to_parquet(str(path))
    elif kind == "saved":
        Dataset.from_list(ROWS).save_to_disk(str(path))
    else:
        path.mkdir()
        jsonl(path / "b.jsonl", ROWS[3:])
        jsonl(path / "a.jsonl", ROWS[:3])
        (path / "README.md").write_text("no data")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "saved", "folder"])
def test_every_format_gives_the_same_prompts(tmp_path: Path, kind: str) -> None:
    prompts = load(as_file(tmp_path, kind))
    expected = [TOKENIZER(f"<user> {row['prompt']} <assistant>")["input_ids"] for row in ROWS]
    assert [list(prompt.token_ids) for prompt in prompts] == expected
    assert [(prompt.index, prompt.answer) for prompt in prompts] == [(i, f"a{i}") for i in range(5)]


def test_messages_are_rendered_and_plain_text_is_not(tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "w3"},
        {"role": "assistant", "content": "w4"},
        {"role": "user", "content": "w5"},
    ]
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": chat}, {"prompt": "w3"}])
    rendered, single = load(path, answer_column=None)
    assert TOKENIZER.decode(rendered.token_ids) == "<user> w3 <assistant> w4 <user> w5 <assistant>"
    assert TOKENIZER.decode(single.token_ids) == "<user> w3 <assistant>"
    plain = load(jsonl(tmp_path / "b.jsonl", [{"prompt": "w3 w4"}]), answer_column=None, chat_template=False)
    assert TOKENIZER.decode(plain[0].token_ids) == "w3 w4"
    refused(lambda: load(path, answer_column=None, chat_template=False), "a.jsonl:1", "data.chat_template=true")


def test_template_options_reach_the_template(tmp_path: Path) -> None:
    other = tokenizer()
    other.chat_template = "{{ 'w7' if thinking else 'w8' }}"
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    data = DataConfig(train=path, template_options={"thinking": True})
    assert other.decode(load_prompts(path, other, data)[0].token_ids) == "w7"


def test_the_template_writes_the_start_token_once(tmp_path: Path) -> None:
    other = tokenizer()
    from tokenizers.processors import TemplateProcessing

    # Like Llama's: the tokenizer adds a start token, and so does the template.
    other.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    other.chat_template = "<eos> {{ messages[0]['content'] }}"
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "w1", "answer": "x"}])
    w1 = other.convert_tokens_to_ids("w1")
    assert load_prompts(path, other, DataConfig(train=path))[0].token_ids == (1, w1)
    assert load_prompts(path, other, DataConfig(train=path, chat_template=False))[0].token_ids == (1, w1)


def test_answers_become_text_or_none(tmp_path: Path) -> None:
    answers: list[Any] = [42, "x+1", None, 0.5, "  7 ", "", 27.0]
    rows = [{"prompt": "w1", "answer": answer} for answer in answers]
    prompts = load(jsonl(tmp_path / "a.jsonl", [*rows, {"prompt": "w1"}]))
    assert [prompt.answer for prompt in prompts] == ["42", "x+1", None, "0.5", "7", None, "27", None]
    nested = jsonl(tmp_path / "b.jsonl", [{"prompt": "w1", "answer": [1]}])
    refused(lambda: load(nested), "b.jsonl:1", "'answer' is a list")


NESTED = [
    {"id": i, "chat": {"prompt": f"w{i}"}, "reward_model": {"ground_truth": str(i), "style": "rule"}} for i in range(3)
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_column_may_be_a_field_of_another(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    jsonl(path, NESTED) if kind == "jsonl" else Dataset.from_list(NESTED).to_parquet(str(path))
    columns = {"prompt_column": "chat.prompt", "answer_column": "reward_model.ground_truth"}
    prompts = load(path, **columns)
    assert [TOKENIZER.decode(prompt.token_ids) for prompt in prompts] == [f"<user> w{i} <assistant>" for i in range(3)]
    assert [prompt.answer for prompt in prompts] == ["0", "1", "2"]
    refused(
        lambda: load(path, **columns | {"prompt_column": "chat.promt"}), "data.prompt_column=chat.prompt", "no column"
    )
    refused(lambda: load(path, **columns | {"answer_column": "id.x"}), "'id.x'", "reward_model.ground_truth")
    refused(lambda: load(path, **columns | {"answer_column": "chat"}), "'chat' is a dict")
    flat = jsonl(tmp_path / "flat.jsonl", [{"chat.prompt": "w9", "chat": {"prompt": "w1"}}])
    assert TOKENIZER.decode(load(flat, **columns | {"answer_column": None})[0].token_ids) == "<user> w9 <assistant>"


def test_the_suffix_ends_the_last_message(tmp_path: Path) -> None:
    chat = [{"role": role, "content": f"w{i}"} for i, role in enumerate(("user", "assistant", "user"))]
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": chat}, {"prompt": "w5"}])
    with_suffix = {"prompt_suffix": " w6 w7", "answer_column": None}
    texts = [TOKENIZER.decode(prompt.token_ids) for prompt in load(path, **with_suffix)]
    assert texts == ["<user> w0 <assistant> w1 <user> w2 w6 w7 <assistant>", "<user> w5 w6 w7 <assistant>"]
    plain = jsonl(tmp_path / "b.jsonl", [{"prompt": "w5"}])
    assert TOKENIZER.decode(load(plain, chat_template=False, **with_suffix)[0].token_ids) == "w5 w6 w7"
    parts = jsonl(tmp_path / "c.jsonl", [{"prompt": [{"role": "user", "content": [{"text": "w1"}]}]}])
    refused(lambda: load(parts, **with_suffix), "c.jsonl:1", "data.prompt_suffix")


def test_limit_takes_the_first_rows(tmp_path: Path) -> None:
    assert [prompt.answer for prompt in load(jsonl(tmp_path / "a.jsonl", ROWS), limit=2)] == ["a0", "a1"]


BAD_ROWS = [
    (["{'prompt': 3}"], ["a.jsonl:3 is not valid JSON", "character 2"]),
    ([[1, 2]], ["a.jsonl:3 holds a list", "JSON object"]),
    (
        [{"promt": "w1", "answer": "x"}],
        ["a.jsonl:3 has no column 'prompt'", "promt, answer", "data.prompt_column=promt"],
    ),
    ([{"text": "w1", "id": 1}], ["Columns found: text, id", "Set data.prompt_column to one of them"]),
    ([{"prompt": "  ", "answer": "x"}], ["a.jsonl:3", "'prompt' is empty"]),
    ([{"prompt": None, "answer": "x"}], ["a.jsonl:3", "'prompt' is empty"]),
    ([{"prompt": 7, "answer": "x"}], ["a.jsonl:3", "'prompt' is a int", "list of {role, content}"]),
    ([{"prompt": [{"role": "user"}]}], ["a.jsonl:3", "'prompt' is a list"]),
    ([{"prompt": [{"role": "assistant", "content": "w1"}]}], ["a.jsonl:3", "the last message is the assistant's"]),
    ([{"prompt": "w1 " * 30}], ["a.jsonl:3", "32 tokens", "data.max_prompt_tokens 20"]),
]


@pytest.mark.parametrize(("rows", "pieces"), BAD_ROWS)
def test_bad_rows_are_named_by_file_and_line(tmp_path: Path, rows: list[Any], pieces: list[str]) -> None:
    path = jsonl(tmp_path / "a.jsonl", [ROWS[0], "", *rows, ROWS[1]])
    refused(lambda: load(path, max_prompt_tokens=20), *pieces)


def test_bad_rows_of_other_formats_are_named_by_row(tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "", "answer": "x"}]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    refused(lambda: load(tmp_path / "a.parquet"), "a.parquet row 6")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    refused(lambda: load(tmp_path / "a.json"), "a.json row 6")
    (tmp_path / "a.csv").write_text('prompt,answer\n"w1\nw2",3\n,4\n')
    refused(lambda: load(tmp_path / "a.csv"), "a.csv:4")


def test_a_missing_answer_column_is_an_error_unless_null(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "w1", "answers": "x"}])
    refused(lambda: load(path), "no column 'answer'", "data.answer_column=answers", "or null")
    assert load(path, answer_column=None)[0].answer is None


def test_bad_paths_are_explained(tmp_path: Path) -> None:
    refused(lambda: load(tmp_path / "none.jsonl"), "data.train is", "none.jsonl", "does not exist")
    (tmp_path / "a.txt").write_text("x")
    refused(lambda: load(tmp_path / "a.txt"), "'.txt'", ".jsonl, .json, .csv, .parquet")
    (tmp_path / "empty").mkdir()
    refused(lambda: load(tmp_path / "empty"), "folder without such files")
    refused(lambda: load(jsonl(tmp_path / "a.jsonl", [])), "holds no rows")
    (tmp_path / "bad.parquet").write_bytes(b"nonsense")
    refused(lambda: load(tmp_path / "bad.parquet"), "bad.parquet cannot be read as parquet")
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "splits"))
    refused(lambda: load(tmp_path / "splits"), "holds the splits train")


def test_tokenizer_troubles_are_explained(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    data = DataConfig(train=path)
    other = tokenizer()
    other.chat_template = None
    refused(
        lambda: load_prompts(path, other, data),
        "student's chat template, but its tokenizer has none",
        "data.chat_template=false",
    )
    other.chat_template = "{{ raise_exception('Roles must alternate. Really.') }}"
    refused(lambda: load_prompts(path, other, data), "a.jsonl:1", "Roles must alternate")
    other.chat_template = "{{ '' }}"
    refused(lambda: load_prompts(path, other, data), "a.jsonl:1", "no tokens")


def stream(size: int, seed: int = 0, shuffle: bool = True) -> PromptSet:
    return PromptSet([array("i", [i]) for i in range(size)], [None] * size, seed=seed, shuffle=shuffle)


@given(st.integers(1, 12), st.integers(0, 40), st.lists(st.integers(1, 9), max_size=6), st.booleans())
def test_any_split_into_batches_gives_the_same_stream(size: int, cursor: int, counts: list[int], shuffle: bool) -> None:
    whole = stream(size, shuffle=shuffle).batch(cursor, sum(counts))
    parts, place = [], cursor
    for count in counts:
        parts += stream(size, shuffle=shuffle).batch(place, count)  # a fresh object: nothing but the cursor is kept
        place += count
    assert parts == whole


@given(st.integers(1, 20), st.integers(0, 5), st.integers(0, 3))
def test_every_epoch_holds_each_prompt_once(size: int, epoch: int, seed: int) -> None:
    indices = [prompt.index for prompt in stream(size, seed).batch(epoch * size, size)]
    assert Counter(indices) == Counter(range(size))


def test_orders_differ_between_epochs_and_seeds_and_never_change() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [prompt.index for prompt in stream(8, seed).batch(8 * epoch, 8)]

    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert order(0, 0) == [2, 5, 3, 4, 0, 1, 7, 6]
    assert [prompt.index for prompt in stream(3, shuffle=False).batch(2, 5)] == [2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("epochs", "per_step", "steps"), [(1, 10, 3), (3, 10, 9), (0.1, 3, 1), (1, 7, 5), (0.001, 10, 1), (2, 100, 1)]
)
def test_steps_for(epochs: float, per_step: int, steps: int) -> None:
    assert stream(30).steps_for(epochs, per_step) == steps
