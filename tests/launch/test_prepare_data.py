"""The program: one line and code 2 for a mistake, without torch; how to continue after Ctrl-C."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cp_megatron.data.prepare.prepare_command import parse, run
from cp_megatron.data.read.indexed import IndexedDataset
from cp_megatron.errors import ConfigError
from tests.data.ranges import sequence_of

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "prepare_data.py"


def launched(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *argv],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_it_prepares(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"text {number}"}) for number in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{"]))
    argv = ["--input", "*.jsonl", "--output-prefix", "out", "--workers", "1", "--log-interval=5"]
    page = launched(tmp_path, "--help")
    assert (page.returncode, "--json-keys" in page.stdout) == (0, True)
    ended = launched(tmp_path, *argv, "--skip-bad-lines", "--append-eod")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "out_text_document.bin .idx: 20 documents, 150 tokens" in ended.stdout
    assert "20 documents  " in ended.stdout
    assert "skipped a.jsonl:21: not JSON" in ended.stdout
    assert (tmp_path / "out_skipped.txt").read_text().startswith("a.jsonl:21: not JSON")
    data = IndexedDataset.open(str(tmp_path / "out_text_document"))
    assert sequence_of(data, 3).tolist() == [*b"text 3", 256]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--inptu", "a"], "--inptu a: unknown flag (works: --input"),
        (["a"], "argument a: belongs to no flag"),
        (["--input", "a", "--input", "b"], "--input b: contradicts --input a"),
        (["--input"], "needs one or more values"),
        (["--workers", "two"], "must be a whole number"),
        (["--append-eod", "maybe"], "only true or false may follow"),
        (["--input", "a"], "--output-prefix: names the path"),
        (["--output-prefix", "o", "--log-interval", "0"], "must be at least 1"),
        (["--output-prefix", "o", "--input", "none"], "no such file or folder"),
        (["--output-prefix", "o", "--tokenizer-type", "words"], "byte, huggingface, sentencep"),
    ],
)
def test_mistakes(
    argv: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        run(parse(argv))
    assert expected in str(caught.value)
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_ends_in_one_line_without_torch(tmp_path: Path) -> None:
    argv = ["--output-prefix", "o", "--input", "none"]
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import prepare_data as p; "
        "code = p.main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, *argv],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("prepare_data.py: error: ")
    assert "--input none: there is no such file or folder" in line
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_run_says_how_to_continue(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(40):
        (tmp_path / "in" / f"{number}.txt").write_text(f"{number} " * 400_000)
    argv = ["--input", "in", "--output-prefix", "out", "--workers", "1"]
    # Ctrl-C when the first span is finished and the second one is handed out.
    code = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a script's & leaves it
sys.path.insert(0, {str(SCRIPT.parent)!r})
import prepare_data
from multiprocessing.connection import Connection
give, given = Connection.send, []
def give_or_stop(connection, task):
    given.append(task)
    if len(given) == 2:
        os.kill(os.getpid(), signal.SIGINT)
    give(connection, task)
Connection.send = give_or_stop
sys.exit(prepare_data.main(sys.argv[1:]))
"""
    stopped = subprocess.run(
        [sys.executable, "-c", code, *argv],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert stopped.returncode == 130, stopped.stderr
    assert len(list(tmp_path.glob("out.partial/0*.json"))) == 1
    (line,) = stopped.stderr.splitlines()
    assert "finished spans are in out.partial; run the same command to continue" in line
    ended = launched(tmp_path, *argv)
    assert ended.returncode == 0, ended.stderr
    assert "going on: " in ended.stdout
    assert "40 documents" in ended.stdout


def test_the_program_is_thin() -> None:
    assert len(SCRIPT.read_text().splitlines()) < 60
