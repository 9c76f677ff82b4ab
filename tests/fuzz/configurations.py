"""Random command lines: every setting, with values that work and values that do not.

A line consists of a sound base (a grid, a tiny model that it can split, rows, batches), groups of
flags that belong together, single flags, and sometimes a nasty value. A third of the lines are
accepted, and most others have one mistake. A new field of the schema is covered without a change
here.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from cp_megatron.config.fields import Setting, settings

OUTSIDE: Mapping[str, str] = {
    "wandb_project": "the network",
    "wandb_entity": "the network",
    "wandb_exp_name": "the network",
    "wandb_save_dir": "the network",
    "device": "this machine has no GPU that a test may count on",
}
"""Settings that no line has a value of its own for, and what they would need."""

# Values that often work. What is not here has values by its type.
SENSIBLE: Mapping[str, Sequence[str]] = {
    "preset": ("toy", "toy-gpt", "gpt2-small", "llama-1b"),
    "norm_epsilon": ("1e-5", "1e-6", "0", "0.1", "1"),
    "rotary_base": ("10000", "500000", "1.5", "2"),
    "hidden_dropout": ("0", "0.1", "0.9"),
    "attention_dropout": ("0", "0.1", "0.9"),
    "rope_type": ("default", "default", "linear", "yarn", "dynamic", "llama3", "longrope"),
    "rope_scaling_factor": ("1", "2", "4", "1.5"),
    "train_data_path": ("text", "text/one.txt"),
    "load": ("missing", "text"),
    "load_hf": ("missing", "text"),
    "save": ("new", "new/deeper"),
    "init_method_std": ("0.02", "0.5", "1e-9"),
    "make_vocab_size_divisible_by": ("1", "4", "8", "100", "128"),
    "vocab_size": ("257", "260", "300", "1000"),
    "max_position_embeddings": ("256", "512", "1000"),
    "ffn_hidden_size": ("32", "64", "96", "128"),
    "kv_channels": ("2", "4", "6", "8", "16", "24"),
    "distributed_timeout_minutes": ("1", "10", "0.5"),
    "split": ("969,30,1", "8,1,1", "1", "1,0,0", "1,1", "98, 2"),
    "seed": ("0", "1234", "9223372036854775807"),
    "lr": ("1e-3", "3e-4", "0.01", "1e-12"),
    "min_lr": ("0", "1e-5", "1e-4"),
    "lr_warmup_iters": ("0", "1"),
    "lr_warmup_samples": ("0", "1", "3"),
    "lr_warmup_fraction": ("0", "0.1", "0.5"),
    "lr_warmup_init": ("0", "1e-13"),
    "train_samples": ("8", "9", "16"),
    "train_epochs": ("0.01", "0.1"),
    "weight_decay": ("0", "0.1", "1"),
    "adam_beta1": ("0", "0.5", "0.9"),
    "adam_beta2": ("0", "0.95", "0.999"),
    "adam_eps": ("1e-8", "1e-3", "1"),
    "clip_grad": ("0", "0.1", "1", "1e9"),
    "z_loss_coeff": ("0", "1e-4", "0.1"),
    "num_experts": ("2", "4", "8", "None"),
    "moe_ffn_hidden_size": ("16", "32", "48"),
    "moe_layers": ("0", "1", "0 1"),
    "moe_router_topk": ("1", "2", "3"),
    "moe_aux_loss_coeff": ("0", "1e-2"),
    "moe_z_loss_coeff": ("0", "1e-3"),
    "expert_model_parallel_size": ("1", "2", "4"),
    "log_interval": ("1", "2", "10"),
    "eval_iters": ("0", "1", "2"),
    "save_interval": ("1", "2", "100"),
    "mlp_tile_size": ("1", "7", "16", "100", "100000"),
    "loss_chunk_size": ("1", "7", "16", "100", "100000"),
    "data_path": ("text", "text/one.txt", "text/one.txt text/two.txt"),
    "tokenizer_model": ("text/one.txt", "missing"),
    "tokenizer_type": ("byte", "byte", "byte", "huggingface", "sentencepiece", "tiktoken", "gpt2"),
    "vocab_file": ("text/one.txt", "missing"),
    "merge_file": ("text/one.txt", "missing"),
    "window_size": ("0 0", "1 0", "16 0", "-1 0", "300 -1", "7,0"),
    "window_layers": ("0", "1", "0 1"),
    "data_parallel_replicate_size": ("1", "2", "auto"),
    "pipeline_parallel_size": ("1", "2"),
    "num_virtual_stages_per_pipeline_rank": ("1", "2", "None"),
    "pipeline_model_parallel_layout": ("Et|tL", "Et*2|t*2L", "E|ttL", "EtL", "None"),
    "hierarchical_context_parallel_sizes": ("2 2", "1 4", "4 1", "2 1", "1 1"),
    "profile_ranks": ("0", "1", "0 1"),
    "profile_step_start": ("0", "1"),
    "profile_step_end": ("1", "2"),
    "rope_short_factor": ("1 1 1 1", "1 1.5", "2"),
    "rope_long_factor": ("1 2 3 4", "1 4", "2"),
}
_BY_KIND: Mapping[str, Sequence[str]] = {
    "int": ("1", "2", "3", "4", "8", "16"),
    "float": ("0", "0.1", "0.5", "1", "2"),
    "str": ("new", "text", "a name"),
}
_NASTY_INTS = (
    *("0", "-1", "-2", "3", "7", "65536", "65537", "2147483647", "2147483648", "9" * 30),
    *("9" * 5000, "1e3", "2.0", "None", "nan", "", "1_0", " 5", "\u0663", "0x10", "--", "-0"),
)
_NASTY_FLOATS = (
    *("nan", "inf", "-inf", "1e308", "1e309", "5e-324", "-0.0", "1e-45", "1e38", "1e39", "-1"),
    *("0", "1", "0.9999999999999999", "1.0000000000000002", "None", "", "1_0.5", "0x1p3", "1e"),
)
_NASTY_TEXTS = (
    *("", "None", "-", "-x", "a\nb", "\x1b[31m", "\udcff", "\u2028", "missing/deeper", "..", "."),
    *("/dev/null", "/dev/zero", "x" * 5000, "text/empty.txt", "text/binary.bin", "fifo", "~", "*"),
    *("0.5 text", "nan text", "0 text", "1e-99999999 text", "text 1", "broken.idx", "{a}", "[b]"),
    *("1,", ",", "0", "1e400,1", "-1,1", "a,b", "1,1,1,1", "1e-9,1", "nan"),
)
# Flags that make no sense one by one.
_GROUPS = (
    "--position-embedding-type rope --rope-type linear --rope-scaling-factor 2",
    "--position-embedding-type rope --rope-type dynamic --rope-scaling-factor 4"
    " --original-max-position-embeddings 16",
    "--position-embedding-type rope --rope-type yarn --rope-scaling-factor 4"
    " --original-max-position-embeddings 16 --no-rope-truncate",
    "--position-embedding-type rope --rope-type yarn --rope-scaling-factor 1.5"
    " --original-max-position-embeddings 64 --mscale 1 --mscale-all-dim 0.5 --beta-fast 8",
    "--position-embedding-type rope --rope-type llama3 --rope-scaling-factor 8"
    " --original-max-position-embeddings 16 --rope-high-freq-factor 2",
    "--position-embedding-type rope --kv-channels 8 --rope-type longrope"
    " --original-max-position-embeddings 16 --rope-short-factor 1 1 1 2"
    " --rope-long-factor 1 2 3 4",
    "--linear-attention-layers 0 --linear-num-key-heads 2 --linear-num-value-heads 4"
    " --linear-key-head-dim 4 --linear-value-head-dim 6 --attention-output-gate",
    "--num-experts 4 --moe-ffn-hidden-size 32 --moe-aux-loss-coeff 1e-2 --sequence-parallel",
    "--num-experts 8 --moe-layers 1 --moe-router-topk 3 --moe-router-score-function sigmoid"
    " --moe-router-enable-expert-bias --moe-router-num-groups 4 --moe-router-group-topk 2"
    " --moe-shared-expert-intermediate-size 32 --sequence-parallel",
    "--num-experts 4 --moe-router-topk 1 --moe-router-pre-softmax --expert-model-parallel-size 2"
    " --sequence-parallel",
    "--pipeline-parallel-size 2 --num-layers 3",
    "--pipeline-parallel-size 2 --num-layers 2 --fsdp-reshard always",
    "--pipeline-parallel-size 2 --num-layers 4 --num-virtual-stages-per-pipeline-rank 2",
    "--pipeline-parallel-size 2 --num-layers 3 --pipeline-model-parallel-layout E|t|t|tL",
    "--position-embedding-type none",
    "--position-embedding-type learned_absolute",
    "--window-size 5 0",
    "--window-size 40 0 --window-layers 0",
    "--window-size 0 -1",
    "--document-mask",
    "--document-mask --cp-layout balanced",
    "--document-mask --window-size 9 0",
    "--packing best-fit",
    "--recompute-granularity full",
    "--recompute-granularity full --recompute-num-layers 1",
    "--recompute-granularity full --cpu-offloading",
    "--recompute-granularity selective",
    "--optimizer-cpu-offload",
    "--memory-report",
    "--cp-comm-type p2p --cp-route ring",
    "--cp-comm-type p2p --cp-route direct",
    "--cp-comm-type p2p --cp-message-parts 2",
    "--cp-comm-type allgather",
    "--cp-comm-type a2a",
    "--cp-layout contiguous",
    "--cp-layout zigzag",
    "--no-cp-check-ranks",
    "--profile --profile-step-start 0 --profile-step-end 1",
    "--lr-decay-style constant",
    "--lr-decay-style linear --min-lr 1e-5 --lr-decay-iters 2",
    "--lr-decay-style inverse-square-root --lr-warmup-fraction 0.5",
    "--lr-decay-style WSD --lr-wsd-decay-iters 1 --lr-wsd-decay-style minus_sqrt",
    "--lr-decay-style WSD --lr-wsd-decay-samples 3 --lr-decay-samples 7",
    "--log-params-norm --log-num-zeros-in-grad",
    "--eval-iters 0",
    "--eval-iters 1 --eval-interval 1 --split 8,2",
    "--hidden-dropout 0.1 --attention-dropout 0.2",
    "--dtype float64",
    "--bf16",
    "--dtype bfloat16 --deterministic",
    "--mlp-tile-size 16 --loss-chunk-size 10",
    "--vocab-size 300 --make-vocab-size-divisible-by 8",
    "--untie-embeddings-and-output-weights --add-qkv-bias",
    "--qk-layernorm --swiglu --normalization LayerNorm",
    "--disable-bias-linear --no-swiglu",
    "--train-data-path text/one.txt --valid-data-path text/two.txt",
    "--data-path chats.jsonl --sft --seq-length 256",
    "--data-path lines.jsonl --skip-bad-lines",
    "--data-path 0.7 text/one.txt 0.3 lines.jsonl",
    "--kernel reference",
    "--kernel cpu",
)
_HIERARCHY = "--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2"


@dataclass(frozen=True)
class Line:
    """A command line and the ranks that it is started on; ``words`` of flags with their values."""

    world: int
    words: tuple[str, ...]

    @property
    def names(self) -> frozenset[str]:
        """The settings that it says something about."""
        flags = {word.partition("=")[0] for word in self.words}
        return frozenset(_names()[flag] for flag in flags & _names().keys())


def make_folder(folder: Path) -> None:
    """The files that lines name; a line is for a process in this folder."""
    (folder / "text").mkdir()
    words = ["three", "blind", "mice", "see", "how", "they", "run", "after", "a", "wife", "\n"]
    for name, length in (("one.txt", 1500), ("two.txt", 700), ("three.txt", 40)):
        text = " ".join(words[i * i % 11] for i in range(length))
        (folder / "text" / name).write_text(text)
    (folder / "text" / "empty.txt").touch()
    (folder / "text" / "binary.bin").write_bytes(bytes(range(256)))
    turns = [("user", "three blind mice"), ("assistant", "see how they run")]
    chat = [{"role": role, "content": text} for role, text in turns]
    # Both have both keys, so that each flag can be combined with each file.
    lines = [{"text": " ".join(words[i % 7 :] * 9), "messages": chat} for i in range(60)]
    for name in ("lines.jsonl", "chats.jsonl"):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "broken.idx").write_bytes(b"MMIDIDX\0\0")


def line_of(seed: int) -> Line:
    """A line, the same wherever and whenever it is asked for; of many a third is accepted."""
    rng = Random(seed)
    world, said = _base(rng)
    groups = rng.sample(_GROUPS, rng.randint(0, 4))
    if said["context_parallel_size"][1] == "4" and rng.random() < 0.4:
        groups.append(_HIERARCHY)
    for group in groups:
        said |= _said(group)
    for row in rng.sample(_own_flags(), rng.choice([0, 0, 1, 1, 2, 3])):
        said[row.name] = _flag(rng, row)
    if rng.random() < 0.3:
        row = rng.choice([row for row in _own_flags() if row.kind != "bool"])
        said[row.name] = _nasty(rng, row)
    if said.keys() & {"train_data_path", "valid_data_path"} and rng.random() < 0.9:
        said.pop("data_path", None)
    if said.keys() & {"train_samples", "train_epochs"}:
        del said["train_iters"]
    words = [word for flag in said.values() for word in flag]
    if rng.random() < 0.04:
        words += _strays(rng)
    return Line(world, tuple(words))


@functools.cache
def _own_flags() -> list[Setting]:
    return [row for name, row in settings().items() if name not in OUTSIDE]


@functools.cache
def _names() -> dict[str, str]:
    """Flag -> setting."""
    rows = settings().values()
    return {f: row.name for row in rows for f in (row.flag, row.off_flag)}


def _said(group: str) -> dict[str, list[str]]:
    """``--a 1 --no-b`` as ``{"a": ["--a", "1"], "b": ["--no-b"]}``."""
    said: dict[str, list[str]] = {}
    name = ""
    for word in group.split():
        name = _names().get(word, name)
        said.setdefault(name, []).append(word)
    return said


def _base(rng: Random) -> tuple[int, dict[str, list[str]]]:
    """A sound run of a tiny model, by setting."""
    grids = [(1, 1, 1), (2, 2, 1), (2, 1, 2), (2, 1, 1)]
    grids += [(4, 4, 1), (4, 1, 4), (4, 2, 2), (4, 2, 1), (4, 1, 2), (4, 1, 1)]
    world, cp, tp = rng.choice(grids)
    heads = rng.choice([4, 8])
    micro = rng.choice([1, 2])
    values = {
        "preset": rng.choice(["toy", "toy-gpt"]),
        "context_parallel_size": cp,
        "tensor_parallel_size": tp,
        "num_layers": rng.randint(1, 2),
        "hidden_size": heads * rng.choice([4, 6, 8]),
        "ffn_hidden_size": rng.choice([32, 64]),
        "num_attention_heads": heads,
        "num_query_groups": rng.choice([1, 2, heads]),
        "seq_length": 2 * cp * tp * rng.randint(1, 128 // (cp * tp)),
        "micro_batch_size": micro,
        "global_batch_size": micro * rng.choice([1, 1, 2]) * world // (cp * tp),
        "train_iters": rng.choice([1, 1, 2, 3]),
        "lr_warmup_iters": 0,
        "eval_iters": rng.randint(0, 1),
        "data_path": "text",
    }
    said = {name: [settings()[name].flag, str(value)] for name, value in values.items()}
    said["device"] = ["--device", "cpu"]
    if tp > 1 and rng.random() < 0.5:
        said["sequence_parallel"] = ["--sequence-parallel"]
    if rng.random() < 0.2:
        said["pad_rows"] = ["--pad-rows"]
        said["seq_length"] = ["--seq-length", str(rng.randint(20, 256))]
    for name in ("micro_batch_size", "global_batch_size"):
        if rng.random() < 0.2:
            del said[name]
    return world, said


def _flag(rng: Random, row: Setting) -> list[str]:
    """The flag with a value that often works, as words."""
    if row.kind == "bool":
        return [rng.choice([row.flag, row.off_flag])]
    text = rng.choice(SENSIBLE.get(row.name) or row.choices or _BY_KIND[row.kind])
    texts = text.split(" ") if row.count != 1 else [text]
    return _spelled(rng, row, texts * row.count if 1 == len(texts) < row.count else texts)


def _nasty(rng: Random, row: Setting) -> list[str]:
    """The flag with what may not work."""
    pools = {"int": _NASTY_INTS, "float": _NASTY_FLOATS, "str": _NASTY_TEXTS}
    pool = pools.get(row.kind, _NASTY_TEXTS)
    if row.kind == "str" and row.count != 1 and rng.random() < 0.5:
        return [row.flag, *rng.choice(_NASTY_TEXTS).split(" ")]
    several = rng.randint(1, 4) if row.count != 1 else 1
    return _spelled(rng, row, rng.choices([*pool, _garbage(rng)], k=several))


def _garbage(rng: Random) -> str:
    return "".join(chr(rng.choice([rng.randrange(128), rng.randrange(0xD800)])) for _ in range(4))


def _spelled(rng: Random, row: Setting, texts: list[str]) -> list[str]:
    if len(texts) == 1 and rng.random() < 0.5:
        return [f"{row.flag}={texts[0]}"]
    return [row.flag, *texts]


def _strays(rng: Random) -> list[str]:
    """Words that are no flags, flags without values, flags given twice."""
    flag = rng.choice(_own_flags()).flag
    word = rng.choice(
        [flag, f"{flag} yes", flag[:-1], flag[1:], flag.upper(), flag.replace("-", "_"), "--"]
    )
    return rng.choice([[word], [word, "1"], [word, word], [f"{word}="], ["stray"]])
