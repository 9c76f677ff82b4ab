"""Shapes of records that hold a conversation: what is trained on, and what is refused by name."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from cp_megatron.config import DataConfig
from cp_megatron.data.read.chat import load_chats
from cp_megatron.data.read.json_lines import BadLineError
from cp_megatron.data.rows.corpora import check_data
from cp_megatron.data.tokenize.tokenizer import ByteTokenizer
from cp_megatron.errors import ConfigError
from tests.data.chats import FAMILIES, shown, tokenizer_of, write

USER = {"role": "user", "content": "Hi"}
SAID = {"role": "assistant", "content": "Yo"}
PLAIN = "User: Hi\n\nAssistant: Yo"
PARTS = [{"type": "text", "text": "Hi"}]
CALL = {"name": "get", "arguments": {"a": "x"}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [{"function": CALL}]}
WRITTEN = "assistant: CALL " + json.dumps(CALL) + "<|im_end|>"


def turns(**changes: Any) -> dict[str, Any]:
    return {"messages": [USER, SAID | changes]}


def share(first: str, second: str) -> dict[str, Any]:
    return {"conversations": [{"from": first, "value": "Hi"}, {"from": second, "value": "Yo"}]}


# (record, its text without a template)
READ: list[tuple[dict[str, Any], str]] = [
    (turns(), PLAIN),
    ({"conversation": [USER, SAID]}, PLAIN),
    ({"messages": json.dumps([USER, SAID])}, PLAIN),
    (share("human", "gpt"), PLAIN),
    (share("user", "assistant"), PLAIN),
    (share("Human", "model"), PLAIN),
    (share("prompter", "bot"), PLAIN),
    (share("USER", "bing"), PLAIN),
    (share("human", "ai"), PLAIN),
    (share("observation", "chatgpt"), "Tool: Hi\n\nAssistant: Yo"),
    (share("function", "gpt"), "Tool: Hi\n\nAssistant: Yo"),
    (share("developer", "gpt"), "Developer: Hi\n\nAssistant: Yo"),
    (share("human", "gpt") | {"system": "Be."}, "System: Be.\n\n" + PLAIN),
    (share("human", "gpt") | {"system": ""}, PLAIN),
    ({"messages": [USER | {"content": PARTS}, SAID]}, PLAIN),
    ({"messages": [USER | {"content": [*PARTS, "there"]}, SAID]}, PLAIN.replace("Hi", "Hi\nthere")),
    ({"prompt": "Hi", "completion": "Yo"}, PLAIN),
    ({"prompt": "Hi", "response": "Yo"}, PLAIN),
    ({"prompt": [USER], "completion": [SAID]}, PLAIN),
    ({"instruction": "Hi", "output": "Yo"}, PLAIN),
    ({"instruction": "Hi", "input": "", "response": "Yo", "text": "### Hi"}, PLAIN),
    ({"instruction": "Hi", "input": "you", "output": "Yo"}, PLAIN.replace("Hi", "Hi\nyou")),
    (
        {"instruction": "Hi", "output": "Yo", "history": [["a", "b"]], "system": "Be."},
        "System: Be.\n\nUser: a\n\nAssistant: b\n\n" + PLAIN,
    ),
    (turns() | {"chosen": "a", "rejected": "b"}, PLAIN),
]
# (record, a part of the reason, a part of what works)
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"question": "Hi", "answer": "Yo"}, "keys question, answer; none of them", "instruction"),
    ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "preference", "chosen answer"),
    ({"chosen": [USER, SAID], "rejected": [USER, SAID]}, "preference", "messages"),
    ({"prompt": "Hi", "completion": "Yo", "label": False}, "judgement", "without the label"),
    ({"prompt": "Hi", "completions": ["a"], "labels": [True]}, "steps of an answer", "other data"),
    ({"text": "Hi"}, "is a text, not a conversation", "without --sft"),
    ({}, "has no keys", "messages"),
    (turns() | {"images": ["a.png"]}, "has images", "without it"),
    (turns(content=[{"type": "image_url", "image_url": {}}]), "part 'image_url'", "text parts"),
    (turns(content=None), 'has no "content"', "--skip-bad-lines"),
    (turns(weight=0.5), "'weight' 0.5", "--skip-bad-lines"),
    (turns(mask=True), 'has a "mask"', "--skip-bad-lines"),
    ({"messages": [USER | {"train": True}, SAID]}, "only answers have a loss", "--skip-bad-lines"),
    ({"conversations": ["Hi", "Yo"]}, "message 0 is no object", "--skip-bad-lines"),
    ({"messages": [{"speaker": "a", "text": "Hi"}]}, "only speaker, text", "--skip-bad-lines"),
    (share("human", "narrator"), "only turns of narrator, user", "--skip-bad-lines"),
    (turns() | {"tools": "a hammer"}, "'tools' is a string that is not JSON", "--skip-bad-lines"),
    (
        {"messages": [{"role": "system", "content": "A"}, USER, SAID], "system": "B"},
        "another system message",
        "--skip-bad-lines",
    ),
    ({"messages": [USER, CALLED]}, "is not written without a template", "--tokenizer-model"),
]


def chats(place: Path, *records: object) -> str:
    path = place / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


@pytest.mark.parametrize(("record", "text"), READ)
def test_a_shape_that_is_read(record: dict[str, Any], text: str) -> None:
    ((found, trained),) = shown(write(record, ByteTokenizer()), ByteTokenizer())
    assert found == text
    assert trained.endswith("Yo")
    assert "Hi" not in trained


@pytest.mark.parametrize(("record", "reason", "works"), REFUSED)
def test_a_shape_that_is_refused(
    tmp_path: Path, record: dict[str, Any], reason: str, works: str
) -> None:
    path = chats(tmp_path, turns(), record)
    data = DataConfig(data_path=(path,), sft=True)
    for read in (
        lambda: check_data(data),
        lambda: load_chats(path, ByteTokenizer(), seq_length=99, skip_bad=False),
    ):
        with pytest.raises(ConfigError) as caught:
            read()
        assert caught.value.rule.startswith("line 2: ")
        assert reason in caught.value.rule
        assert works in caught.value.works
    corpus, notes = load_chats(path, ByteTokenizer(), seq_length=99, skip_bad=True)
    assert corpus.skipped == 1
    assert notes == [f"{path}: 1 malformed lines left out"]


@pytest.mark.parametrize(
    ("key", "value", "trained"),
    [(k, v, bool(v)) for k in ("weight", "train", "training", "loss") for v in (0, 1, False, 1.0)],
)
def test_a_weight_decides_whether_an_answer_has_a_loss(key: str, value: Any, trained: bool) -> None:
    again = {"role": "assistant", "content": "Again"}
    record = {"messages": [USER, SAID | {key: value}, USER, again]}
    ((_, found),) = shown(write(record, ByteTokenizer()), ByteTokenizer())
    assert found == ("YoAgain" if trained else "Again")


def test_answers_in_a_prompt_have_no_loss() -> None:
    record = {"prompt": [USER, SAID, USER], "completion": [SAID | {"content": "End"}]}
    ((_, trained),) = shown(write(record, ByteTokenizer()), ByteTokenizer())
    assert trained == "End"


@pytest.mark.parametrize(
    "message",
    [
        CALLED,
        {"role": "assistant", "tool_calls": [{"function": CALL}]},
        {"role": "assistant", "tool_calls": json.dumps([{"function": CALL}])},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"role": "tool_call", "content": json.dumps(CALL)},
        {"role": "assistant", "content": None, "function_call": CALL},
    ],
)
def test_calls_of_functions_are_answers(tmp_path: Path, message: dict[str, Any]) -> None:
    tokenizer = tokenizer_of(tmp_path / "model", FAMILIES["appends"])
    result = {"from": "observation", "value": "7"}
    record = {"conversations": [{"from": "human", "value": "Hi"}, message, result, SAID]}
    written = write(record, tokenizer)
    ((text, trained),) = shown(written, tokenizer)
    assert WRITTEN in text
    assert trained == WRITTEN.removeprefix("assistant: ") + "Yo<|im_end|>"
    assert written.remarks == ()


@pytest.mark.parametrize("key", ["tools", "functions"])
@pytest.mark.parametrize("spell", [lambda x: x, json.dumps, lambda x: [json.dumps(y) for y in x]])
def test_tools_go_to_the_template(tmp_path: Path, key: str, spell: Any) -> None:
    transformers = pytest.importorskip("transformers")
    function = {"name": "get", "description": "It's é.", "parameters": {}}
    tools = [{"type": "function", "function": function}]
    tokenizer = tokenizer_of(tmp_path / "model", FAMILIES["appends"])
    record = turns() | {key: spell(tools if key == "tools" else [function])}
    ((tokens, _),) = write(record, tokenizer).examples
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path / "model"))
    expected = oracle.apply_chat_template([USER, SAID], tools=tools, tokenize=True)
    assert tokens.tolist() == expected["input_ids"]


@pytest.mark.parametrize("test", ["m.content is none", "not m.content.strip()"])
@pytest.mark.parametrize("spell", ["a + '{}'", "a.who + '{}'"])
def test_calls_are_written_as_the_template_expects_them(
    tmp_path: Path, test: str, spell: str
) -> None:
    """R1's template asks for null and a string; transformers leaves null out, others differ."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}"
        f"{{% elif m.tool_calls and {test} %}}{{% for c in m.tool_calls %}}"
        f"{{% set a = c.function.arguments %}}CALL {{{{ c.function.name + {spell} }}}}<|im_end|>"
        "{% endfor %}{% else %}{{ m.content.strip() }}<|im_end|>{% endif %}{% endfor %}"
    )
    tokenizer = tokenizer_of(tmp_path / "model", template)
    arguments = {"who": "mice"}
    for given in (arguments, json.dumps(arguments)):
        for content in ({}, {"content": None}, {"content": ""}):
            call = {"function": {"name": "get", "arguments": given}}
            called = {"role": "assistant", "tool_calls": [call], **content}
            written = write({"messages": [USER, called, USER, SAID]}, tokenizer)
            text = "mice" if "who" in spell else json.dumps(arguments)
            assert shown(written, tokenizer)[0][1] == f"CALL get{text}{{}}<|im_end|>Yo<|im_end|>"


