"""Files of every format, good and broken, as records with lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepeft.data import json_values
from edgepeft.data.json_values import JsonValues
from edgepeft.data.records import BadRecord, Record, RecordReader, detect_format, read_records, unread_columns
from edgepeft.errors import BadInput, UsageError

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def write(path: Path, value: Any, *, encoding: str = "utf-8") -> Path:
    text = value if isinstance(value, str) else "\n".join(json.dumps(item, ensure_ascii=False) for item in value) + "\n"
    path.write_bytes(text.encode(encoding))
    return path


def good(path: Path, **options: Any) -> list[Record]:
    records = list(read_records(path, **options))
    assert not [record for record in records if isinstance(record, BadRecord)]
    return [record for record in records if isinstance(record, Record)]


def bad(path: Path) -> list[tuple[int, str]]:
    return [(record.line, record.why) for record in read_records(path) if isinstance(record, BadRecord)]


def said(record: Record) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in record.messages]


def test_alpaca(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add", "input": "1 2", "output": "3", "system": "S", "history": [["a", "b"]]},
        {"instruction": "Say hi", "input": "", "output": "hi"},
    ]
    first, second = good(write(tmp_path / "a.jsonl", rows))
    assert said(first) == [
        ("system", "S"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "Add\n\n1 2"),
        ("assistant", "3"),
    ]
    assert said(second) == [("user", "Say hi"), ("assistant", "hi")]
    assert (first.line, second.line) == (1, 2)


def test_sharegpt_with_calls_and_tools_as_text(tmp_path: Path) -> None:
    tools = json.dumps([{"name": "now", "description": "", "parameters": {}}])
    rows = [
        {
            "conversations": [
                {"from": "human", "value": "Time?"},
                {"from": "function_call", "value": '{"name": "now", "arguments": {"zone": "UTC"}}'},
                {"from": "observation", "value": "12:00"},
                {"from": "gpt", "value": "Noon."},
                {"from": "human", "value": "Thanks"},
            ],
            "tools": tools,
        }
    ]
    (record,) = good(write(tmp_path / "s.json", json.dumps(rows)))
    assert said(record) == [("user", "Time?"), ("assistant", ""), ("tool", "12:00"), ("assistant", "Noon.")]
    (call,) = record.messages[1]["tool_calls"]
    assert call["function"] == {"name": "now", "arguments": {"zone": "UTC"}}
    assert record.messages[2]["tool_call_id"] == call["id"]
    assert len(call["id"]) == 9
    assert record.tools == ({"type": "function", "function": {"name": "now", "description": "", "parameters": {}}},)


def test_messages_with_parts_calls_and_reasoning(tmp_path: Path) -> None:
    turns = [
        {"role": "developer", "content": "S"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": '{"k": 1}'}}],
        },
        {"role": "tool", "content": "r", "tool_call_id": "x"},
        {"role": "assistant", "content": "done", "thinking": "hm"},
    ]
    (record,) = good(write(tmp_path / "m.jsonl", [{"messages": turns}]))
    assert said(record)[:2] == [("system", "S"), ("user", "ab")]
    assert record.messages[2]["tool_calls"][0]["function"]["arguments"] == {"k": 1}
    assert record.messages[4]["reasoning_content"] == "hm"


@pytest.mark.parametrize("names", [("prompt", "completion"), ("prompt", "response"), ("question", "answer")])
def test_prompt_completion_and_its_sure_aliases(tmp_path: Path, names: tuple[str, str]) -> None:
    path = write(tmp_path / "p.jsonl", [{names[0]: "q", names[1]: "a"}])
    assert detect_format(path).format == "prompt-completion"
    (record,) = good(path)
    assert said(record) == [("user", "q"), ("assistant", "a")]


def test_prompt_and_completion_as_messages_train_the_completion_only(tmp_path: Path) -> None:
    (record,) = good(write(tmp_path / "p.jsonl", [{"prompt": TURNS + TURNS[:1], "completion": TURNS[1:]}]))
    assert len(record.messages) == 4
    assert record.context_answers == 1


def test_text_and_a_list_under_data(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", json.dumps({"version": 2, "data": [{"text": "one"}, {"text": "two"}]}, indent=1))
    assert [(record.text, record.line) for record in good(path)] == [("one", 4), ("two", 7)]


def test_csv_with_mapped_columns_and_quoted_line_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "c.csv", 'text,category,other\n"two\nlines",a,1\nthree,b,2\n')
    columns = {"prompt": "text", "completion": "category"}
    records = good(path, columns=columns)
    assert [(record.line, said(record)) for record in records] == [
        (2, [("user", "two\nlines"), ("assistant", "a")]),
        (4, [("user", "three"), ("assistant", "b")]),
    ]
    assert unread_columns(detect_format(path, None, columns), columns) == ("other",)


def test_parquet_counts_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "p.parquet"
    turns: list[Any] = [TURNS, TURNS, [TURNS[0]]]
    pyarrow.parquet.write_table(pyarrow.table({"messages": turns}), path)
    found = list(read_records(path))
    assert [type(record) for record in found] == [Record, Record, BadRecord]
    assert found[2].line == 3
    assert detect_format(path).unit == "row"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_byte_order_marks_are_honoured(tmp_path: Path, encoding: str, suffix: str) -> None:
    texts = {
        "jsonl": '{"text": "é"}\n{"text": "b"}\n',
        "json": '[{"text": "é"},\n{"text": "b"}]',
        "csv": "text\né\nb\n",
    }
    records = good(write(tmp_path / f"f.{suffix}", texts[suffix], encoding=encoding))
    assert [record.text for record in records] == ["é", "b"]


def test_every_bad_record_is_told_with_its_line(tmp_path: Path) -> None:
    text = "\n".join(
        [
            '{"instruction": "a", "output": "b"}',
            '{"instruction": "a", "output": }',
            "",
            '{"instruction": "a", "output": " "}',
            '["list"]',
            json.dumps({"messages": TURNS}),
            '{"instruction": "a"}',
            '{"instruction": "\\ud800", "output": "b"}',
            '{"instruction": "a", "output": "b"}',
        ]
    )
    found = dict(bad(write(tmp_path / "b.jsonl", text + "\n")))
    assert sorted(found) == [2, 4, 5, 6, 7, 8]
    assert found[2] == "not valid JSON: expecting value at column 32"
    assert found[4] == "'output' is empty: there is nothing to learn"
    assert found[5].startswith("is a list")
    assert found[6] == "looks like messages, while the file is alpaca: formats are mixed"
    assert found[7] == "lacks 'output'; it has instruction"
    assert found[8].startswith("holds half of a character")
    assert detect_format(tmp_path / "b.jsonl").others == {"messages": 1}


@pytest.mark.parametrize(
    ("turns", "why"),
    [
        ([], "no turns"),
        ([{"role": "user", "content": "q"}], "no assistant turn"),
        ([{"role": "wizard", "content": "q"}], "unknown role 'wizard'"),
        ([{"content": "q"}], "turn 1 has no role"),
        ([{"role": "user", "content": [{"type": "image"}]}], "part of type 'image'"),
        ([TURNS[0], {"from": "function_call", "value": "f(x)"}], "function call that is not valid JSON"),
        ([TURNS[0], {"role": "assistant", "tool_calls": [{"id": "1"}]}], "without a function name"),
        ([TURNS[0], {"role": "assistant", "content": " "}], "every assistant turn is empty"),
        (["text"], "turn 1 is not an object"),
    ],
)
def test_conversations_that_cannot_be_trained(tmp_path: Path, turns: list[Any], why: str) -> None:
    ((line, found),) = bad(write(tmp_path / "c.jsonl", [{"messages": TURNS}, {"messages": turns}]))
    assert line == 2
    assert why in found


@pytest.mark.parametrize(
    ("name", "content", "line", "why"),
    [
        ("t.json", b'[{"text": "a"},\n{"text": "b"},\n{"text": "c', 3, "truncated"),
        ("t.json", b'[{"text": "a"},\n{"text": "b"}\n', 3, "truncated"),
        ("t.jsonl", b'{"text": "a"}\n{"text": "b', 2, "truncated"),
        ("t.csv", b'text\na\n"b\nc\n', 3, "quote is missing"),
        ("t.json", b'[{"text": "a"}]\n[]', 2, "after the end"),
        ("t.json", b'[{"text": "a"},\n{"text": "\xe9"}]', 2, "byte 0xe9 at offset 26"),
    ],
)
def test_a_file_that_breaks_off_is_told_as_such(tmp_path: Path, name: str, content: bytes, line: int, why: str) -> None:
    (tmp_path / name).write_bytes(content)
    found = [record for record in read_records(tmp_path / name) if isinstance(record, BadRecord)]
    assert len(found) == 1
    assert found[0].fatal
    assert found[0].line == line
    assert why in found[0].why


@pytest.mark.parametrize(
    ("name", "content"), [("w.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n'), ("w.csv", b"text\na\n\xe9\n")]
)
def test_a_line_in_another_encoding_costs_only_itself(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    ((_, why),) = bad(tmp_path / name)
    assert why == f"not UTF-8: byte 0xe9 at offset {content.index(0xE9)} of the file"


def test_a_malformed_record_in_a_list_is_stepped_over(tmp_path: Path) -> None:
    path = write(tmp_path / "b.json", '[\n{"text": "a"},\n{"text": [oops, {"}": 1}]},\n{"text": "c"}\n]')
    records = list(read_records(path))
    assert [(record.line, isinstance(record, BadRecord)) for record in records] == [(2, False), (3, True), (4, False)]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("e.json", b"", "is empty"),
        ("b.jsonl", b" \n\n", "nothing but blanks"),
        ("n.json", b"[]", "no records"),
        ("u.jsonl", b'{"a": 1, "b": 2}\n', "no known format: the records have a, b"),
        ("x.txt", b"hello", "unknown kind of file"),
        ("x.jsonl", b"\x00\x01\x02", "not a text file"),
        ("u.json", '[{"text": "a"}]'.encode("utf-16-le") * 10, "UTF-16 without a mark"),
        ("p.parquet", b"PAR1nothing", "not a readable parquet"),
        ("d.csv", b"a,a\n1,2\n", "names 'a' twice"),
        ("l.jsonl", b'{"text": "\xe9"}\n', "not UTF-8"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput) as caught:
        detect_format(tmp_path / name)
    assert what in str(caught.value)
    assert str(tmp_path / name) in caught.value.where


def test_missing_files_folders_and_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "c.csv", "text,category\na,b\n")
    with pytest.raises(BadInput, match="no such file"):
        detect_format(tmp_path / "missing.json")
    with pytest.raises(BadInput, match=r"folder.*c\.csv"):
        detect_format(tmp_path)
    with pytest.raises(BadInput, match=r"no column 'label'.*text, category"):
        detect_format(path, None, {"prompt": "text", "completion": "label"})
    with pytest.raises(UsageError, match="no field 'promt'"):
        detect_format(path, "prompt-completion", {"promt": "text"})
    with pytest.raises(UsageError, match="unknown format"):
        detect_format(path, "alpacca")


def test_a_large_record_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "l.json", json.dumps([{"text": "word " * 600_000}, {"text": "x"}]))
    reader = RecordReader(path)
    first, second = reader
    assert isinstance(first, Record)
    assert isinstance(second, Record)
    assert first.size > 1_000_000
    assert second.text == "x"
    assert reader.bytes_read == reader.total_bytes


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(st.text(max_size=6), VALUES, max_size=3), max_size=6), st.integers(1, 9), st.booleans())
def test_the_scanner_finds_what_json_finds_however_small_its_chunks(
    values: list[dict[str, Any]], chunk: int, ascii_only: bool
) -> None:
    import io

    text = json.dumps(values, indent=1, ensure_ascii=ascii_only)
    previous = json_values._CHUNK_BYTES
    json_values._CHUNK_BYTES = chunk
    try:
        found = list(JsonValues(io.BytesIO(text.encode()), "utf-8"))
    finally:
        json_values._CHUNK_BYTES = previous
    assert [item.value for item in found] == values
    assert not any(item.why for item in found)
    lines = text.split("\n")
    assert all(lines[item.line - 1].startswith(" {") for item in found)


@given(st.text(alphabet='{}[]",:\\ \nabc1', max_size=60))
def test_the_scanner_ends_on_any_text(text: str) -> None:
    import io

    found = list(JsonValues(io.BytesIO(text.encode()), "utf-8"))
    assert all(item.line <= text.count("\n") + 1 for item in found)
