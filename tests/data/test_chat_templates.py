"""Each answer is trained once, as it is generated, whatever a template does to earlier turns."""

from __future__ import annotations

import random
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from cp_megatron.data.read.chat import load_chats
from cp_megatron.data.read.chat_records import read_record
from cp_megatron.data.read.json_lines import BadLineError
from cp_megatron.data.tokenize.chat_template import find_template
from cp_megatron.errors import ConfigError
from tests.data.chats import FAMILIES, shown, tokenizer_of, write
from tests.data.test_chat_records import chats

_PARTS = ("idefics", "smolvlm", "llava")  # read content in parts only
# The families that write reasoning, or are given back what they drop.
THINKING = ("appends", "drops-earlier", "drops-always", "last-ends-otherwise", "marked")


def conversation(seed: int, *, thinks: bool, system: bool) -> dict[str, Any]:
    """Random turns; every text has a name that occurs once."""
    rng = random.Random(seed)
    messages: list[dict[str, Any]] = []
    if system and rng.random() < 0.5:
        messages.append({"role": "system", "content": "system-0."})
    for number in range(rng.randint(1, 4)):
        messages.append({"role": "user", "content": f"question-{number}."})
        content = f"answer-{number}."
        if thinks and rng.random() < 0.6:
            content = f"<think>\nthought-{number}\n</think>\n\n{content}"
        messages.append({"role": "assistant", "content": content, "weight": rng.choice((0, 1, 1))})
    if rng.random() < 0.2:
        messages.append({"role": "user", "content": "question-9."})
    return {"messages": messages}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_answer_is_trained_once_and_nothing_else_is(tmp_path: Path, family: str) -> None:
    tokenizer = tokenizer_of(tmp_path / "model", FAMILIES[family])
    for seed in range(40):
        record = conversation(seed, thinks=family in THINKING, system=family != "drops-always")
        trained = [m for m in record["messages"] if m.get("weight")]
        examples = shown(write(record, tokenizer), tokenizer)
        loss = "|".join(part for _, part in examples)
        for message in record["messages"]:
            once = int(bool(message.get("weight")))
            for name in message["content"].replace("think>", "").split():
                if name.startswith(("answer", "thought", "question", "system")):
                    assert loss.count(name) == once, (seed, name, examples)
        assert len(examples) <= max(1, len(trained))
        if family in ("appends", "merges-system", "marked"):
            assert len(examples) <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_examples_are_what_transformers_writes_up_to_an_answer(tmp_path: Path, family: str) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizer_of(tmp_path / "model", FAMILIES[family])
    template = FAMILIES[family].replace("strftime_now('%Y-%m-%d')", "'2026-01-31'")
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path / "model"))
    for seed in range(10):
        record = conversation(seed, thinks=family == "drops-earlier", system=True)
        messages = [dict(m, weight=None) for m in record["messages"]]
        upto = [
            oracle.apply_chat_template(messages[:n], chat_template=template)["input_ids"]
            for n in range(1, len(messages) + 1)
        ]
        for tokens, loss in write(record, tokenizer).examples:
            assert tokens.tolist() in upto
            # The first token with a loss is what the model generates after its prompt.
            first = tokenizer.decode(tokens[: int(loss.argmax())])
            prompts = [
                oracle.apply_chat_template(
                    messages[:n], chat_template=template, tokenize=False, add_generation_prompt=True
                )
                for n, m in enumerate(messages)
                if m["role"] == "assistant"
            ]
            prompts = [prompt.replace("<|endoftext|>", "") for prompt in prompts]
            if family == "drops-always":  # whose prompt goes on with <think>
                prompts = [prompt.removesuffix("<think>\n") for prompt in prompts]
            assert first in prompts


def test_what_an_answer_lost_is_given_back(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path / "model", FAMILIES["drops-always"])
    messages = [
        {"role": "user", "content": "A?"},
        {"role": "assistant", "content": "<think>\none\n</think>\n\nA!"},
        {"role": "user", "content": "B?"},
        {"role": "assistant", "content": "<think>two</think>B!"},
    ]
    written = write({"messages": messages}, tokenizer)
    assert [tokens[-1] for tokens, _ in written.examples] == [tokenizer.eod] * 2
    assert shown(written, tokenizer) == [
        ("<user>A?<a><think>\none\n</think>\n\nA!", "one\n</think>\n\nA!"),
        ("<user>A?<a>A!<user>B?<a><think>\ntwo</think>B!", "two</think>B!"),
    ]
    assert any("trained as it is" in what for what, _ in written.remarks)