def test_a_template_of_its_own_for_tools(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path / "model", "NONE" + FAMILIES["appends"])
    more = tmp_path / "model" / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("USE" + FAMILIES["appends"])
    for tools, beginning in (([], "NONE"), ([{"name": "get"}], "USETOOLS")):
        ((text, _),) = shown(write(turns() | {"tools": tools}, tokenizer), tokenizer)
        assert text.startswith(beginning)


def test_tables_arrays_and_packed_files_are_the_same_as_lines(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [turns(), turns(content="Hello", reasoning_content=None)]
    array, table = tmp_path / "chats.json", tmp_path / "chats.parquet"
    array.write_text("\ufeff" + json.dumps(records, indent=1))
    parquet.write_table(arrow.Table.from_pylist(records), table)
    with arrow.OSFile(str(tmp_path / "chats.arrow"), "wb") as stream:
        rows = arrow.Table.from_pylist(records)
        with arrow.ipc.new_stream(stream, rows.schema) as out:
            out.write_table(rows)
    lines = chats(tmp_path, *records)
    packed = tmp_path / "chats.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(lines).read_bytes()))
    paths = [lines, str(array), str(table), str(tmp_path / "chats.arrow"), str(packed)]
    for path in paths:
        assert check_data(DataConfig(data_path=(path,), sft=True)) == ()
    found = [load_chats(path, ByteTokenizer(), seq_length=99, skip_bad=False) for path in paths]
    assert len({corpus.fingerprint for corpus, _ in found}) == 1
    assert len(found[0][0].document_starts) == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (json.dumps([turns(), 3]), "object 2: not a JSON object"),
        (json.dumps([turns(), {}]), "object 2: a record has no keys"),
        (json.dumps([turns()])[:-1], "object 2: not JSON: the array has no end"),
        (json.dumps([turns()]) + json.dumps(turns()), "object 2: not a JSON object"),
        (json.dumps([turns(), turns()])[:-9], "object 2: not JSON"),
        (json.dumps({"data": [turns()]}, indent=1), "object 1: a record has the keys data"),
    ],
)
def test_a_damaged_array_names_the_element(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "chats.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_chats(str(path), ByteTokenizer(), seq_length=99, skip_bad=False)
    assert caught.value.rule.startswith(reason)


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "chats.json"
    path.write_bytes(json.dumps([turns()]).encode().replace(b"Hi", b"\xff"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_chats(str(path), ByteTokenizer(), seq_length=99, skip_bad=False)


def test_an_object_over_many_lines_is_a_record(tmp_path: Path) -> None:
    path = tmp_path / "chats.json"
    for content in ("Hi", "Hi" * (1 << 20)):
        record = {"messages": [USER | {"content": content}, SAID]}
        path.write_text(json.dumps(record, indent=1))
        assert check_data(DataConfig(data_path=(str(path),), sft=True)) == ()
        corpus, _ = load_chats(str(path), ByteTokenizer(), seq_length=1 << 22, skip_bad=False)
        assert len(corpus.document_starts) == 1


@pytest.mark.parametrize(
    ("record", "note"),
    [
        (turns() | {"tools": [{"name": "get"}]}, "have tools or documents that are not written"),
        (turns() | {"id": 3, "topic": "a"}, "beside the messages that are not read"),
        (turns() | {"chat_template_kwargs": {"depth": 1}}, "that are not read"),
        (turns() | {"depth": 1}, "are not read"),
        (turns(annotation="good"), "have keys in messages that are not read"),
        ({"messages": [USER, {"role": "narrator", "content": "So"}, SAID]}, "another role"),
        ({"prompt": "Hi", "completion": "Yo"}, "are written as a question and an answer"),
    ],
)
def test_what_is_not_written_is_told_with_the_line(
    tmp_path: Path, record: dict[str, Any], note: str
) -> None:
    path = chats(tmp_path, turns(), record, record)
    _, notes = load_chats(path, ByteTokenizer(), seq_length=99, skip_bad=False)
    assert len(notes) == 1
    assert notes[0].startswith(f"{path}: 2 of 3 conversations ")
    assert note in notes[0]
    assert "; the first in line 2: " in notes[0]
    data = DataConfig(data_path=(path,), sft=True)
    assert len(check_data(data, dry_run=True)) == 1
    assert check_data(data) == ()


def test_what_a_template_leaves_out_is_told_or_refused(tmp_path: Path) -> None:
    template = "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.role }}: "
    template += "{{ m.content }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = tokenizer_of(tmp_path / "model", template)
    hidden = write(turns() | {"system": "Be brief."}, tokenizer)
    assert hidden.remarks == (("have text that is not written", '"Be brief." of message 0'),)
    thought = turns(reasoning_content="I greet back.")
    with pytest.raises(BadLineError, match='leaves a part of message 1 out: "I greet'):
        write(thought, tokenizer)
    ((_, trained),) = shown(write(turns(thinking=""), tokenizer), tokenizer)
    assert trained == "Yo<|im_end|>"


def test_keys_that_the_template_reads(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path / "model", "{{ mood }}" + FAMILIES["appends"])
    ((text, _),) = shown(
        write(turns() | {"chat_template_kwargs": {"mood": "calm"}}, tokenizer), tokenizer
    )
    assert text.startswith("calm")
    ((what, key),) = write(turns() | {"mood": "calm"}, tokenizer).remarks
    assert (what.endswith("if chat_template_kwargs held them"), key) == (True, "mood")
    with pytest.raises(BadLineError, match="chat_template_kwargs"):
        write(turns() | {"chat_template_kwargs": {"messages": []}}, tokenizer)


def test_arguments_in_a_string_are_written_as_transformers_does_and_told(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path / "model", FAMILIES["appends"])
    call = {"function": {"name": "get", "arguments": '{"a": "x"}'}}
    written = write({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}, tokenizer)
    assert "with backslashes" in written.remarks[0][0]
    assert '"arguments": "{\\"a\\": \\"x\\"}"' in shown(written, tokenizer)[0][1]
