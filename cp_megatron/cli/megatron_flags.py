"""Megatron-LM's flags that are not flags here: each is taken, translated or refused with a reason.

A flag that only concerns speed, reports or the place of data is taken with a note. A flag that
would change the result, and cannot be honoured, is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from cp_megatron.cli.layer_patterns import LAYER_FLAGS, layers_of_pattern
from cp_megatron.cli.megatron_answers import Answer, Noted, OneOf, Refused, Renamed, Translated
from cp_megatron.cli.megatron_experts import EXPERTS
from cp_megatron.cli.megatron_names import NOTED, WITHOUT_COUNTERPART
from cp_megatron.cli.pipeline_flags import STAGE_FLAGS, stage_piece
from cp_megatron.config.words import Piece, split_words, truth
from cp_megatron.errors import ConfigError, Mistakes

_POSITIONS, _MASKS = "--reset-position-ids", "--reset-attention-mask"
_LLAMA3 = "--rope-type llama3 --rope-scaling-factor 8 --original-max-position-embeddings 8192"
_FLOAT32 = OneOf({"fp32": ""}, "the optimizer's state and the gradients are float32")
_EVERY_LAYER = "--recompute-num-layers None"
_TRACE = Noted("--profile --profile-memory records memory in the trace")
WEIGHTS_ONLY = (
    "launch/convert.py --load RUN --output DIR, then --load-hf DIR, to take only the weights"
)
_WEIGHTS = Noted("no run is loaded", unless="--load", works=WEIGHTS_ONLY)
_ONE_DECAY = "the weight decay is constant"
_ROPE = "--position-embedding-type rope"
_LAYOUT = "--pipeline-model-parallel-layout"

SPECIAL: Mapping[str, Answer] = {
    # parallelism
    **dict.fromkeys(
        ("--encoder-pipeline-model-parallel-size", "--encoder-tensor-model-parallel-size"),
        OneOf({"0": ""}, "there is no encoder"),
    ),
    "--pipeline-model-parallel-split-rank": Refused("there is no encoder", _LAYOUT),
    "--standalone-embedding-stage": Refused(
        "a layout gives the embedding a stage of its own", f"{_LAYOUT} 'E|t*4|t*4L' for 3 stages"
    ),
    "--hybrid-context-parallel": Refused("all rows share one size", "--context-parallel-size"),
    "--context-parallel-algo": OneOf(
        {
            "megatron_cp_algo": "--cp-comm-type p2p",
            "ulysses_cp_algo": "--cp-comm-type a2a",
            "hybrid_cp_algo": "--cp-comm-type auto",
        },
        "the exchange has another name",
        "--cp-comm-type",
    ),
    # optimizer
    **dict.fromkeys(
        ("--experimental-attention-variant", "--linear-attention-type"),
        OneOf(
            {"gated_delta_net": ""},
            "the only layers without attention are gated DeltaNets",
            "gated_delta_net with --linear-attention-freq",
        ),
    ),
    "--muon-use-nesterov": Renamed("--muon-nesterov"),
    "--muon-no-nesterov": Translated("--no-muon-nesterov"),
    "--muon-no-split-qkv": Refused("the matrices of q, k and v are orthogonalized one by one"),
    "--muon-tp-mode": OneOf(
        dict.fromkeys(("duplicated", "distributed"), ""),
        "whole matrices are orthogonalized, so that no grid changes the result",
        "--muon-tp-mode duplicated",
    ),
    "--muon-fp32-matmul-prec": OneOf(
        {"medium": ""},
        "a GPU multiplies in bfloat16 to orthogonalize, which is medium",
        "--muon-fp32-matmul-prec medium",
    ),
    "--muon-scalar-optimizer": OneOf(
        {"adam": ""}, "AdamW updates what Muon does not", "--muon-scalar-optimizer adam"
    ),
    "--decoupled-lr": Refused("all parameters share one learning rate", "--lr"),
    "--head-lr-mult": OneOf({"1": ""}, "all parameters share one learning rate", "--lr"),
    "--weight-decay-incr-style": OneOf({"constant": ""}, _ONE_DECAY, "--weight-decay"),
    "--start-weight-decay": Refused(_ONE_DECAY, "--weight-decay"),
    "--end-weight-decay": Refused(_ONE_DECAY, "--weight-decay"),
    "--rampup-batch-size": Refused("the batch size never changes", "--global-batch-size"),
    "--use-checkpoint-opt-param-scheduler": Refused("flags override those of --load"),
    "--use-checkpoint-opt_param-scheduler": Refused("flags override those of --load"),
    **dict.fromkeys(("--main-params-dtype", "--main-grads-dtype"), _FLOAT32),
    **dict.fromkeys(("--exp-avg-dtype", "--exp-avg-sq-dtype"), _FLOAT32),
    # precision and kernels
    "--fp16": Refused("float16 needs loss scaling, which does not exist here", "--bf16"),
    "--params-dtype": Refused("weights are float32; the compute type is a flag", "--dtype"),
    "--fp8-format": Refused("there is no FP8", "--bf16"),
    "--fp4-format": Refused("there is no FP4", "--bf16"),
    "--fp32-residual-connection": Refused("it has the compute type", "--dtype float32"),
    "--attention-backend": OneOf(
        {
            "auto": "",
            "flash": "",
            "fused": "",
            "unfused": "--kernel reference",
            "local": "--kernel reference",
        },
        "the kernel is chosen by name",
        "--kernel",
    ),
    # model
    "--window-attn-skip-freq": Refused(
        "the layers that have the window are listed, from 0",
        "--window-layers 0 1 2 4 5 6, which says 4 for 8 layers",
    ),
    "--group-query-attention": Translated("--num-query-groups 1"),
    **dict.fromkeys(
        ("--use-rotary-position-embeddings", "--use-rotary-pos-emb"),
        Translated(_ROPE, replaces=True),
    ),
    "--no-position-embedding": Translated(
        "--position-embedding-type none", unless="--use-rotary-position-embeddings"
    ),
    "--rotary-scaling-factor": Renamed("--rope-scaling-factor"),
    "--rotary-seq-len-interpolation-factor": Renamed(
        "--rope-scaling-factor", beside="--rope-type linear"
    ),
    "--use-rope-scaling": Translated(_LLAMA3),
    "--yarn-beta-fast": Renamed("--beta-fast"),
    "--yarn-beta-slow": Renamed("--beta-slow"),
    "--yarn-original-max-position-embeddings": Renamed("--original-max-position-embeddings"),
    "--yarn-correction-range-round-to-int": Translated("--rope-truncate"),
    "--no-yarn-correction-range-round-to-int": Translated("--no-rope-truncate"),
    "--squared-relu": Refused("the MLP has GELU, GEGLU or SwiGLU", "--swiglu"),
    "--no-rope-freq": Refused("the layers are listed, from 0", "--no-rope-layers 3 7"),
    "--openai-gelu": Noted("GELU is always approximated with tanh"),
    "--attention-mask-type": OneOf({"causal": ""}, "the mask is causal", "--document-mask"),
    "--apply-residual-connection-post-layernorm": Refused("the norm is inside the residual"),
    "--encoder-num-layers": Renamed("--num-layers"),
    "--mtp-num-layers": Refused("there is no multi-token prediction"),
    "--init-method-xavier-uniform": Refused("weights are normal", "--init-method-std"),
    "--embedding-init-method-std": Refused("all weights share one", "--init-method-std"),
    # recomputation
    "--recompute-activations": Translated("--recompute-granularity selective"),
    "--checkpoint-activations": Translated("--recompute-granularity full"),
    "--recompute-method": OneOf(
        {"block": "", "uniform": _EVERY_LAYER},
        "layers are recomputed one by one",
        "--recompute-num-layers",
        replaces=True,
    ),
    "--record-memory-history": _TRACE,
    "--memory-snapshot-path": Noted(_TRACE.reason, True),
    # data
    "--mock-data": Noted("--data-path is read, or else Python's own sources"),
    "--vocab-extra-ids": OneOf({"0": ""}, "a tokenizer has the tokens of its file"),
    "--tokenizer-name-or-path": Renamed("--tokenizer-model"),
    "--dataloader-type": OneOf({"single": ""}, "a row is a function of the seed and its number"),
    "--data-args-path": Refused("paths are given as words", "--data-path $(cat FILE)"),
    "--per-split-data-args-path": Refused(
        "paths are given as words", "--train-data-path, --valid-data-path, --test-data-path"
    ),
    "--encoder-seq-length": Renamed("--seq-length"),
    "--decoder-seq-length": Refused("there is no encoder", "--seq-length"),
    _POSITIONS: Translated("--document-mask", needs=_MASKS),
    _MASKS: Translated("--document-mask", needs=_POSITIONS),
    "--eod-mask-loss": Translated("--document-mask", needs=_MASKS),
    # checkpoints and logs
    "--ckpt-step": Refused("a checkpoint is named by its folder", "--load RUN/step-N"),
    "--persistent-save-interval": Renamed("--save-interval"),
    **dict.fromkeys(("--no-load-optim", "--finetune"), _WEIGHTS),
    "--exit-on-missing-checkpoint": Noted(
        "--load alone demands a checkpoint", unless="--save", works="--load without --save"
    ),
    "--skip-train": Refused("this program trains", "launch/evaluate.py"),
    **EXPERTS,
}
"""The flags with an answer of their own."""


@cache
def answers() -> Mapping[str, Answer]:
    """The answer to each flag of Megatron-LM that is not a flag here.

    A key such as ``--rl-*`` stands for all flags that begin so and have no answer of their own.
    """
    noted = {
        f"--{name.rstrip('=')}": Noted(reason, None if name.endswith("*") else name.endswith("="))
        for reason, names in NOTED.items()
        for name in names.split()
    }
    refused = {
        f"--{name}": Refused(reason)
        for reason, names in WITHOUT_COUNTERPART.items()
        for name in names.split()
    }
    return {**noted, **refused, **SPECIAL}


def answer_to(flag: str) -> Answer | None:
    """The answer to a flag; None if Megatron-LM does not have it."""
    family = f"{flag[: flag.find('-', 2) + 1]}*"
    return answers().get(flag) or answers().get(family)


@dataclass
class Translation:
    """A command line in which Megatron-LM's flags are replaced by this program's.

    Attributes:
        pieces: the flags with their words, without those that are taken or refused.
        noted: the flags that are taken without an effect.
        read: what the others are read as, e.g. ``--recompute-activations as ...``.
    """

    pieces: list[Piece]
    noted: list[str] = field(default_factory=list)
    read: list[str] = field(default_factory=list)


def translate(
    pieces: Sequence[Piece], spellings: Mapping[str, str], mistakes: Mistakes
) -> Translation:
    """Replaces the flags of Megatron-LM that are not flags here.

    Args:
        pieces: the command line.
        spellings: each spelling of a flag that exists here, with the flag.
        mistakes: receives an error for each flag that is refused.
    """
    translation, replacing = Translation([]), dict[str, list[str]]()
    said = {spellings.get(flag, flag) for flag, _ in pieces}
    for flag, words in pieces:
        if flag in STAGE_FLAGS or (flag in LAYER_FLAGS and any("[" in word for word in words)):
            with mistakes.collect():
                _compute(flag, words, dict(pieces), translation)
            continue
        answer = None if flag in spellings else answer_to(flag)
        if answer is None:
            translation.pieces.append((flag, words))
            continue
        with mistakes.collect():
            meaning = _meaning(flag, words, answer, said)
            if meaning is None:  # a switch that is off
                continue
            new = meaning
            if isinstance(answer, OneOf | Translated):
                if answer.replaces:
                    replacing |= dict(meaning)
                new = [piece for piece in meaning if piece[0] not in said]
            if not new and not replacing.keys() & dict(meaning):
                translation.noted.append(flag)
                continue
            translation.pieces += new
            shown = " ".join(word for piece in meaning for word in (piece[0], *piece[1]))
            translation.read.append(f"{' '.join([flag, *words])} as {shown}")
    left = [piece for piece in translation.pieces if spellings.get(piece[0]) not in replacing]
    translation.pieces = [*left, *replacing.items()]
    return translation


def _compute(
    flag: str, words: Sequence[str], pieces: Mapping[str, Sequence[str]], translation: Translation
) -> None:
    """Adds a flag whose value follows from other flags of the command line.

    Raises:
        ConfigError: they do not fit together.
    """
    piece: Piece | None
    if flag in STAGE_FLAGS:
        piece = stage_piece(flag, pieces)
        shown = " ".join([piece[0], *piece[1]]) if piece else "part of the same layout"
    else:
        layers = layers_of_pattern(flag, "".join(words), pieces.get("--num-layers"))
        piece = LAYER_FLAGS[flag], layers
        shown = f"{piece[0]} for {len(layers)} layers"
    translation.pieces += [piece] if piece else []
    translation.read.append(f"{flag} {' '.join(words)} as {shown}")


def _meaning(flag: str, words: Sequence[str], answer: Answer, said: set[str]) -> list[Piece] | None:
    """The pieces that the flag stands for; none if it has no effect, None if it is switched off.

    Raises:
        ConfigError: it is refused.
    """
    text = " ".join(words)
    match answer:
        case Renamed(new, beside):
            return [(new, list(words)), *split_words(beside.split())]
        case Translated(meant, needs=other) if other and not said & {meant, other}:
            raise _refusal(flag, text, f"without {other} it has no counterpart", "--document-mask")
        case Translated() | Noted(has_values=False):
            if not truth(flag, words):
                return None
        case Noted(has_values=True) | OneOf() if not words:
            raise ConfigError(flag, "", "needs a value", f"{flag} VALUE")
    match answer:
        case Translated(meant, unless=other):
            return [] if other in said else split_words(meant.split())
        case OneOf(values):
            for value, meant in values.items():
                if _same(text, value):
                    return split_words(meant.split())
            raise _refusal(flag, text, answer.reason, answer.works)
        case Noted(unless=other) if other in said:
            raise _refusal(flag, text, f"it contradicts {other}", answer.works)
        case Refused(reason, works):
            raise _refusal(flag, text, reason, works)
    return []


def _refusal(flag: str, value: str, reason: str, works: str) -> ConfigError:
    rule = f"is a Megatron-LM flag that is not supported: {reason}"
    return ConfigError(flag, value, rule, works)


def _same(text: str, value: str) -> bool:
    """Whether two texts are equal, also as numbers."""
    try:
        return float(text) == float(value)
    except ValueError:
        return text.lower() == value


def notes(translation: Translation) -> Iterator[str]:
    """What happened to Megatron-LM's flags, for the start table."""
    if translation.noted:
        flags = ", ".join(dict.fromkeys(translation.noted))
        yield f"Megatron-LM's flags without an effect here (launch/README.md): {flags}"
    if translation.read:
        yield f"read from Megatron-LM's flags: {'; '.join(dict.fromkeys(translation.read))}"
