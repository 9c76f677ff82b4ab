"""Folders and files of other programs are recognized, and the answer is the command that helps."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cp_megatron.cli.parse import PRETRAIN, parse_arguments
from cp_megatron.cli.programs import CONVERT, EVALUATE, GENERATE
from cp_megatron.config.files.foreign_folders import recognize
from cp_megatron.errors import ConfigError

# What lies in a folder (an empty file each; a suffix of torch makes an archive, .gguf its magic),
# the path that the user names, and the answer: what it is, and what works.
KINDS: dict[str, tuple[str, str, str, str]] = {
    "dcp": (
        ".metadata __0_0.distcp __1_0.distcp",
        "",
        "is a folder of torch.distributed.checkpoint (DCP), as torchtitan, FSDP and accelerate",
        "python launch/convert.py --from-torch IN --load-hf MODEL --output NEW, where MODEL is a "
        "folder with the model's config.json",
    ),
    "torchtitan": (
        "step-10/.metadata step-9/.metadata step-100/.metadata",
        "",
        "holds step-100, which is a folder of torch.distributed.checkpoint (DCP)",
        "--from-torch IN/step-100 --load-hf",
    ),
    "torchtitan's dump folder": (
        "checkpoint/step-10/.metadata checkpoint/step-9/.metadata profile_traces/a.json",
        "",
        "holds step-10, which is a folder of torch.distributed.checkpoint (DCP)",
        "--from-torch IN/checkpoint/step-10 --load-hf",
    ),
    "dcp, not finished": ("__0_0.distcp", "", "without .metadata", "another of its steps"),
    "one file of dcp": (
        ".metadata __0_0.distcp",
        "__0_0.distcp",
        "is one file of",
        "--from-torch IN ",
    ),
    "accelerate's FSDP": (
        "trainer_state.json optimizer_0/.metadata pytorch_model_fsdp_0/.metadata rng_state_0.pth",
        "",
        "holds pytorch_model_fsdp_0, which is a folder of torch.distributed.checkpoint (DCP)",
        "--from-torch IN/pytorch_model_fsdp_0 --load-hf",
    ),
    "Megatron, torch_dist": (
        "latest_checkpointed_iteration.txt iter_0000010/.metadata iter_0000010/common.pt "
        "iter_0000010/metadata.json iter_0000010/__0_0.distcp",
        "",
        "is a checkpoint of Megatron-LM (torch_dist)",
        "Megatron Bridge's guide megatron-lm-to-megatron-bridge",
    ),
    "Megatron Bridge": (
        "iter_0000010/.metadata iter_0000010/common.pt iter_0000010/run_config.yaml",
        "iter_0000010",
        "is a checkpoint of Megatron-LM (torch_dist)",
        "AutoBridge.from_hf_pretrained('MODEL').export_ckpt('IN/iter_0000010', 'exported')\"",
    ),
    "NeMo": (
        "context/model.yaml weights/.metadata weights/common.pt weights/__0_0.distcp",
        "",
        "holds weights, which is a checkpoint of Megatron-LM (torch_dist)",
        "Megatron Bridge's guide",
    ),
    "Megatron, legacy": (
        "latest_checkpointed_iteration.txt iter_0000010/mp_rank_00/model_optim_rng.pt",
        "",
        "is a legacy checkpoint of Megatron-LM",
        "--ckpt-convert-format torch_dist --ckpt-convert-save NEW",
    ),
    "Megatron, legacy, a rank": (
        "mp_rank_00_001/model_optim_rng.pt",
        "mp_rank_00_001/model_optim_rng.pt",
        "is a legacy checkpoint of Megatron-LM",
        "--ckpt-convert-format torch_dist",
    ),
    "a file of torch": (
        "model.pth",
        "model.pth",
        "is a file of PyTorch (torch.save)",
        "--from-torch IN/model.pth --load-hf MODEL",
    ),
    "a folder with one": (
        "a.txt model.pt optimizer.pt",
        "",
        "holds model.pt, which is a file of",
        "",
    ),
    "Meta's llama": (
        "consolidated.00.pth params.json tokenizer.model",
        "",
        "holds consolidated.00.pth, which is a file of PyTorch",
        "--from-torch IN/consolidated.00.pth --load-hf MODEL",
    ),
    "Meta's llama, cut": (
        "consolidated.00.pth consolidated.01.pth params.json",
        "",
        "is one of several files into which Meta cut the model",
        "hf download OWNER/NAME --local-dir NEW",
    ),
    "LoRA": (
        "adapter_config.json adapter_model.safetensors",
        "",
        "is an adapter of PEFT (such as LoRA)",
        "python -c \"from peft import AutoPeftModelForCausalLM as M; m = M.from_pretrained('IN'); "
        "m.merge_and_unload().save_pretrained('merged')\", then copy the tokenizer to merged and "
        "use --load-hf merged",
    ),
    "DeepSpeed": (
        "zero_to_fp32.py latest global_step10/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "",
        "is a checkpoint of DeepSpeed (ZeRO)",
        "python IN/zero_to_fp32.py IN NEW --safe_serialization",
    ),
    "DeepSpeed's step": (
        "zero_to_fp32.py global_step10/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "global_step10",
        "is a checkpoint of DeepSpeed (ZeRO)",
        "python IN/zero_to_fp32.py IN NEW",
    ),
    "weights alone": (
        "model-00001-of-00002.safetensors model.safetensors.index.json",
        "",
        "holds the weights of a Hugging Face folder, but no config.json",
        "the model's config.json copied to it, then --load-hf IN",
    ),
    "Trainer's folder": (
        "checkpoint-500/config.json checkpoint-500/model.safetensors checkpoint-60/config.json",
        "",
        "the newest is checkpoint-500",
        "--load-hf IN/checkpoint-500",
    ),
    "hub cache": (
        "models--a--b/snapshots/12ab/config.json models--a--b/snapshots/34cd/config.json",
        "models--a--b",
        "is a model in the cache of the Hugging Face hub",
        "--load-hf IN/models--a--b/snapshots/34cd",
    ),
    "safetensors": (
        "config.json model.safetensors",
        "model.safetensors",
        "is one file of a Hugging Face folder",
        "--load-hf IN, its folder",
    ),
    "config.json": (
        "config.json model.safetensors",
        "config.json",
        "is one file of a Hugging Face folder",
        "--load-hf IN, its folder",
    ),
    "pytorch_model.bin": (
        "config.json pytorch_model.bin",
        "pytorch_model.bin",
        "is one file of a Hugging Face folder",
        "--load-hf IN, its folder",
    ),
    "GGUF": (
        "m.gguf",
        "m.gguf",
        "is a GGUF file",
        "python launch/convert.py --from-gguf IN/m.gguf --output NEW, then --load-hf NEW",
    ),
}


def make(folder: Path, files: str) -> Path:
    for name in files.split():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"GGUF\x03\0\0\0" if path.suffix == ".gguf" else b"")
        if path.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("archive/data.pkl", "")
    return folder


def told(flag: str, path: Path | str) -> str:
    """The error of every program that has the flag; they must agree."""
    programs = [CONVERT] if flag.startswith("--from") else [PRETRAIN, EVALUATE, GENERATE, CONVERT]
    errors = set()
    for program in programs if not flag.startswith("--from") else ():
        with pytest.raises(ConfigError) as caught:
            parse_arguments([flag, str(path)], program=program)
        errors.add(str(caught.value))
    errors = errors or {str(recognize(flag, path))}
    (error,) = errors
    return error


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("flag", ["--load", "--load-hf"])
def test_the_answer_says_what_it_is_and_what_helps(tmp_path: Path, name: str, flag: str) -> None:
    files, inner, what, works = KINDS[name]
    path = make(tmp_path, files) / inner
    error = told(flag, path).replace(str(tmp_path), "IN")
    given = f"IN/{inner}".rstrip("/")
    assert error.startswith(f"{flag} {given}: ")
    assert what in error
    assert works in error.partition(" (works: ")[2]


def test_a_folder_of_transformers_given_to_load(tmp_path: Path) -> None:
    make(tmp_path, "runs/a/config.yaml runs/b/config.json runs/b/model.safetensors")
    path = tmp_path / "runs/b"
    error = told("--load", path)
    assert "is a Hugging Face folder (works: --load-hf " in error
    assert "runs/a" not in error
    make(path, "trainer_state.json optimizer.pt training_args.bin")
    assert "of transformers' Trainer" in told("--load", path)
    assert f"--load-hf {path}, which starts with a new optimizer" in told("--load", path)


def test_a_run_given_to_load_hf(tmp_path: Path) -> None:
    make(tmp_path, "config.yaml metrics.jsonl step-3/manifest.json")
    for path in (tmp_path, tmp_path / "step-3"):
        assert told("--load-hf", path).endswith(f"is a run of this program (works: --load {path})")


@pytest.mark.parametrize(
    ("name", "owner_is_a_folder", "is_hub"),
    [
        ("meta-llama/Llama-3.1-8B", False, True),
        ("runs/toy-3", False, False),
        ("models/llama", True, False),
        ("./models/llama", False, False),
        ("a/b/c", False, False),
        ("model/m.gguf", False, False),
    ],
)
def test_a_name_of_the_hub(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    owner_is_a_folder: bool,
    is_hub: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    if owner_is_a_folder:
        Path(name).parent.mkdir()
    short = Path(name).name
    command = f"hf download {name} --local-dir {short}, then --load-hf {short}"
    for flag in ("--load", "--load-hf"):
        assert (command in told(flag, name)) == is_hub


@pytest.mark.parametrize("start", ["https://huggingface.co/", "https://hf.co/", "hf://"])
def test_an_address_on_the_hub(start: str) -> None:
    for flag in ("--load", "--load-hf"):
        assert "hf download a/b --local-dir b, then --load-hf b" in told(flag, f"{start}a/b")


def test_what_convert_takes_is_not_refused(tmp_path: Path) -> None:
    make(tmp_path, ".metadata __0_0.distcp a/m.pt b/m.gguf b/c.pt")
    assert recognize("--from-torch", tmp_path) is None
    assert recognize("--from-torch", tmp_path / "a/m.pt") is None
    assert recognize("--from-gguf", tmp_path / "b/m.gguf") is None
    assert f"--from-torch {tmp_path / 'a/m.pt'}" in told("--from-torch", tmp_path / "a")
    assert "is a GGUF file" in told("--from-torch", tmp_path / "b/m.gguf")
    assert "--from-torch" in told("--from-gguf", tmp_path)


@pytest.mark.parametrize("unreadable", [lambda path: path / ("x" * 300), lambda path: path / "no"])
def test_nothing_is_said_of_what_is_unknown(
    tmp_path: Path, unreadable: Callable[[Path], Path]
) -> None:
    make(tmp_path, "notes.txt data/a.jsonl")
    for path in (unreadable(tmp_path), tmp_path, tmp_path / "notes.txt", tmp_path / "data"):
        assert recognize("--load", path) is None
    assert re.search("config.json is missing", told("--load-hf", tmp_path))
