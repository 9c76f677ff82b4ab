"""Conversations: the same tokens and answers as transformers has with the same template."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cp_megatron.config import DataConfig
from cp_megatron.data.read.chat import load_chats
from cp_megatron.data.rows.corpora import open_data
from cp_megatron.data.rows.sampler import IGNORED
from cp_megatron.data.tokenize.chat_template import CHATML
from cp_megatron.data.tokenize.open_tokenizer import open_tokenizer
from cp_megatron.data.tokenize.tokenizer import ByteTokenizer, Tokenizer
from cp_megatron.errors import ConfigError
from tests.data.chats import MARKED, folder_of

CHATS: list[list[dict[str, Any]]] = [
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How do the mice run?"},
        {"role": "assistant", "content": "They run after the wife.\n\nAll of them."},
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": "naïve: she cut off their tails."},
    ],
    [
        {"role": "user", "content": "\n\n Hello"},
        {"role": "assistant", "content": " \nHello."},
    ],
]


def file_of(place: Path, *lines: object) -> str:
    path = place / "chats.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return str(path)


def chats_file(place: Path) -> str:
    return file_of(place, *({"messages": chat} for chat in CHATS))


def load(path: str, tokenizer: Tokenizer, seq_length: int = 4096) -> list[tuple[list[int], Any]]:
    corpus = load_chats(path, tokenizer, seq_length=seq_length, skip_bad=False)[0]
    assert corpus.loss is not None
    cuts = corpus.document_starts[1:]
    parts = zip(np.split(corpus.tokens, cuts), np.split(corpus.loss, cuts))
    return [(tokens.tolist(), loss.astype(int).tolist()) for tokens, loss in parts]


@pytest.mark.parametrize("in_file", [False, True])
def test_tokens_and_answers_are_those_of_transformers(tmp_path: Path, in_file: bool) -> None:
    transformers = pytest.importorskip("transformers")
    folder = folder_of(tmp_path / "model", None if in_file else MARKED)
    if in_file:
        (folder / "chat_template.jinja").write_text(MARKED)
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    found = load(chats_file(tmp_path), open_tokenizer("huggingface", str(folder)))
    for (tokens, loss), chat in zip(found, CHATS, strict=True):
        expected = oracle.apply_chat_template(
            chat,
            chat_template=MARKED,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert tokens == expected["input_ids"]
        assert loss == expected["assistant_masks"]
        assert 0 < sum(loss) < len(loss)


def test_chatml_where_the_tokenizer_has_its_tokens(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = folder_of(tmp_path / "model")
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    tokenizer = open_tokenizer("huggingface", str(folder))
    for (tokens, loss), chat in zip(load(chats_file(tmp_path), tokenizer), CHATS, strict=True):
        rendered = oracle.apply_chat_template(chat, chat_template=CHATML, tokenize=True)
        assert tokens == rendered["input_ids"]
        answers = [m["content"] + "<|im_end|>" for m in chat if m["role"] == "assistant"]
        kept = np.array(tokens)[np.array(loss, dtype=bool)].tolist()
        assert oracle.decode(kept) == "".join(answers)


def test_without_a_template_an_answer_ends_with_the_document(tmp_path: Path) -> None:
    share = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}
    ((tokens, loss),) = load(file_of(tmp_path, share), ByteTokenizer())
    assert tokens == [*b"User: Hi\n\nAssistant: Yo", 256]
    assert loss == [0] * 21 + [1, 1, 1]


def test_a_template_that_rewrites_what_came_before_is_refused(tmp_path: Path) -> None:
    counting = "{{ messages | length }}" + CHATML
    tokenizer = open_tokenizer("huggingface", str(folder_of(tmp_path / "model", counting)))
    with pytest.raises(ConfigError, match=r"line 1: .* what is before message 4") as caught:
        load(chats_file(tmp_path), tokenizer)
    assert "{% generation %}" in caught.value.works


def test_a_template_cannot_reach_python(tmp_path: Path) -> None:
    template = "{{ messages.__class__.__mro__ }}" + CHATML
    tokenizer = open_tokenizer("huggingface", str(folder_of(tmp_path / "model", template)))
    with pytest.raises(ConfigError, match="line 1: the chat template refuses it"):
        load(chats_file(tmp_path), tokenizer)
    broken = folder_of(tmp_path / "broken", "{% for %}")
    with pytest.raises(ConfigError, match="malformed"):
        load(chats_file(tmp_path), open_tokenizer("huggingface", str(broken)))


@pytest.mark.parametrize(
    ("template", "flag", "reason"),
    [
        ("{{ 1 / 0 }}", "--data-path", "line 1: the chat template refuses it: division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "--data-path", "line 1: the chat "),
        ("{{ strftime_now('%Y') }}" + CHATML, "--tokenizer-model", "its chat template writes"),
    ],
)
def test_a_template_that_fails_is_refused(
    tmp_path: Path, template: str, flag: str, reason: str
) -> None:
    folder = folder_of(tmp_path / "model", template)
    with pytest.raises(ConfigError) as caught:
        load(chats_file(tmp_path), open_tokenizer("huggingface", str(folder)))
    assert caught.value.flag == flag
    assert caught.value.rule.startswith(reason)


def test_a_template_that_can_do_without_a_date_is_given_none(tmp_path: Path) -> None:
    dated = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}" + CHATML
    with_date, without = (
        load(chats_file(tmp_path), open_tokenizer("huggingface", str(folder_of(place, template))))
        for place, template in ((tmp_path / "a", dated), (tmp_path / "b", CHATML))
    )
    assert with_date == without


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ({"text": "x"}, "a record has the keys text; it is a text"),
        ({"messages": []}, "'messages' is no list of messages"),
        ({"messages": [{"content": "x"}]}, 'message 0 has no "role"'),
        ({"messages": [{"role": "user", "content": 3}]}, "message 0 has no 'content'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "has no answer of the assistant"),
        ({"messages": [{"role": "assistant", "content": "\ud800"}]}, "message 0 has half of a"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: object, reason: str) -> None:
    path = file_of(tmp_path, {"messages": CHATS[0]}, line)
    with pytest.raises(ConfigError) as caught:
        load(path, ByteTokenizer())
    assert caught.value.value == path
    assert caught.value.rule.startswith(f"line 2: {reason}")
    corpus, _ = load_chats(path, ByteTokenizer(), seq_length=999, skip_bad=True)
    assert corpus.skipped == 1
    assert len(corpus.document_starts) == 1


def test_long_conversations_are_cut_or_dropped(tmp_path: Path) -> None:
    long = [
        {"role": "user", "content": "x" * 80},
        {"role": "assistant", "content": "too late"},
    ]
    short = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    lines = [{"messages": chat} for chat in (CHATS[0], long, short)]
    config = DataConfig(data_path=(file_of(tmp_path, *lines),), seq_length=64, split="1")
    data = open_data(replace(config, sft=True, packing="best-fit"), seed=0)
    notes = " ".join(data.notes)
    assert "1 conversations without an answer in the first row left out" in notes
    assert "1 conversations are cut to 64 tokens" in notes
    rows = [data.rows.train[number] for number in range(data.rows.train.rows_per_epoch)]
    labels = np.concatenate([row.labels for row in rows])
    answers = bytes(labels[(labels != IGNORED) & (labels != 256)].tolist())
    assert sorted(answers) == sorted(b"They ry")
