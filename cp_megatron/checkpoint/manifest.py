"""What a checkpoint holds, read with suspicion. Nothing here imports torch.

A checkpoint is a folder ``step-N`` with ``manifest.json`` and shards ``rank-00000.safetensors``.
It gets that name only when every byte of it is on the disk; until then it is ``step-N.tmp``. JSON
is the only thing that is parsed here, and a name in it can not lead out of the folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cp_megatron.checkpoint.boxes import inside, overlap
from cp_megatron.config.files.run_folders import STEP_FOLDER
from cp_megatron.errors import ConfigError

FLAG = "--load"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TEMPORARY = ".tmp"
MAX_MANIFEST_BYTES = 1 << 30
SHARD_FILE = re.compile(r"rank-[0-9]{5,}\.safetensors")
ELEMENT_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "float64": 8,
        "float32": 4,
        "bfloat16": 2,
        "float16": 2,
        "int64": 8,
        "int32": 4,
        "int16": 2,
        "int8": 1,
        "uint8": 1,
        "bool": 1,
    }
)
"""The dtypes a checkpoint may hold."""


class DamagedError(ConfigError):
    """A checkpoint that is not whole. What is whole and can not be used here is no such error."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A shard: its size in bytes and the SHA-256 (hex) of its contents."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ChunkEntry:
    """A box of a tensor and where it lies: ``key`` of the safetensors file ``file``."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    key: str


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """A tensor's global shape, its dtype (``float32``) and the chunks that fill it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[ChunkEntry, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a checkpoint but the numbers.

    Attributes:
        version: of this format.
        step: training steps done.
        consumed: rows of the run used so far.
        config: the run's configuration as plain data.
        data_fingerprint: of the corpus.
        vocab_size: tokens of the tokenizer.
        torch_version, package_version: that wrote it.
        grid: sizes of the axes dp, cp and tp it was written on; it loads on any other.
        optimizer_steps: updates done per parameter, of those that have optimizer state.
        extra: what else the training needs to go on, as plain data.
        files: the shards by name.
        tensors: ``model.<name>`` and ``optimizer.<name>.<moment>``.
    """

    version: int
    step: int
    consumed: int
    config: Mapping[str, Any]
    data_fingerprint: str
    vocab_size: int
    torch_version: str
    package_version: str
    grid: Mapping[str, int]
    optimizer_steps: Mapping[str, int]
    extra: Mapping[str, Any]
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry]

    def to_json(self) -> str:
        """The text of ``manifest.json``: the fields, and their SHA-256 in canonical form."""
        fields = asdict(self)
        return _canonical({"manifest": fields, "sha256": _sha256(fields)}) + "\n"


def step_folder(run_folder: Path, step: int) -> Path:
    """Where a run's checkpoint of that step lies."""
    return run_folder / f"step-{step}"


def newest_step(run_folder: Path | str) -> Path | None:
    """The checkpoint with the most steps in a run's folder; None when there is none.

    Unfinished ones (``step-N.tmp``) and folders without a manifest are passed over. Contents are
    not looked at.
    """
    steps = finished_steps(Path(run_folder))
    return steps[max(steps)] if steps else None


def finished_steps(run_folder: Path) -> dict[int, Path]:
    """The finished checkpoints of a run's folder by their steps."""
    steps = step_folders(run_folder)
    return {step: folder for step, folder in steps.items() if (folder / MANIFEST).is_file()}


def step_folders(run_folder: Path) -> dict[int, Path]:
    """Everything in a run's folder that has the name of a finished checkpoint, by its step."""
    try:
        entries = list(run_folder.iterdir())
    except OSError:
        return {}
    matches = {entry: STEP_FOLDER.fullmatch(entry.name) for entry in entries}
    return {int(match[1]): entry for entry, match in matches.items() if match}


def unfinished_steps(run_folder: Path) -> list[Path]:
    """What saves that did not come to their end left in a run's folder."""
    try:
        entries = list(run_folder.iterdir())
    except OSError:
        return []
    return [
        entry
        for entry in entries
        if entry.name.endswith(TEMPORARY)
        and STEP_FOLDER.fullmatch(entry.name.removesuffix(TEMPORARY))
    ]


