"""Chat templates in the manner of well-known families, and conversations written with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from cp_megatron.data.read.chat_examples import Written, writer
from cp_megatron.data.read.chat_records import read_record
from cp_megatron.data.tokenize.chat_template import find_template
from cp_megatron.data.tokenize.open_tokenizer import open_tokenizer
from cp_megatron.data.tokenize.tokenizer import Tokenizer
from tests.data.tokenizer_files import train_byte_level

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# The answer and its end are marked, the newline after them is not.
MARKED = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_SPLIT = (
    "{% set said = m.content.split('</think>')[-1].lstrip('\\n') %}"
    "{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in m.content %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% endif %}"
)
_CALLS = "{% for c in m.tool_calls or [] %}CALL {{ c.function | tojson }}{% endfor %}"
FAMILIES: Mapping[str, str] = {
    # Appends only, with tools and calls.
    "appends": (
        "{% if tools %}TOOLS {{ tools | tojson }}{% endif %}{% for m in messages %}"
        "<|im_start|>{{ m.role }}: {{ m.reasoning_content or '' }}{{ m.content or '' }}"
        f"{_CALLS}<|im_end|>{{% endfor %}}"
        "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    ),
    # As Qwen3: answers before the last question lose their reasoning.
    "drops-earlier": (
        "{% set ns = namespace(last=-1) %}{% for m in messages if m.role == 'user' %}"
        "{% set ns.last = messages.index(m) %}{% endfor %}{% for m in messages %}"
        "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        f"{_SPLIT}{{% if loop.index0 > ns.last %}}<think>\n{{{{ thought }}}}\n</think>\n\n"
        "{% endif %}{{ said }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # As the distillations of R1 and QwQ: every answer does, and the prompt begins the reasoning.
    "drops-always": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<a>"
        "{{ m.content.split('</think>')[-1].lstrip('\\n') }}<|endoftext|>"
        "{% else %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<a><think>\n{% endif %}"
    ),
    # As Phi-3.5: the end of the text only where nothing follows.
    "ends-once": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
    ),
    # As Gemma: the system's message is part of the first question, text is trimmed.
    "merges-system": (
        "{% set head = '' %}{% if messages[0].role == 'system' %}"
        "{% set head = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
        "{% for m in messages %}<start>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{% if loop.first %}{{ head }}{% endif %}{{ m.content | trim }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}<start>model\n{% endif %}"
    ),
    # As gpt-oss: the last answer ends otherwise, and the date is written.
    "last-ends-otherwise": (
        "Today: {{ strftime_now('%Y-%m-%d') }}{% for m in messages %}<s>{{ m.role }}<m>"
        "{{ m.content }}{{ '<return>' if loop.last and m.role == 'assistant' else '<end>' }}"
        "{% endfor %}{% if add_generation_prompt %}<s>assistant{% endif %}"
    ),
    # As Mistral: the system's message stands before the last question.
    "moves-system": (
        "{% set ns = namespace(last=-1, system='') %}{% for m in messages %}"
        "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
        "{% if m.role == 'system' %}{% set ns.system = m.content %}{% endif %}{% endfor %}"
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST] "
        "{% if messages.index(m) == ns.last %}{{ ns.system }} {% endif %}{{ m.content }}[/INST]"
        "{% else %} {{ m.content }}<|endoftext|>{% endif %}{% endfor %}"
    ),
    "marked": MARKED,
    # As Phi's with marks: the mark at the end belongs to no message.
    "marked-end": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n{% generation %}"
        "{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}<|{{ m.role }}|>\n{{ m.content }}"
        "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n"
        "{% else %}{% generation %}<|endoftext|>{% endgeneration %}{% endif %}"
    ),
}


def folder_of(place: Path, template: str | None = None) -> Path:
    """A folder with a tiny byte-level BPE tokenizer."""
    place.mkdir()
    texts = ["three blind mice\n\n see how they run\n"] * 9
    train_byte_level(texts, place / "tokenizer.json", vocab_size=400, special=SPECIAL)
    config: dict[str, Any] = {
        "eos_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    config["bos_token"] = {"__type": "AddedToken", "content": "<|endoftext|>"}
    if template is not None:
        config["chat_template"] = template
    (place / "tokenizer_config.json").write_text(json.dumps(config))
    return place


def tokenizer_of(place: Path, template: str | None = None) -> Tokenizer:
    return open_tokenizer("huggingface", str(folder_of(place, template)))


def write(
    record: Mapping[str, Any], tokenizer: Tokenizer, today: datetime = datetime(2026, 1, 31)
) -> Written:
    """The examples of a record, on a fixed day."""
    template = find_template(tokenizer, today=today)
    return writer(tokenizer, template)(read_record(record))


def shown(written: Written, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """(text, the part of it that has a loss) of each example; ends of documents are left out."""
    return [
        (tokenizer.decode(tokens), tokenizer.decode(tokens[loss]))
        for tokens, loss in written.examples
    ]
