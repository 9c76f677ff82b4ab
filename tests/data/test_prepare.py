"""From documents to a pair: compared with documents tokenised one by one; runs that are killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from cp_megatron.data.prepare import prepare as module
from cp_megatron.data.prepare.prepare import WorkAhead, prepare
from cp_megatron.data.prepare.prepare_worker import SpanProgress, serve
from cp_megatron.data.prepare.request import Request
from cp_megatron.data.read.documents import InputSpan, cut_spans, find_inputs
from cp_megatron.data.read.indexed import IndexedDataset
from cp_megatron.errors import ConfigError
from tests.data import tokenizer_files
from tests.data.ranges import sequence_of

LINES = 400
TEXTS = [f"document {number} " + "naïve words € " * (number % 50) for number in range(LINES)]


@pytest.fixture(autouse=True)
def small_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALLEST_SPAN", 20_000)


def corpus(folder: Path, bad: tuple[int, ...] = ()) -> Path:
    path = folder / "corpus.jsonl"
    lines = [json.dumps({"text": text, "title": f"t{n}"}) for n, text in enumerate(TEXTS)]
    for number in bad:
        lines.insert(number - 1, "{")
    path.write_text("\n".join(lines) + "\n")
    return path


def request(folder: Path, name: str, **changes: object) -> Request:
    values: dict[str, object] = {
        "input": (str(folder / "corpus.jsonl"),),
        "output_prefix": str(folder / name / "out"),
        "tokenizer_type": "byte",
        "workers": 2,
    }
    return Request(**{**values, **changes})  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_documents_become_sequences(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    corpus(tmp_path)
    path = tokenizer_files.huggingface(tmp_path)
    made = {"tokenizer_type": "huggingface", "tokenizer_model": str(path)}
    events: list[WorkAhead | SpanProgress] = []
    result = prepare(request(tmp_path, "a", **made, json_keys=("text", "title")), events.append)
    assert result.documents == (LINES, LINES)
    assert sorted(files(tmp_path / "a")) == [
        "out_text_document.bin",
        "out_text_document.idx",
        "out_title_document.bin",
        "out_title_document.idx",
    ]
    oracle = Tokenizer.from_file(str(path))
    oracle.no_truncation()
    oracle.no_padding()
    data = IndexedDataset.open(result.outputs[0])
    assert data.tokens.dtype == np.uint16
    for number, text in enumerate(TEXTS):
        assert sequence_of(data, number).tolist() == [*oracle.encode(text).ids, 0]
    assert data.document_index.tolist() == list(range(LINES + 1))
    parts = [event for event in events if isinstance(event, SpanProgress)]
    start = events[0]
    assert isinstance(start, WorkAhead)
    assert (
        sum(part.weight for part in parts)
        == start.weight
        == os.path.getsize(tmp_path / "corpus.jsonl")
    )
    assert sum(part.tokens for part in parts) == sum(result.tokens)
    # One process, and without an end of document.
    prepare(request(tmp_path, "b", **made, json_keys=("text", "title"), workers=1))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    prepare(request(tmp_path, "c", **made, append_eod=False))
    data = IndexedDataset.open(str(tmp_path / "c" / "out_text_document"))
    assert sequence_of(data, 7).tolist() == oracle.encode(TEXTS[7]).ids


def killed_after(request_: Request, span_bytes: int, num_spans: int) -> None:
    """Kills its own process when this many spans are done."""
    module.SMALLEST_SPAN = span_bytes  # type: ignore[misc]

    def watch(event: WorkAhead | SpanProgress) -> None:
        if len(list(request_.partial.glob("[0-9]*.json"))) >= num_spans:
            os.kill(os.getpid(), signal.SIGKILL)

    prepare(request_, watch)


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    corpus(tmp_path)
    undisturbed = request(tmp_path, "a")
    prepare(undisturbed)
    disturbed = request(tmp_path, "b")
    # Not a daemon, because it has processes of its own.
    process = multiprocessing.get_context("spawn").Process(
        target=killed_after, args=(disturbed, 20_000, 2)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["out.partial"]
    starts: list[WorkAhead | SpanProgress] = []
    for changes, rule in (
        ({"tokenizer_type": "tiktoken"}, "run with another tokenizer"),
        ({"append_eod": False}, "run with other flags"),
        ({"input": (str(tmp_path / "corpus.jsonl"),) * 2}, "run with other inputs"),
    ):
        if "tokenizer_type" in changes:
            changes["tokenizer_model"] = str(tokenizer_files.tiktoken(tmp_path))
        with pytest.raises(ConfigError, match=rule) as caught:
            prepare(request(tmp_path, "b", **changes))
        assert f"rm -r {disturbed.partial}" in caught.value.works
    prepare(disturbed, starts.append)
    assert isinstance(starts[0], WorkAhead)
    assert 2 <= starts[0].kept_spans < starts[0].spans
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_an_input_that_changed_is_another(tmp_path: Path) -> None:
    path = corpus(tmp_path, bad=(390,))
    with pytest.raises(ConfigError, match="line 390"):
        prepare(request(tmp_path, "a", workers=1))
    time.sleep(0.01)
    path.touch()
    with pytest.raises(ConfigError, match="run with other inputs"):
        prepare(request(tmp_path, "a"))


def test_what_an_error_tells_to_do_works(tmp_path: Path) -> None:
    corpus(tmp_path, bad=(390,))
    with pytest.raises(ConfigError, match="--skip-bad-lines"):
        prepare(request(tmp_path, "a", workers=1))
    starts: list[WorkAhead | SpanProgress] = []
    result = prepare(request(tmp_path, "a", skip_bad_lines=True), starts.append)
    assert isinstance(starts[0], WorkAhead)
    assert starts[0].kept_spans > 0
    assert len(result.skipped) == 1
    # No span was finished before the bad line, so the corrected file is read from the start.
    corpus(tmp_path, bad=(1,))
    with pytest.raises(ConfigError, match="line 1"):
        prepare(request(tmp_path, "b", workers=1))
    corpus(tmp_path)
    assert prepare(request(tmp_path, "b")).documents == (LINES,)


def test_skipped_lines_are_not_kept_by_a_run_that_skips_none(tmp_path: Path) -> None:
    corpus(tmp_path, bad=(1, 390))
    wanted = request(tmp_path, "a", workers=1, skip_bad_lines=True)
    process = multiprocessing.get_context("spawn").Process(
        target=killed_after, args=(wanted, 20_000, 2)
    )
    process.start()
    process.join(60)
    with pytest.raises(ConfigError, match="run with --skip-bad-lines"):
        prepare(request(tmp_path, "a"))


def test_spans_without_a_manifest_are_not_trusted(tmp_path: Path) -> None:
    """A run that is killed while it deletes its folder leaves such spans."""
    corpus(tmp_path)
    wanted = request(tmp_path, "a")
    prepare(wanted)
    wanted.partial.mkdir()
    receipt = {"documents": [1], "tokens": [1], "crc32": [0], "lines": 1, "skipped": []}
    (wanted.partial / "000000.json").write_text(json.dumps(receipt))
    with pytest.raises(ConfigError, match="exists already"):
        prepare(wanted)
    other = request(tmp_path, "b", append_eod=False)
    other.partial.mkdir(parents=True)
    (other.partial / "000000.json").write_text(json.dumps(receipt))
    (other.partial / "000000-0.bin.1.tmp").write_bytes(b"of a full disk")
    assert prepare(other).documents == (LINES,)
    assert not other.partial.exists()


def test_a_damaged_span_is_made_again(tmp_path: Path) -> None:
    corpus(tmp_path, bad=(390,))
    wanted = request(tmp_path, "a", workers=1)
    with pytest.raises(ConfigError, match="line 390"):
        prepare(wanted)
    # Corrects the line without changing the size or the time of the file.
    path = Path(wanted.input[0])
    state = path.stat()
    path.write_text(path.read_text().replace("\n{\n", "\n \n"))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    ids = wanted.partial / "000000-0.bin"
    ids.write_bytes(bytes(ids.stat().st_size))
    with pytest.raises(ConfigError, match="span 0 in it was damaged"):
        prepare(wanted)
    assert prepare(wanted).documents == (LINES,)
    data = IndexedDataset.open(wanted.outputs[0])
    assert sequence_of(data, 0).tolist() == [*TEXTS[0].encode(), 256]


def test_skipped_lines_have_their_numbers(tmp_path: Path) -> None:
    path = corpus(tmp_path, bad=(1, 200, 399))
    with pytest.raises(ConfigError, match="line 1: not JSON"):
        prepare(request(tmp_path, "a", workers=1))
    result = prepare(request(tmp_path, "b", skip_bad_lines=True))
    assert result.documents == (LINES,)
    assert [line.split(": ")[0] for line in result.skipped] == [
        f"{path}:{number}" for number in (1, 200, 399)
    ]


def test_refused_before_anything_is_made(tmp_path: Path) -> None:
    corpus(tmp_path)
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "out_text_document.bin").write_bytes(b"1")
    for name, changes, rule in (
        ("a", {"input": ()}, "needs the documents"),
        ("a", {"workers": 0}, "at least 1"),
        ("a", {"json_keys": ("a", "a")}, "twice"),
        ("a", {"json_keys": ("a/b",)}, "must not hold a /"),
        ("a", {"input": (str(tmp_path / "text.txt"),), "json_keys": ("title",)}, "has no keys"),
        ("there", {}, "exists already"),
        ("text.txt", {}, "cannot be written"),
    ):
        with pytest.raises(ConfigError, match=rule):
            prepare(request(tmp_path, name, **changes))
        assert not (tmp_path / "a").exists()
    with pytest.raises(ConfigError, match="no document has any text"):
        prepare(request(tmp_path, "b", input=(str(tmp_path / "empty.txt"),)))


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    corpus(tmp_path)
    wanted = request(tmp_path, "a")
    seen = []

    def watch(event: WorkAhead | SpanProgress) -> None:
        if isinstance(event, WorkAhead):
            with pytest.raises(ConfigError, match="another run works in this"):
                prepare(wanted)
            seen.append(event)

    prepare(wanted, watch)
    assert seen


def test_a_process_that_dies_is_reported(tmp_path: Path) -> None:
    corpus(tmp_path)
    others = {child.pid for child in multiprocessing.active_children()}  # the pool of ranks

    def watch(event: WorkAhead | SpanProgress) -> None:
        for child in multiprocessing.active_children():
            if child.pid is not None and child.pid not in others:
                os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(ConfigError, match="code -9, perhaps because memory ran out") as caught:
        prepare(request(tmp_path, "a"), watch)
    assert caught.value.flag == "--workers"
    assert prepare(request(tmp_path, "a")).documents == (LINES,)


def test_a_process_whose_parent_is_gone_ends_quietly(tmp_path: Path) -> None:
    """Another process has failed, so nothing reads what this one has to say."""
    (tmp_path / "bad.jsonl").write_text("{")
    span = next(cut_spans(find_inputs([str(tmp_path / "bad.jsonl")]), span_bytes=99))
    request(tmp_path, "a").partial.mkdir(parents=True)

    class Gone:
        def recv(self) -> tuple[int, InputSpan]:
            return 0, span

        def send(self, value: object) -> None:
            if value is not None:
                raise BrokenPipeError

    before = signal.getsignal(signal.SIGINT)
    try:
        serve(cast(Connection, Gone()), request(tmp_path, "a"))
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_files_of_gpt2(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    corpus(tmp_path)
    vocab, merges = tokenizer_files.gpt2(tmp_path)
    chosen = {"tokenizer_type": "gpt2", "vocab_file": str(vocab), "merge_file": str(merges)}
    data = IndexedDataset.open(prepare(request(tmp_path, "a", **chosen)).outputs[0])
    oracle = Tokenizer.from_file(str(tmp_path / "whole.json"))
    for number in (0, 7, LINES - 1):
        assert sequence_of(data, number).tolist() == [*oracle.encode(TEXTS[number]).ids, 0]