def read_manifest(folder: Path | str) -> Manifest:
    """Reads and checks a checkpoint's manifest, not its shards.

    Args:
        folder: a ``step-N``.

    Raises:
        DamagedError: there is none, it is malformed, contradicts itself, or names a file that is no
            shard of this folder.
        ConfigError: it is of another version.
    """
    folder = Path(folder)
    document = _Fields(folder, "", _read_json(folder))
    fields = _Fields(folder, "", document.mapping("manifest"))
    try:
        digest = _sha256(fields.value)
    except RecursionError:
        raise _malformed(folder, "it is nested too deep") from None
    if document.text("sha256") != digest:
        raise damaged(folder, f"{MANIFEST} is damaged: its SHA-256 is not its own")
    version = fields.count("version")
    if version != FORMAT_VERSION:
        rule = f"has checkpoint format {version}, this program reads {FORMAT_VERSION}"
        raise ConfigError(FLAG, folder, rule, "the version of the program that wrote it")
    manifest = _manifest(fields)
    _check_chunks(folder, manifest)
    return manifest


def verify_files(
    folder: Path | str, manifest: Manifest, names: Collection[str] | None = None
) -> None:
    """Compares shards with the manifest: kind, size, and SHA-256 (about 1.5 GB/s).

    Args:
        folder: the checkpoint.
        manifest: of this folder.
        names: which shards; by default all.

    Raises:
        DamagedError: a shard is missing, a link, of another size or of other contents.
    """
    folder = Path(folder)
    for name in sorted(manifest.files if names is None else names):
        _verify_file(folder, name, manifest.files[name])


