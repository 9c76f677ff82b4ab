"""Recognizes the models of other programs by what lies in a folder or file, and says what helps.

Only names and the first bytes of files are read: nothing is unpickled.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from cp_megatron.config.files.run_folders import CONFIG_FILE, RUNS, STEP_FOLDER
from cp_megatron.errors import ConfigError

LOAD_HF, FROM_TORCH, FROM_GGUF = "--load-hf", "--from-torch", "--from-gguf"
HF_CONFIG = "config.json"
HF_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
"""The weights of a Hugging Face folder: in one file, or the index of several."""
HF_WEIGHTS_TORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json")
"""The weights of a Hugging Face folder that were written by torch.save."""
DCP_METADATA = ".metadata"
"""The file in a folder of torch.distributed.checkpoint that says what is stored where."""

Answer = tuple[str, str]
"""A clause that says what a path is, and what works instead."""
_ACCEPTED: Answer = ("", "")
"""The flag takes such a path."""

_ZIP, _OLD_TORCH, _GGUF = b"PK\x03\x04", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19", b"GGUF"
_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_NOT_WEIGHTS = ("optimizer", "rng_state", "scaler", "scheduler", "training_args")
_META_FILE = re.compile(r"consolidated\.\d+\.pth")
_HUB_NAME = re.compile(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)?")
_TRAINER_STEP = re.compile(r"checkpoint-(\d+)")
_MEGATRON_STEP = re.compile(r"iter_(\d+)")
_HUB_ADDRESS = re.compile(r"(https?:/+)?(www\.)?(huggingface\.co|hf\.co)/|hf:/+")
_MODEL = "where MODEL is a folder with the model's config.json and tokenizer"


def recognize(flag: str, path: str | Path) -> ConfigError | None:
    """The error for a path that another flag or program can use; None if it is not recognized.

    Args:
        flag: the flag that names the path.
        path: a file, a folder, or a name that does not exist.
    """
    try:
        answer = _answer(Path(path), flag)
    except OSError:
        return None
    return None if answer in (None, _ACCEPTED) else ConfigError(flag, path, *answer)


def _answer(path: Path, flag: str) -> Answer | None:
    kinds = _FILES if path.is_file() else _FOLDERS if path.is_dir() else _NAMES
    return next((answer for kind in kinds if (answer := kind(path, flag)) is not None), None)


def _conversion(source: Path) -> str:
    """The command that makes a Hugging Face folder of what torch wrote."""
    command = (
        f"python launch/convert.py {FROM_TORCH} {_quoted(source)} {LOAD_HF} MODEL --output NEW"
    )
    return f"{command}, {_MODEL}"


def _inside(path: Path, flag: str) -> Answer | None:
    """The answer for a file or folder inside the one that was named."""
    answer = _answer(path, flag)
    if answer == _ACCEPTED:
        return f"holds {path.name}", f"{flag} {_quoted(path)}"
    return None if answer is None else (f"holds {path.name}, which {answer[0]}", answer[1])


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _python(code: str) -> str:
    """The command that runs a line of Python; paths in it stand in single quotes."""
    return f"python -c {shlex.quote(code)}" if set(code) & {*'"$`\\!'} else f'python -c "{code}"'


def _has(folder: Path, *names: str) -> bool:
    return any((folder / name).is_file() for name in names)


def _newest(folder: Path, name: re.Pattern[str]) -> Path | None:
    """The folder inside ``folder`` whose name has the largest number."""
    steps = {int(m[1]): x for x in folder.iterdir() if (m := name.fullmatch(x.name)) and x.is_dir()}
    return steps[max(steps)] if steps else None


def _is_hf(folder: Path) -> bool:
    return _has(folder, HF_CONFIG) and _has(folder, *HF_WEIGHTS, *HF_WEIGHTS_TORCH)


def _own_run(path: Path, flag: str) -> Answer | None:
    step, run = STEP_FOLDER.fullmatch(path.name), path.parent
    if flag == "--load" or not (
        (_has(path, "manifest.json") and step and _has(run, CONFIG_FILE))
        or (_has(path, CONFIG_FILE) and _newest(path, STEP_FOLDER))
    ):
        return None
    return "is a run of this program", f"--load {_quoted(path)}"


def _adapter(path: Path, flag: str) -> Answer | None:
    if not _has(path, "adapter_config.json"):
        return None
    code = f"from peft import AutoPeftModelForCausalLM as M; m = M.from_pretrained({str(path)!r})"
    works = _python(f"{code}; m.merge_and_unload().save_pretrained('merged')")
    rule = "is an adapter of PEFT (such as LoRA), which holds only changes to another model"
    return rule, f"{works}, then copy the tokenizer to merged and use {LOAD_HF} merged"


def _megatron(path: Path, flag: str) -> Answer | None:
    release = path / "release"
    step = _newest(path, _MEGATRON_STEP) or (release if release.is_dir() else path)
    places = (step.parent if step.name.startswith("mp_rank_") else step).glob("mp_rank_*")
    if any(_has(place, "model_optim_rng.pt") for place in places):
        works = "the Megatron-LM command that loads it, with --ckpt-convert-format torch_dist "
        works += "--ckpt-convert-save NEW; Megatron Bridge then exports NEW to Hugging Face"
        return "is a legacy checkpoint of Megatron-LM (mp_rank_*/model_optim_rng.pt)", works
    if not (_has(step, DCP_METADATA) and _has(step, "common.pt")):
        return None
    code = "from megatron.bridge import AutoBridge; "
    code += f"AutoBridge.from_hf_pretrained('MODEL').export_ckpt({str(step)!r}, 'exported')"
    works = f"{_python(code)}, {_MODEL}, then {LOAD_HF} exported"
    if not _has(step, "run_config.yaml"):
        works = "Megatron Bridge's guide megatron-lm-to-megatron-bridge, 'Best-effort export of an "
        works += "existing Megatron-LM checkpoint', which writes run_config.yaml and exports it"
    return "is a checkpoint of Megatron-LM (torch_dist)", works


def _dcp(path: Path, flag: str) -> Answer | None:
    what = "is a folder of torch.distributed.checkpoint (DCP)"
    if _is_hf(path):
        return None
    if _has(path, DCP_METADATA):
        if flag == FROM_TORCH:
            return _ACCEPTED
        writer = ", as torchtitan, FSDP and accelerate write them"
        return f"{what}{writer}", _conversion(path)
    if next(path.glob("*.distcp"), None) is not None:
        rule = f"{what} without {DCP_METADATA}, so it was not written to its end"
        return rule, "another of its steps"
    for steps in ("*", "*/*"):  # torchtitan's are in DUMP_FOLDER/checkpoint
        inside = [x.parent for x in path.glob(f"{steps}/{DCP_METADATA}")]
        inside = [x for x in inside if not x.name.startswith("optimizer")]
        if inside:
            return _inside(max(inside, key=_number), flag)
    return None


def _number(path: Path) -> tuple[int, str]:
    """The number at the end of a name, by which the newest step is found."""
    digits = re.search(r"\d+$", path.name)
    return int(digits[0]) if digits else -1, path.name


def _trainer(path: Path, flag: str) -> Answer | None:
    if flag != LOAD_HF and _has(path, "trainer_state.json") and _is_hf(path):
        rule = "is a checkpoint of transformers' Trainer, whose weights a new run can start from"
        return rule, f"{LOAD_HF} {_quoted(path)}, which starts with a new optimizer"
    step = _newest(path, _TRAINER_STEP)
    if step is None or _is_hf(path):
        return None
    rule = f"holds checkpoints of transformers' Trainer; the newest is {step.name}"
    if not _is_hf(step):
        inner = _answer(step, flag)
        return None if inner is None else (f"{rule}, which {inner[0]}", inner[1])
    return rule, f"{LOAD_HF} {_quoted(step)}"


def _deepspeed(path: Path, flag: str) -> Answer | None:
    inner = next((x for x in path.glob("global_step*") if x.is_dir()), None)
    shards = next(path.glob("*zero_pp_rank_*_optim_states.pt"), None)
    if _is_hf(path) or (inner is None and shards is None and not _has(path, "zero_to_fp32.py")):
        return None
    top = path if shards is None else path.parent
    script = shlex.quote(str(top / "zero_to_fp32.py"))
    works = f"python {script} {_quoted(top)} NEW --safe_serialization, then config.json and the "
    return "is a checkpoint of DeepSpeed (ZeRO)", f"{works}tokenizer copied to NEW, {LOAD_HF} NEW"


def _hub_cache(path: Path, flag: str) -> Answer | None:
    snapshots = path if path.name == "snapshots" else path / "snapshots"
    if not snapshots.is_dir():
        return None
    versions = sorted(x for x in snapshots.iterdir() if _has(x, HF_CONFIG))
    if not versions:
        return None
    main = snapshots.parent / "refs" / "main"
    current = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
    chosen = next((x for x in versions if x.name == current), versions[-1])
    return "is a model in the cache of the Hugging Face hub", f"{LOAD_HF} {_quoted(chosen)}"


def _hugging_face(path: Path, flag: str) -> Answer | None:
    if _is_hf(path):
        everywhere = "in pretrain.py, evaluate.py and generate.py"
        works = f"{LOAD_HF} {_quoted(path)}, {everywhere}"
        return _ACCEPTED if flag == LOAD_HF else ("is a Hugging Face folder", works)
    if _has(path, *HF_WEIGHTS, *HF_WEIGHTS_TORCH):
        rule = f"holds the weights of a Hugging Face folder, but no {HF_CONFIG}"
        return rule, f"the model's {HF_CONFIG} copied to it, then {LOAD_HF} {_quoted(path)}"
    return None


def _loose_files(path: Path, flag: str) -> Answer | None:
    """One file of weights in a folder that is nothing else."""
    patterns = ("*.gguf", "consolidated.*.pth", "*.pth", "*.pt", "*.bin", "*.ckpt")
    files = (file for pattern in patterns for file in sorted(path.glob(pattern)))
    answers = (_inside(file, flag) for file in files if not file.name.startswith(_NOT_WEIGHTS))
    return next(filter(None, answers), None)


def _gguf_file(path: Path, flag: str) -> Answer | None:
    if _head(path, 4) != _GGUF:
        return None
    if flag == FROM_GGUF:
        return _ACCEPTED
    command = f"python launch/convert.py {FROM_GGUF} {_quoted(path)} --output NEW"
    return "is a GGUF file", f"{command}, then {LOAD_HF} NEW"


def _hugging_face_file(path: Path, flag: str) -> Answer | None:
    is_torch = path.name.startswith("pytorch_model") and _has(path.parent, HF_CONFIG)
    is_model = path.name == HF_CONFIG or path.name.endswith(
        (".safetensors", ".safetensors.index.json")
    )
    if not is_model and (not is_torch or flag == FROM_TORCH):
        return None
    return "is one file of a Hugging Face folder", f"{LOAD_HF} {_quoted(path.parent)}, its folder"


def _dcp_file(path: Path, flag: str) -> Answer | None:
    if path.suffix != ".distcp" and path.name != DCP_METADATA:
        return None
    rule = "is one file of a folder of torch.distributed.checkpoint (DCP)"
    return rule, _conversion(path.parent)


def _meta_shards(path: Path, flag: str) -> Answer | None:
    if not _META_FILE.fullmatch(path.name) or len(list(path.parent.glob("consolidated.*.pth"))) < 2:
        return None
    rule = "is one of several files into which Meta cut the model, which are not joined here"
    return rule, "the model as a Hugging Face folder: hf download OWNER/NAME --local-dir NEW"


def _torch_file(path: Path, flag: str) -> Answer | None:
    head = _head(path, len(_OLD_TORCH))
    is_torch = head == _OLD_TORCH or (head.startswith(_ZIP) and path.suffix in _TORCH_SUFFIXES)
    if not is_torch:
        return None
    if path.name == "model_optim_rng.pt":
        return _megatron(path.parent, flag)
    if flag == FROM_TORCH:
        return _ACCEPTED
    return "is a file of PyTorch (torch.save)", _conversion(path)


def _hub_name(path: Path, flag: str) -> Answer | None:
    name = _HUB_ADDRESS.sub("", str(path), count=1)
    is_local = len(path.parts) == 2 and path.parent.is_dir()
    if not _HUB_NAME.fullmatch(name) or is_local or path.parts[0] == RUNS.name:
        return None
    # The hub has a few models without an owner; for other flags one word is a mistyped path.
    is_file = path.suffix in (*_TORCH_SUFFIXES, ".gguf", ".safetensors")
    if is_file or (flag != LOAD_HF and len(path.parts) == 1):
        return None
    rule = "is no folder here; models are not downloaded"
    works = f"for a model of the Hugging Face hub: hf download {name} --local-dir {path.name}, "
    return rule, f"{works}then {LOAD_HF} {path.name}"


def _head(path: Path, size: int) -> bytes:
    with path.open("rb") as stream:
        return stream.read(size)


_Kinds = Sequence[Callable[[Path, str], Answer | None]]
_FILES: _Kinds = (_gguf_file, _hugging_face_file, _dcp_file, _meta_shards, _torch_file)
_FOLDERS: _Kinds = (
    *(_own_run, _adapter, _megatron, _deepspeed, _dcp, _trainer, _hub_cache, _hugging_face),
    _loose_files,
)
_NAMES: _Kinds = (_hub_name,)
