"""Tokenizers of every kind, compared with their libraries, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cp_megatron.data.prepare.prepare_command import parse
from cp_megatron.data.tokenize.open_tokenizer import open_tokenizer
from cp_megatron.data.tokenize.tokenizer import FILES, ByteTokenizer, Tokenizer
from cp_megatron.errors import ConfigError
from tests.data import tokenizer_files

GPT2 = ("vocab.json", "merges.txt")
MAKERS = {kind: getattr(tokenizer_files, kind) for kind in FILES if kind != "gpt2"}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {kind: open_tokenizer(kind, str(make(folder))) for kind, make in MAKERS.items()}
    pair = tokenizer_files.gpt2(folder)
    return {"byte": open_tokenizer("byte", None), "gpt2": open_gpt2(*pair), **made}


def open_gpt2(vocab: Path | None, merges: Path | None, path: str | None = None) -> Tokenizer:
    files = {"vocab_file": vocab and str(vocab), "merge_file": merges and str(merges)}
    return open_tokenizer("gpt2", path, **files)


@pytest.mark.parametrize("kind", ["byte", *FILES])
class TestAll:
    @given(
        text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
    )
    def test_what_is_encoded_comes_back(
        self, kind: str, tokenizers: dict[str, Tokenizer], text: str
    ) -> None:
        tokenizer = tokenizers[kind]
        if kind == "sentencepiece":
            text = text.replace("\u2581", "")  # its own sign for a space
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert ((ids >= 0) & (ids < tokenizer.vocab_size) & (ids != tokenizer.eod)).all()
        assert tokenizer.decode([*ids.tolist(), tokenizer.eod]) == text

    def test_a_batch_is_one_by_one(self, kind: str, tokenizers: dict[str, Tokenizer]) -> None:
        tokenizer = tokenizers[kind]
        texts = ["the cat", "", "a longer text, naïve and €, than two tokens"]
        one = [tokenizer.encode(text).tolist() for text in texts]
        assert len(one[2]) > 4  # a truncation left in the file has no effect
        assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == one
        if kind == "gpt2":
            again = open_gpt2(*(Path(str(tokenizer.path)).parent / name for name in GPT2))
        else:
            again = open_tokenizer(kind, tokenizer.path)
        assert [ids.tolist() for ids in again.encode_batch(texts)] == one
        assert again.fingerprint == tokenizer.fingerprint
        assert tokenizer.encode_batch([]) == []

    def test_ids_outside_the_vocabulary(self, kind: str, tokenizers: dict[str, Tokenizer]) -> None:
        for bad in (-1, tokenizers[kind].vocab_size):
            with pytest.raises(ValueError, match="must lie in"):
                tokenizers[kind].decode([bad])


@pytest.mark.parametrize("kind", MAKERS)
class TestRefused:
    def refuse(self, kind: str, path: str | None, rule: str) -> None:
        with pytest.raises(ConfigError, match=rule) as caught:
            open_tokenizer(kind, path)
        assert caught.value.works

    def test_no_file(self, kind: str, tmp_path: Path) -> None:
        self.refuse(kind, None, "needs the tokenizer's file")
        self.refuse(kind, str(tmp_path / "none"), "no such file")
        self.refuse(kind, "/dev/null", "must be a regular file")

    @pytest.mark.parametrize("data", [b"", b"{}", b"\xff\x00 nothing", b"YQ== x\n", b"{" * 9])
    def test_malformed(self, kind: str, data: bytes, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(data)
        self.refuse(kind, str(tmp_path / "file"), f"is not a {kind} tokenizer")

    def test_another_kind(self, kind: str, tmp_path: Path) -> None:
        for other, make in MAKERS.items():
            if other != kind:
                self.refuse(kind, str(make(tmp_path)), f"is not a {kind} tokenizer")

    def test_a_missing_package(
        self, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = MAKERS[kind](tmp_path)
        name = "tokenizers" if kind == "huggingface" else kind
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match=f"package {name}") as caught:
            open_tokenizer(kind, str(path))
        assert caught.value.works == "pip install 'cp_megatron[data]'"


def test_unknown_kinds_and_a_file_for_bytes() -> None:
    with pytest.raises(ConfigError, match="one of its choices"):
        open_tokenizer("words", None)
    with pytest.raises(ConfigError, match="has no file"):
        open_tokenizer("byte", "file")


def test_bytes_are_tokens() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("naïve €").tolist() == list("naïve €".encode())
    assert tokenizer.decode([0xE2, 0x82]) == "\N{REPLACEMENT CHARACTER}"
    assert tokenizer.decode([]) == ""


def test_where_huggingface_finds_the_end(tmp_path: Path) -> None:
    path = tokenizer_files.huggingface(tmp_path, special=("<|im_end|>", "</s>", "<|endoftext|>"))

    def eod() -> int:
        assert open_tokenizer("huggingface", str(path)).eod == (
            open_tokenizer("huggingface", str(tmp_path)).eod
        )
        return open_tokenizer("huggingface", str(path)).eod

    assert eod() == 2
    tokenizer_files.write_json(tmp_path / "config.json", {"eos_token_id": [1, 2]})
    assert eod() == 1
    tokenizer_files.write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    assert eod() == 0
    name = {"content": "</s>", "lstrip": False}
    tokenizer_files.write_json(tmp_path / "tokenizer_config.json", {"eos_token": name})
    assert eod() == 1
    (tmp_path / "tokenizer_config.json").write_bytes(b"{")
    with pytest.raises(ConfigError, match=r"tokenizer_config.json: is not a huggingface"):
        eod()


def test_no_end_of_document(tmp_path: Path) -> None:
    path = tokenizer_files.huggingface(tmp_path, special=("<pad>",))
    with pytest.raises(ConfigError, match="no token that ends a document"):
        open_tokenizer("huggingface", str(path))
    path = tokenizer_files.sentencepiece(tmp_path, eos_id=-1)
    with pytest.raises(ConfigError, match="no token that ends a document"):
        open_tokenizer("sentencepiece", str(path))


def test_what_a_text_to_be_continued_begins_with(tmp_path: Path) -> None:
    processors = pytest.importorskip("tokenizers.processors")
    path = tokenizer_files.huggingface(tmp_path, special=("<|endoftext|>", "<s>"))
    library = pytest.importorskip("tokenizers").Tokenizer.from_file(str(path))
    assert open_tokenizer("huggingface", str(path)).opening == ()
    ends = [("<s>", 1), ("<|endoftext|>", 0)]
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A <|endoftext|>", special_tokens=ends
    )
    library.save(str(path))
    found = open_tokenizer("huggingface", str(path))
    assert found.opening == (1,)
    assert found.encode("the cat")[0] != 1


def test_huggingface_is_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = tokenizer_files.huggingface(tmp_path, special=("<|endoftext|>", "<|im_start|>"))
    oracle = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    text = "<|im_start|>the cat, naïve"
    wanted = oracle(text, add_special_tokens=False, padding=False, truncation=False)["input_ids"]
    assert open_tokenizer("huggingface", str(path)).encode(text).tolist() == wanted
    assert wanted[0] == 1


@pytest.mark.parametrize(
    ("ranks", "eod", "text", "ids"),
    [
        (258, 258, "<|endoftext|>", [258]),
        (100_256, 100_257, "<|endoftext|>", [100_257]),
        (128_000, 128_001, "<|begin_of_text|>", [128_000]),
        (128_000, 128_001, "<|eot_id|>", [128_009]),
        (151_643, 151_643, "<|im_end|>", [151_645]),
    ],
)
def test_tiktoken_files_are_known_by_their_size(
    ranks: int, eod: int, text: str, ids: list[int], tmp_path: Path
) -> None:
    path = tokenizer_files.tiktoken(tmp_path, more=ranks - 256)
    tokenizer = open_tokenizer("tiktoken", str(path))
    assert tokenizer.eod == eod
    assert tokenizer.encode(text).tolist() == ids
    assert tokenizer.encode("the").tolist() == [257]
    if ranks > 258:  # digits come in threes, in Qwen one by one
        assert len(tokenizer.encode("12")) == (2 if ranks == 151_643 else 1)
    if ranks == 128_000:
        assert tokenizer.vocab_size == 128_256
    if ranks == 100_256:
        with pytest.raises(ValueError, match="hole"):
            tokenizer.decode([100_256])


def test_a_tiktoken_file_has_every_byte_and_each_rank_once(tmp_path: Path) -> None:
    path = tokenizer_files.tiktoken(tmp_path)
    lines = path.read_text().splitlines()
    for broken, rule in (
        (lines[1:], "not every byte"),
        ([*lines, "YWJj 3"], "two tokens have one rank"),
        ([*lines, "YWJj"], "line 259"),
    ):
        path.write_text("\n".join(broken))
        with pytest.raises(ConfigError, match=rule):
            open_tokenizer("tiktoken", str(path))


@pytest.mark.parametrize(
    ("megatron", "ours"),
    [
        ("HuggingFaceTokenizer", "huggingface"),
        ("SentencePieceTokenizer", "sentencepiece"),
        ("GPTSentencePieceTokenizer", "sentencepiece"),
        ("Llama2Tokenizer", "sentencepiece"),
        ("TikTokenizer", "tiktoken"),
        ("GPT2BPETokenizer", "gpt2"),
        ("HFTokenizer", "huggingface"),
        ("PretrainedFromHF", "huggingface"),
    ],
)
def test_the_spellings_of_megatron(megatron: str, ours: str) -> None:
    argv = ["--output-prefix", "p", "--tokenizer-type", megatron]
    assert parse(argv).tokenizer_type == ours


@pytest.mark.parametrize(
    ("megatron", "told"),
    [
        ("NullTokenizer", "makes no ids of a text"),
        ("BertWordPieceCase", "is of BERT"),
        ("MultimodalTokenizer", "is for images"),
        ("SFTTokenizer", "not needed to train on conversations"),
        ("MyTokenizer", "must be one of its choices"),
    ],
)
def test_tokenizers_of_megatron_without_a_counterpart_are_refused_by_name(
    megatron: str, told: str
) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        parse(["--output-prefix", "p", "--tokenizer-type", megatron])
    assert caught.value.works


@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
    | st.sampled_from(["a<|endoftext|> the cat's", "  the\n\ncat 123 it'll", "\u00a0 \u3000x"])
)
def test_gpt2_files_are_read_as_by_transformers(
    text: str, tokenizers: dict[str, Tokenizer], oracle: Any
) -> None:
    tokenizer = tokenizers["gpt2"]
    assert tokenizer.encode(text).tolist() == oracle(text)["input_ids"]
    assert (tokenizer.eod, tokenizer.vocab_size) == (oracle.eos_token_id, len(oracle))


@pytest.fixture(scope="module")
def oracle(tokenizers: dict[str, Tokenizer]) -> Any:
    transformers = pytest.importorskip("transformers")
    folder = Path(str(tokenizers["gpt2"].path)).parent
    vocab, merges = (str(folder / name) for name in GPT2)
    return transformers.GPT2Tokenizer(vocab=vocab, merges=merges)


def test_gpt2_needs_two_files_that_belong_together(tmp_path: Path) -> None:
    vocab, merges = tokenizer_files.gpt2(tmp_path)
    for given_files, flag, rule in (
        ((None, merges), "--tokenizer-type", "in --vocab-file"),
        ((vocab, None), "--tokenizer-type", "in --merge-file"),
        ((vocab, tmp_path / "none"), "--merge-file", "no such file"),
        ((merges, vocab), "--vocab-file", "not a gpt2 tokenizer"),
    ):
        with pytest.raises(ConfigError, match=rule) as caught:
            open_gpt2(*given_files)
        assert caught.value.flag == flag
    with pytest.raises(ConfigError, match="no such file") as caught:
        open_gpt2(vocab, merges, path=str(tmp_path))
    assert caught.value.flag == "--tokenizer-model"
    for kind in ("byte", "huggingface"):
        with pytest.raises(ConfigError, match=f"the {kind} tokenizer has no") as caught:
            open_tokenizer(kind, None, vocab_file=str(vocab))
        assert "GPT2BPETokenizer" in caught.value.works
    vocab.write_text('{"a": 0}')
    merges.write_text("")
    with pytest.raises(ConfigError, match="no token that ends a document"):
        open_gpt2(vocab, merges)
