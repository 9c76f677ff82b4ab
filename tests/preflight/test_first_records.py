"""The first records of the data are read before torch is loaded, in a dry run and in a real one."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from cp_megatron.data.rows import small_data
from cp_megatron.errors import ConfigError
from tests.preflight.test_check import plan, refused

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}


def lines(path: Path, *records: object) -> str:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in records))
    return str(path)


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("records", "flags", "reason", "works"),
    [
        ([{"content": "a"}] * 9, [], "line 1: has no key 'text', but 'content'", "--json-keys"),
        ([{"content": "a"}] * 9, ["--skip-bad-lines"], "has no key 'text'", "--json-keys"),
        ([{"text": "a"}, "{"], [], "line 2: not JSON", "--skip-bad-lines"),
        ([{"q": "a"}] * 9, ["--sft", "--skip-bad-lines"], "8 records are left out", "messages"),
        ([GOOD, "{"], ["--sft"], "line 2: not JSON", "--skip-bad-lines"),
        ([{"q": "a", "a": "b"}], ["--sft"], "line 1: a record has the keys q, a;", "messages"),
        (
            [GOOD, {"messages": [{"content": "a"}]}],
            ["--sft"],
            'line 2: message 0 has no "role"',
            "",
        ),
    ],
)
def test_bad_data_is_refused_in_time(
    tmp_path: Path,
    records: list[object],
    flags: list[str],
    reason: str,
    works: str,
    dry_run: list[str],
) -> None:
    path = lines(tmp_path / "data.jsonl", *records)
    start = time.process_time()
    error = refused("--data-path", path, *flags, *dry_run)
    assert time.process_time() - start < 1
    assert (error.flag, error.value) == ("--data-path", path)
    assert reason in error.rule
    assert works in error.works
    if "--json-keys" in works:
        assert "--skip-bad-lines" not in error.works


def test_only_the_beginning_is_read(tmp_path: Path) -> None:
    path = lines(tmp_path / "chats.jsonl", *[GOOD] * 8, "{")
    assert plan("--data-path", path, "--sft")


def test_a_template_that_refuses_is_told_at_planning(tmp_path: Path) -> None:
    from tests.data.chats import folder_of

    template = "{{ raise_exception('no systems') if messages[0].role == 'system' }}"
    model = folder_of(tmp_path / "model", template + "{{ messages[-1].content }}")
    system = {"role": "system", "content": "Be."}
    path = lines(tmp_path / "chats.jsonl", {"messages": [system, *GOOD["messages"]]})
    tokenizer = ["--tokenizer-type", "huggingface", "--tokenizer-model", str(model)]
    for flags in ([], ["--dry-run"]):
        error = refused("--data-path", path, "--sft", *tokenizer, *flags)
        assert error.rule == "line 1: the chat template refuses it: no systems"


def test_a_dry_run_tells_what_a_record_loses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_data, "MOST_BYTES", 0)
    path = lines(tmp_path / "chats.jsonl", GOOD, GOOD | {"tools": [{"name": "get"}]})
    (note,) = (n for n in plan("--data-path", path, "--sft", "--dry-run").notes if path in n)
    assert "1 of 2 conversations have tools or documents that are not written" in note
    assert note.endswith('the first in line 2: "get" (of the first 2)')
    assert not any(path in note for note in plan("--data-path", path, "--sft").notes)


def test_flags_without_an_effect(tmp_path: Path) -> None:
    text = lines(tmp_path / "a.txt", "three blind mice")
    assert refused("--data-path", text, "--chat-date", "2026-01-31").flag == "--chat-date"
    with pytest.raises(ConfigError, match="--sft reads files"):
        plan("--data-path", str(tmp_path), "--sft")
