"""``launch/generate.py`` and ``launch/convert.py`` as programs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cp_megatron.cli.programs import GenerationOptions
from cp_megatron.comm.runtime import Launch
from cp_megatron.config import CheckpointConfig, Config, DataConfig, ModelConfig
from cp_megatron.config.files.yaml_io import to_yaml
from cp_megatron.errors import ConfigError
from cp_megatron.generate.check_generation import check_generation
from cp_megatron.model import Transformer
from cp_megatron.plan import Grid
from tests.checkpoint.toy import save_checkpoint

ROOT = Path(__file__).parents[2]
MODEL = ModelConfig(
    num_layers=1,
    hidden_size=32,
    num_attention_heads=2,
    normalization="RMSNorm",
    swiglu=True,
    position_embedding_type="rope",
    disable_bias_linear=True,
)


CALLS = """
import contextlib, io, json, sys
sys.path.insert(0, "launch")
import convert, generate
answers = []
for program, argv, text in json.load(sys.stdin):
    sys.stdin, out = io.StringIO(text), io.StringIO()
    with contextlib.redirect_stdout(out):
        code = generate.main(argv, {}) if program == "generate" else convert.main(argv)
    answers.append([code, out.getvalue()])
print(json.dumps([answers, "torch" in sys.modules]))
"""


def called(*calls: tuple[str, list[str], str]) -> tuple[list[tuple[int, str]], bool, list[str]]:
    """Returns (exit code, output) of each call, whether torch was imported, and stderr's lines.

    All calls run in one process, because importing torch takes most of the time of a call.
    """
    ended = subprocess.run(
        [sys.executable, "-c", CALLS],
        cwd=ROOT,
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    answers, has_torch = json.loads(ended.stdout)
    return [(code, out) for code, out in answers], has_torch, ended.stderr.splitlines()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a model that repeats the last character."""
    folder = tmp_path_factory.mktemp("run")
    config = Config(model=MODEL, data=DataConfig(seq_length=32))
    model = Transformer(MODEL, seq_length=32, vocab_size=257, tp=None, sequence_parallel=False)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        assert model.embedding is not None
        assert model.norm is not None
        model.embedding.weight.normal_(0, 1)
        model.norm.weight.fill_(1)
    save_checkpoint(
        folder,
        step=3,
        consumed=3,
        model=model,
        optimizer=None,
        config=config,
        grid=Grid(dp=1, cp=1, tp=1),
        data_fingerprint="none",
        vocab_size=257,
    )
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return folder


def test_texts_and_lines_are_continued_by_runs_and_exports(run: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "hf")
    prompt = ["--prompt", "ba", "--max-new-tokens", "5"]
    exported = ["--load-hf", folder, "--tokenizer-type", "byte", "--dtype", "float64"]
    answers, _, complaints = called(
        ("generate", ["--load", str(run), *prompt], ""),
        ("generate", ["--load", str(run / "step-3"), "--max-new-tokens", "3"], "x\n\nyz\n"),
        ("convert", ["--load", str(run), "--output", folder], ""),
        ("generate", [*exported, *prompt], ""),
    )
    assert complaints == []
    files = [path for path in Path(folder).iterdir() if path.is_file()]
    size, numel = (
        sum(path.stat().st_size for path in files),
        (257 + 4 * 32 + 3 * MODEL.ffn_size + 3) * 32,
    )
    report = f"""written  {folder}
format   Hugging Face folder, LlamaForCausalLM, safetensors in float32
size     {numel:,} parameters, {size:,} bytes ({size / 1e6:,.1f} MB) in {len(files)} files
"""
    assert answers == [(0, "baaaaaa\n"), (0, "xxx\nzzz\n"), (0, report), (0, "baaaaaa\n")]


REFUSED = [
    ("generate", [], "--load: "),
    ("generate", ["--load", "no-such-run"], "--load no-such-run: "),
    ("generate", ["--load", "RUN", "--lr", "1"], "--lr: has no effect"),
    ("generate", ["--load", "RUN", "--max-new-tokens", "0"], "--max-new-tokens 0: "),
    ("generate", ["--load", "RUN", "--top-k", "5"], "--top-k 5: has no effect at"),
    ("generate", ["--load", "RUN", "--chat"], "--chat: the tokenizer has no chat template"),
    ("generate", ["--load", "RUN", "--rope-scaling-factor", "2"], "has no effect with --rope-type"),
    ("generate", ["--load", "RUN", "--rope-type", "linear"], "needs --rope-scaling-factor"),
    ("generate", ["--load", "RUN", "--load-hf", "RUN"], "--load-hf "),
    ("generate", ["--load-hf", "no-such-folder"], "--load-hf no-such-folder: "),
    ("generate", ["--promt", "x"], "unknown flag (works: --prompt"),
    ("convert", [], "--from-gguf: names what to convert"),
    ("convert", ["--load", "RUN"], "--output: "),
    ("convert", ["--load", "RUN", "--from-gguf", "x"], "one of --from-gguf, --from-torch, --load"),
    (
        "convert",
        ["--from-torch", "no-such-file.pt"],
        "--from-torch no-such-file.pt: does not exist",
    ),
    ("convert", ["--from-torch", "x" * 300], "does not exist"),
    ("convert", ["--from-torch", __file__], "(works: --load-hf with a folder that has its config"),
    ("convert", ["--from-torch", "RUN"], "is a run of this program (works: --load "),
    ("convert", ["--from-gguf", "RUN", "--output", "new"], "is a run of this program"),
    ("convert", ["--from-torch", "meta-llama/Llama-3.1-8B"], "hf download meta-llama/Llama-3.1-8B"),
    ("generate", ["--load", "meta-llama/Llama-3.1-8B"], "hf download meta-llama/Llama-3.1-8B"),
    ("convert", ["--load", "RUN", "--output", "RUN"], "nothing is overwritten"),
    ("convert", ["--from-gguf", "no-such-file", "--output", "new"], "cannot be read"),
    ("convert", ["--from-gguf", "x", "--output", "new", "--dtype", "float64"], "--dtype float64"),
]


def test_mistakes_are_one_line_each_without_torch(run: Path) -> None:
    calls = [
        (program, [str(run) if word == "RUN" else word for word in argv], "")
        for program, argv, _ in REFUSED
    ]
    answers, has_torch, lines = called(*calls)
    assert answers == [(2, "")] * len(REFUSED)
    assert not has_torch
    assert len(lines) == len(REFUSED)
    for (program, _, expected), line in zip(REFUSED, lines, strict=True):
        assert line.startswith(f"{program}.py: error: ")
        assert expected in line


def test_more_than_one_rank_is_refused(run: Path) -> None:
    launch = Launch(world_size=2, local_world_size=2)
    config = replace(Config(), checkpoint=CheckpointConfig(load=str(run)))
    with pytest.raises(ConfigError, match="on one rank") as refused:
        check_generation(config, GenerationOptions(), launch, given=())
    assert refused.value.flag == "--nproc-per-node"