def test_an_answer_that_does_not_begin_as_the_prompt_ends(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path / "model", FAMILIES["drops-always"])
    messages = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "<tool>"}]
    written = write({"messages": messages}, tokenizer)
    assert shown(written, tokenizer) == [("<user>A?<a><tool>", "<tool>")]
    assert written.remarks[0][1] == repr("<think>\n")


def test_an_answer_without_an_end_is_told(tmp_path: Path) -> None:
    """As GLM's, whose answers end where the next turn begins: the model would not learn to stop."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = tokenizer_of(tmp_path / "model", template)
    written = write(conversation(1, thinks=False, system=False), tokenizer)
    assert "no end" in written.remarks[0][0]


def test_the_date_of_a_template_is_given(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path / "model", FAMILIES["last-ends-otherwise"])
    path = chats(tmp_path, conversation(1, thinks=False, system=False))
    options: dict[str, Any] = {"seq_length": 4096, "skip_bad": False}
    with pytest.raises(ConfigError) as caught:
        load_chats(path, tokenizer, **options)
    assert "--chat-date 20" in caught.value.works
    corpus, _ = load_chats(path, tokenizer, date="2026-01-31", **options)
    assert tokenizer.decode(corpus.tokens).startswith("Today: 2026-01-31")
    with pytest.raises(ConfigError) as caught:
        load_chats(path, tokenizer, date="31.1.2026", **options)
    assert caught.value.flag == "--chat-date"


def test_several_examples_of_a_conversation_are_told(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path / "model", FAMILIES["ends-once"])
    record = {
        "messages": [
            {"role": role, "content": name} for role, name in zip(["user", "assistant"] * 2, "abcd")
        ]
    }
    path = chats(tmp_path, record)
    corpus, notes = load_chats(path, tokenizer, seq_length=4096, skip_bad=False)
    assert len(corpus.document_starts) == 2
    assert notes[0].startswith(f"{path}: 1 of 1 conversations are cut into an example per answer")


@pytest.mark.slow
@pytest.mark.parametrize("tools", [False, True])
def test_the_templates_that_trl_ships(tmp_path: Path, tools: bool) -> None:
    """Those with marks have the masks of transformers; those without lose nothing."""
    trl = pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    folder = Path(trl.__file__).parent / "chat_templates"
    tokenizer = tokenizer_of(tmp_path / "model")
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path / "model"))
    today = datetime.now()
    compared = 0
    for path in sorted(folder.glob("*.jinja")):
        text = path.read_text(encoding="utf-8")
        (tmp_path / "model" / "chat_template.jinja").write_text(text)
        record = _record(tools)
        try:
            examples = write(record, tokenizer, today).examples
        except BadLineError:
            assert tools or path.stem.startswith(("idefics", "smolvlm", "llava"))
            continue
        loss = "|".join(tokenizer.decode(tokens[kept]) for tokens, kept in examples)
        for name in ("They ran.", "She cut."):
            assert loss.count(name) == 1, path.stem
        template = find_template(tokenizer)
        if template is None or not template.marked or path.stem.startswith(_PARTS):
            continue
        messages = read_record(record).messages
        expected = oracle.apply_chat_template(
            messages,
            chat_template=text,
            tools=record.get("tools"),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        if len(examples) == 1:
            compared += 1
            assert examples[0][0].tolist() == expected["input_ids"], path.stem
            assert examples[0][1].astype(int).tolist() == expected["assistant_masks"], path.stem
    assert compared > 10


def _record(tools: bool) -> dict[str, Any]:
    user, answer = {"role": "user"}, {"role": "assistant"}
    end = [{**user, "content": "And then?"}, {**answer, "content": "She cut."}]
    if not tools:
        return {"messages": [{**user, "content": "How?"}, {**answer, "content": "They ran."}, *end]}
    function = {"name": "get", "description": "Gets it.", "parameters": {"type": "object"}}
    function["parameters"] |= {"properties": {"who": {"type": "string"}}, "required": []}
    call = {"id": "abcdefghi", "type": "function"}
    call |= {"function": {"name": "get", "arguments": {"who": "mice"}}}
    return {
        "tools": [{"type": "function", "function": function}],
        "messages": [
            {**user, "content": "How?"},
            {**answer, "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "get", "tool_call_id": "abcdefghi", "content": "ran"},
            {**answer, "content": "They ran."},
            *end,
        ],
    }