def check_size(folder: Path, name: str, entry: FileEntry) -> None:
    """Compares a shard's kind and size with the manifest, in no time.

    Raises:
        DamagedError: it is missing, a link, or of another size.
    """
    try:
        status = (folder / name).lstat()
    except OSError as error:
        raise damaged(folder, f"{name} can not be read ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode):
        raise damaged(folder, f"{name} is not a regular file")
    if status.st_size != entry.size:
        rule = f"{name} has {status.st_size} bytes, the manifest says {entry.size}"
        raise damaged(folder, rule)


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's contents."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def damaged(folder: Path, rule: str) -> DamagedError:
    """The error for a checkpoint that can not be trusted, with the run's other checkpoints."""
    return DamagedError(FLAG, folder, rule, _others(folder))


def _read_json(folder: Path) -> Any:
    path = folder / MANIFEST
    try:
        status = path.stat()
        # Reading a pipe would wait for ever, reading a device would not end.
        if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_MANIFEST_BYTES:
            return json.loads(path.read_bytes())
    except OSError as error:
        rule = f"is no finished checkpoint: {MANIFEST} can not be read ({error.strerror})"
        raise damaged(folder, rule) from None
    except (ValueError, RecursionError):
        raise _malformed(folder, "it is not JSON") from None
    raise _malformed(folder, f"it is not a regular file of at most {MAX_MANIFEST_BYTES} bytes")


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _sha256(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(fields).encode()).hexdigest()


def _verify_file(folder: Path, name: str, entry: FileEntry) -> None:
    check_size(folder, name, entry)
    try:
        digest = file_sha256(folder / name)
    except OSError as error:
        raise damaged(folder, f"{name} can not be read ({error.strerror})") from None
    if digest != entry.sha256:
        raise damaged(folder, f"{name} is damaged: its SHA-256 is not the manifest's")


def _others(folder: Path) -> str:
    """The run's newest other checkpoint, as the hint of an error."""
    steps = finished_steps(folder.parent)
    others = [step for step, path in steps.items() if path.name != folder.name]
    return str(steps[max(others)]) if others else ""


def _malformed(folder: Path, what: str) -> DamagedError:
    return damaged(folder, f"{MANIFEST} is malformed: {what}")


@dataclass(frozen=True)
class _Fields:
    """Typed access to a JSON object; whatever is missing or of another type is refused."""

    folder: Path
    where: str
    value: Any

    def _get(self, name: str, kind: type) -> Any:
        value = self.value.get(name) if isinstance(self.value, dict) else None
        # bool is an int in Python, not in JSON.
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.wrong(name)
        return value

    def wrong(self, name: str) -> DamagedError:
        return _malformed(self.folder, f"{self.where}{name} is missing or not valid")

    def count(self, name: str) -> int:
        number: int = self._get(name, int)
        if not 0 <= number < 1 << 63:
            raise self.wrong(name)
        return number

    def text(self, name: str) -> str:
        text: str = self._get(name, str)
        # JSON can spell half a character, which no file and no other program takes.
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise self.wrong(name)
        return text

    def mapping(self, name: str) -> dict[str, Any]:
        mapping: dict[str, Any] = self._get(name, dict)
        return mapping

    def counts_by_name(self, name: str) -> dict[str, int]:
        inner = _Fields(self.folder, f"{self.where}{name}.", self.mapping(name))
        return {key: inner.count(key) for key in inner.value}

    def counts(self, name: str) -> tuple[int, ...]:
        values = self._get(name, list)
        if any(type(number) is not int or not 0 <= number < 1 << 63 for number in values):
            raise self.wrong(name)
        return tuple(values)

    def objects(self, name: str) -> dict[str, _Fields]:
        mapping = self.mapping(name)
        return {
            key: _Fields(self.folder, f"{self.where}{name}.{key}.", mapping[key]) for key in mapping
        }


def _manifest(fields: _Fields) -> Manifest:
    return Manifest(
        version=fields.count("version"),
        step=fields.count("step"),
        consumed=fields.count("consumed"),
        config=fields.mapping("config"),
        data_fingerprint=fields.text("data_fingerprint"),
        vocab_size=fields.count("vocab_size"),
        torch_version=fields.text("torch_version"),
        package_version=fields.text("package_version"),
        grid=fields.counts_by_name("grid"),
        optimizer_steps=fields.counts_by_name("optimizer_steps"),
        # Checkpoints from before there was any have none.
        extra=fields.mapping("extra") if "extra" in fields.value else {},
        files={name: _file(name, entry) for name, entry in fields.objects("files").items()},
        tensors={name: _tensor(entry) for name, entry in fields.objects("tensors").items()},
    )


def _file(name: str, entry: _Fields) -> FileEntry:
    # A shard's name has no separator and no leading dot, so no path can lead out of the folder.
    if not SHARD_FILE.fullmatch(name):
        raise _malformed(entry.folder, f"{name!r} is not the name of a shard")
    return FileEntry(size=entry.count("size"), sha256=entry.text("sha256"))


def _tensor(entry: _Fields) -> TensorEntry:
    dtype = entry.text("dtype")
    if dtype not in ELEMENT_BYTES:
        raise entry.wrong("dtype")
    chunks = []
    for number, chunk in enumerate(entry._get("chunks", list)):
        fields = _Fields(entry.folder, f"{entry.where}chunks.{number}.", chunk)
        chunks.append(
            ChunkEntry(
                offsets=fields.counts("offsets"),
                sizes=fields.counts("sizes"),
                file=fields.text("file"),
                key=fields.text("key"),
            )
        )
    return TensorEntry(dtype=dtype, shape=entry.counts("shape"), chunks=tuple(chunks))


def _check_chunks(folder: Path, manifest: Manifest) -> None:
    """The chunks of a tensor lie inside it and fill it, and its files can hold them."""
    held = dict.fromkeys(manifest.files, 0)
    for name, tensor in manifest.tensors.items():
        for chunk in tensor.chunks:
            if chunk.file not in held:
                raise _malformed(folder, f"{name} lies in {chunk.file!r}, which is not listed")
            held[chunk.file] += math.prod(chunk.sizes) * ELEMENT_BYTES[tensor.dtype]
            if not inside(chunk, tensor.shape):
                raise _malformed(folder, f"a chunk of {name} lies outside of its shape")
        filled = sum(math.prod(chunk.sizes) for chunk in tensor.chunks)
        corners = {chunk.offsets for chunk in tensor.chunks}
        disjoint = len(corners) == len(tensor.chunks) and not overlap(tensor.chunks)
        if filled != math.prod(tensor.shape) or not disjoint:
            raise _malformed(folder, f"the chunks of {name} do not fill its shape")
    for file, size in held.items():
        if size > manifest.files[file].size:
            raise _malformed(folder, f"the tensors in {file} are larger than the file")
