"""Tokens that only the files beside tokenizer.json name, compared with transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cp_megatron.data.tokenize.open_tokenizer import open_tokenizer
from cp_megatron.data.tokenize.tokenizer import Tokenizer
from cp_megatron.errors import ConfigError
from tests.data import tokenizer_files

transformers = pytest.importorskip("transformers")

TEXTS = (
    *("<|tool|>", "a <|tool|> b", "a<|x|>b", "the cat  <|x|> sat", " the", "the cat"),
    *("<|endoftext|>the", "<s> the cat", "THE <|Tool|> cat", "x<|x|>y <|tool|>\n", ""),
)
Files = Mapping[str, Any]
SAVED = {"tokenizer_class": "PreTrainedTokenizerFast"}


def token(content: str, **flags: bool) -> dict[str, Any]:
    none = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, **none, "special": True, **flags}


def typed(content: str, **flags: bool) -> dict[str, Any]:
    return {"__type": "AddedToken", **token(content, **flags)}


def folder_of(folder: Path, files: Files, *, lowercase: bool = False) -> Path:
    path = tokenizer_files.huggingface(folder)
    if lowercase:
        body = json.loads(path.read_text())
        path.write_text(json.dumps({**body, "normalizer": {"type": "Lowercase"}}))
    for name, entries in files.items():
        tokenizer_files.write_json(folder / name, entries)
    return folder


def wanted(folder: Path) -> list[list[int]]:
    oracle = transformers.AutoTokenizer.from_pretrained(str(folder))
    plain = {"add_special_tokens": False, "padding": False, "truncation": False}
    return [oracle(text, **plain)["input_ids"] for text in TEXTS]


def ids(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode(text).tolist() for text in TEXTS]


CONFIGS: dict[str, Files] = {
    "listed": {"added_tokens_decoder": {"300": token("<|tool|>")}},
    "white space": {
        "added_tokens_decoder": {
            "300": token("<|tool|>", lstrip=True),
            "301": token("<|x|>", lstrip=True, rstrip=True, single_word=True),
        }
    },
    "words": {
        "added_tokens_decoder": {
            "266": token("cat", special=False, single_word=True),
            "300": token("<|tool|>", special=False, normalized=True),
        }
    },
    "other flags": {
        "added_tokens_decoder": {
            "0": token("<|endoftext|>", lstrip=True, rstrip=True),
            "276": token("the", special=False),
        }
    },
    "additional": {"additional_special_tokens": ["<|tool|>", typed("<|x|>", lstrip=True)]},
    "both": {
        "extra_special_tokens": {"image_token": "<|tool|>"},
        "additional_special_tokens": ["<|x|>"],
    },
    "extra": {"extra_special_tokens": {"image_token": "<|tool|>"}, "boi_token": "<|x|>"},
    "named": {"pad_token": "<|x|>", "bos_token": typed("<|tool|>", lstrip=True)},
    "split": {"split_special_tokens": True},
    "a bos": {"add_bos_token": True, "bos_token": "<|x|>"},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("lowercase", [False, True])
def test_tokenizer_config_is_read_as_by_transformers(
    name: str, lowercase: bool, tmp_path: Path
) -> None:
    files = {"tokenizer_config.json": {**SAVED, **CONFIGS[name]}}
    folder = folder_of(tmp_path, files, lowercase=lowercase)
    tokenizer = open_tokenizer("huggingface", str(folder))
    assert ids(tokenizer) == wanted(folder)
    assert not tokenizer.notes
    bare = open_tokenizer("huggingface", str(tokenizer_files.huggingface(tmp_path / "bare")))
    assert tokenizer.fingerprint != bare.fingerprint


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens.json": {"<|tool|>": 300, "<|x|>": 301}},
        {
            "special_tokens_map.json": {
                "bos_token": "<|x|>",
                "additional_special_tokens": ["<|tool|>"],
                "pad_token": token("<|Tool|>", lstrip=True),
            }
        },
        {
            "special_tokens_map.json": {"bos_token": "<|x|>"},
            "added_tokens.json": {"<|x|>": 300, "<|tool|>": 301},
        },
    ],
)
@pytest.mark.parametrize("config", [None, SAVED])
def test_older_files_are_read_as_by_transformers(
    files: Files, config: Files | None, tmp_path: Path
) -> None:
    both = {**files, **({} if config is None else {"tokenizer_config.json": config})}
    folder = folder_of(tmp_path, both)
    assert ids(open_tokenizer("huggingface", str(folder))) == wanted(folder)


TOKENS = st.builds(
    token,
    st.sampled_from(["<|tool|>", "<|x|>", "the", " the", "cat", "<s>", "<|endoftext|>", "at"]),
    **{
        name: st.booleans() for name in ("lstrip", "rstrip", "normalized", "single_word", "special")
    },
)
NAMES = st.sampled_from(["<|tool|>", "<|x|>", "<|Tool|>", "<s>", "the"])


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    listed=st.lists(TOKENS, max_size=4, unique_by=lambda entry: entry["content"]),
    named=st.dictionaries(st.sampled_from(["bos_token", "pad_token", "boi_token"]), NAMES),
    extra=st.lists(NAMES, max_size=2, unique=True),
    lowercase=st.booleans(),
)
def test_any_folder_is_read_as_by_transformers(
    listed: list[dict[str, Any]],
    named: dict[str, str],
    extra: list[str],
    lowercase: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    config: dict[str, Any] = {**SAVED, **named, "additional_special_tokens": extra}
    if listed:
        config["added_tokens_decoder"] = {str(300 + n): entry for n, entry in enumerate(listed)}
    files = {"tokenizer_config.json": config}
    folder = folder_of(tmp_path_factory.mktemp("folder"), files, lowercase=lowercase)
    assert ids(open_tokenizer("huggingface", str(folder))) == wanted(folder)


def test_an_id_that_the_file_gives_otherwise_is_told(tmp_path: Path) -> None:
    config = {**SAVED, "added_tokens_decoder": {"310": token("<|tool|>")}}
    folder = folder_of(tmp_path, {"tokenizer_config.json": config})
    tokenizer = open_tokenizer("huggingface", str(folder))
    assert ids(tokenizer) == wanted(folder)
    (note,) = tokenizer.notes
    assert "<|tool|> the id 310" in note
    assert note.endswith("its id is 300")


def test_a_role_that_the_model_has_no_row_for_is_told(tmp_path: Path) -> None:
    """As in many folders whose padding token was named after the training."""
    config = {**SAVED, "pad_token": "<|x|>", "added_tokens_decoder": {"300": token("<|tool|>")}}
    folder = folder_of(tmp_path, {"tokenizer_config.json": config, "config.json": {}})
    assert open_tokenizer("huggingface", str(folder)).vocab_size == 302
    tokenizer_files.write_json(folder / "config.json", {"vocab_size": 301})
    tokenizer = open_tokenizer("huggingface", str(folder))
    (note,) = tokenizer.notes
    assert "name <|x|>, but the model has no row for it" in note
    assert tokenizer.vocab_size == 301
    assert tokenizer.encode("<|tool|>").tolist() == [300]


def test_what_tokenizer_json_contradicts_is_told(tmp_path: Path) -> None:
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}
    folder = folder_of(tmp_path / "a", {"tokenizer_config.json": config})
    (note,) = open_tokenizer("huggingface", str(folder)).notes
    assert "add_prefix_space True" in note
    config = {"add_prefix_space": False, "auto_map": {"AutoTokenizer": ["a.B", None]}}
    folder = folder_of(tmp_path / "b", {"tokenizer_config.json": config})
    (note,) = open_tokenizer("huggingface", str(folder)).notes
    assert "code of its own" in note


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"a": {"content": "b"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": {}}}'),
        ("tokenizer_config.json", '{"bos_token": {"content": 3}}'),
        ("tokenizer_config.json", '{"additional_special_tokens": [3]}'),
        ("added_tokens.json", "{"),
    ],
)
def test_malformed_files_are_refused(name: str, text: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {})
    (folder / name).write_text(text)
    with pytest.raises(ConfigError, match="is not a huggingface tokenizer"):
        open_tokenizer("huggingface", str(folder))


def test_mistral_tokenizers_are_mended_where_transformers_does(tmp_path: Path) -> None:
    path = folder_of(tmp_path, {}) / "tokenizer.json"
    body = json.loads(path.read_text())
    body["model"]["vocab"] |= {"12": 300, **{f"\0{n}": 301 + n for n in range(100_000)}}
    body["model"]["merges"].append(["1", "2"])  # mended tokenizers cut between digits
    path.write_text(json.dumps(body))
    text = "the Mat's iPhoneCase 12  sat\n\non/in it'll"
    plain = {"add_special_tokens": False, "padding": False, "truncation": False}
    found = {}
    for model_type, fix in (("mistral", True), ("mistral", False), ("llama", True)):
        config = {**SAVED, "fix_mistral_regex": fix}
        tokenizer_files.write_json(tmp_path / "tokenizer_config.json", config)
        model = {"model_type": model_type, "transformers_version": "4.57.0"}
        tokenizer_files.write_json(tmp_path / "config.json", model)
        oracle = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
        found[model_type, fix] = open_tokenizer("huggingface", str(tmp_path)).encode(text).tolist()
        assert found[model_type, fix] == oracle(text, **plain)["input_ids"]
    assert found["mistral", True] != found["mistral", False] == found["llama", True]


def test_a_folder_without_tokenizer_json_names_the_command(tmp_path: Path) -> None:
    tokenizer_files.sentencepiece(tmp_path)
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json") as caught:
        open_tokenizer("huggingface", str(tmp_path))
    assert "save_pretrained" in caught.value.works
