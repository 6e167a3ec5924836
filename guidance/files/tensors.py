"""Tensors in files: safetensors read with every fault named, pickles read as plain data, atomic writing.

The safetensors layout: 8 bytes of header length, a JSON header of offsets and string metadata, then the numbers.
It guards against code and overlaps, not against NaN, hence `check_finite`.
"""

from __future__ import annotations

import math
import os
import stat
import unicodedata
import uuid
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import Problem
from ..plain_json import parse_json
from .inert_pickle import Refused, shown
from .nested import all_names
from .recognise import RUN_MARK, RUN_TRAILER, Kind, recognise_bytes, recognise_folder
from .torch_pickle import read_torch_pickle

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Metadata field with the settings of the run that made a file, as JSON (ASCII: paths may hold what UTF-8 cannot).
TRAINING = "training"
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
# Earlier versions execute code from crafted files even with weights_only=True.
SAFE_PICKLE_TORCH = (2, 10)
HEADER_LIMIT = 2**25  # bytes; the format allows 100 million, models have thousands, and notes in them a few million
MOST_DESCRIBED = 50_000  # tensors of a header that is parsed; the largest language models have as many
MOST_DIMENSIONS = 64  # of a tensor, torch's own limit
MOST_TENSORS = 20_000  # of one file that are made: each takes a kilobyte, even without numbers; SDXL has 2,500
_SEARCHED = 2**24  # bytes of a checkpoint that hold its names


class FileProblem(Problem):
    """A file that cannot be used: one sentence with the file, what was expected, what was found, what to do."""


class ModelFile:
    """A `.safetensors` file, or a pickle (`.pt`, `.pth`, `.bin`, `.ckpt`) read as plain data.

    Its header, or the pickle's content, is read once and kept. metadata: the string metadata, empty for pickles. keys:
    the tensors' names; of a pickle without tensors the names nested deeper, which say what it is. Raises FileProblem
    when the file is missing, truncated or of another format.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = _existing(path)
        self._pickled, header, inside = None, {}, []
        if _looks_pickled(self.path):
            self._pickled, inside = _read_pickle(self.path)
        else:
            header = _read_header(self.path)
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self._entries = header
        self.keys = list(header if self._pickled is None else self._pickled) or inside

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and number format (as the file calls it) of every tensor; of `.safetensors` from the header alone."""
        if self._pickled is None:
            return {key: (tuple(entry["shape"]), entry["dtype"]) for key, entry in self._entries.items()}
        return {key: (tuple(one.shape), str(one.dtype).removeprefix("torch.")) for key, one in self._pickled.items()}

    def tensors(self, prefix: str = "", device: str = "cpu") -> dict[str, Tensor]:
        """The tensors whose keys start with `prefix`, without it ("" keeps all). Raises FileProblem for none."""
        wanted = sum(key.startswith(prefix) for key in self.keys)
        if wanted > MOST_TENSORS:
            raise FileProblem(
                f"{self.path}: expected at most {MOST_TENSORS} tensors, as models have, found {wanted}; use another."
            )
        if self._pickled is not None:
            found = self._pickled.items()
            tensors = {key.removeprefix(prefix): one.to(device) for key, one in found if key.startswith(prefix)}
        else:
            tensors = _read_safetensors(self.path, prefix, device)
        if not tensors:
            under = f" under '{prefix}'" if prefix else ""
            raise FileProblem(
                f"{self.path}: expected weights{under}, found none; the file holds another kind of model."
            )
        return tensors


def read_state_dict(path: str | os.PathLike, *, prefix: str = "", device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of a file whose keys start with `prefix`, without it; see `ModelFile`."""
    return ModelFile(path).tensors(prefix, device)


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The string metadata of a `.safetensors` file, without reading its tensors; empty for pickles."""
    path = _existing(path)
    return {} if _looks_pickled(path) else _read_header(path).get("__metadata__", {})


def read_keys(path: str | os.PathLike) -> list[str]:
    """The tensor names in a file; for `.safetensors` without reading the tensors."""
    return ModelFile(path).keys


def check_finite(tensors: Mapping[str, Tensor], source: str | os.PathLike) -> None:
    """Raise FileProblem naming the first tensor that holds NaN or infinity; `source` is what to call the file."""
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() and not tensor.is_complex():
            continue
        values = tensor.half() if tensor.element_size() == 1 else tensor  # no isfinite for fp8
        finite = values.isfinite()
        if not bool(finite.all()):
            bad = finite.numel() - int(finite.sum())
            raise FileProblem(
                f"{source}: expected finite weights, found NaN or infinity in {bad} of the {finite.numel()} numbers of "
                f"{key}; the training that made the file diverged or the file is damaged, use an earlier one."
            )


def file_tensors(weights: Mapping[str, Tensor], dtype: str, source: str | os.PathLike) -> dict[str, Tensor]:
    """Weights on the CPU in the number format of a file, one of DTYPES; whole numbers stay as they are.

    `source` is what to call the file. Raises FileProblem for weights that are not finite, and for finite ones that fp16
    cannot hold.
    """
    if dtype not in DTYPES:
        raise Problem(f"Expected the number format to be one of {', '.join(DTYPES)}, got {dtype!r}.")
    check_finite(weights, source)
    tensors = {}
    for key, tensor in weights.items():
        tensors[key] = tensor.detach().cpu()
        if tensor.is_floating_point():
            tensors[key] = tensors[key].to(DTYPES[dtype])
        if dtype == "fp16" and not bool(tensors[key].isfinite().all()):
            raise FileProblem(
                f"{source}: expected weights up to 65504, which fp16 ends at, found {float(tensor.abs().max()):.0f} in "
                f"{key}; write bf16 or fp32."
            )
    return tensors


def write_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a `.safetensors` file so that at any moment the old file or the complete new one is there.

    The bytes go to a temporary file in the same folder, reach the disk, and the file is renamed. Tensors of any
    device, stride or sharing are accepted. Returns the path. Raises FileProblem when the file cannot be written.
    """
    from safetensors.torch import save_file

    path = Path(path)
    wrong = [key for key, value in (metadata or {}).items() if not isinstance(key, str) or not isinstance(value, str)]
    if wrong:
        raise Problem(f"{path}: metadata must be strings; {wrong[0]!r} is not.")
    plain, seen = {}, set()
    for key, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset())
        plain[key] = tensor.clone() if place in seen or not _owns_storage(tensor) else tensor
        seen.add(place)
    # Not tempfile: its files are private, a model should be as readable as the user's other files.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # the user's default; safetensors would make the file private
        save_file(plain, str(temporary), metadata=dict(metadata or {}))
        _flush(temporary)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
        if os.name == "posix":
            with suppress(OSError):  # some network drives cannot; the file is in its place already
                _flush(path.parent)
    except Exception as error:
        raise FileProblem(
            f"{path}: could not be written ({_reason(error)}); free some space or check the folder's permissions."
        ) from error
    finally:
        with suppress(OSError):  # gone after renaming, and never there where the path itself is impossible
            temporary.unlink()
    return path


def _owns_storage(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def _flush(path: str | os.PathLike) -> None:
    # Windows flushes only handles opened for writing; folders (posix only) cannot be opened so.
    handle = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: Exception) -> str:
    """Why the system refused, without the path, which the message names already."""
    return getattr(error, "strerror", None) or _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _existing(path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.is_dir():
        kind = recognise_folder(os.listdir(path))
        raise FileProblem(f"{path}: expected a file, found {kind.what}; {kind.detail}.")
    if not path.is_file():
        raise FileProblem(f"{path}: expected a model file, found {missing_file(path)}.")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise FileProblem(f"{path}: cannot be read ({error.strerror}); check its permissions.") from error
    if size == 0:
        raise FileProblem(f"{path}: expected a model file, found an empty one; download or copy it again.")
    kind = _no_model(path, start)
    if kind is not None:
        raise FileProblem(f"{path}: expected a model file, found {kind.what}; {kind.detail}.")
    return path


def missing_file(path: str | os.PathLike) -> str:
    """What lies at a path instead of a file, and what to do, as the end of a sentence."""
    try:
        kind = os.lstat(path).st_mode
    except (OSError, ValueError):  # a name that no file can have
        near = _nearly(Path(path))
        if near:
            return f"nothing there, but {near} beside it; name that"
        return "nothing at this path; check name and folder"
    if stat.S_ISLNK(kind):
        return f"a link to {os.readlink(path)}, where no file is; name the file itself, or mend the link"
    return "a pipe, socket or device; name a file"


def _nearly(path: Path) -> str | None:
    """A name in the folder that differs from the path's in capitals, in the codes of its letters or by an ending."""
    wanted = _bare(path.name)
    try:
        names = sorted(os.listdir(path.parent))
    except (OSError, ValueError):
        return None
    return next((name for name in names if wanted in (_bare(name), _bare(os.path.splitext(name)[0]))), None)


def _bare(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold().strip(" .")


def _no_model(path: Path, start: bytes) -> Kind | None:
    """What a file is that is no model, None where it may be one."""
    if os.path.lexists(f"{path}.aria2"):  # beside a file that has its full size from the beginning
        return recognise_bytes(start, f"{path.name}.aria2")
    kind = recognise_bytes(start, path.name)
    if kind is None or not start.startswith(b"PK"):
        return kind
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - RUN_TRAILER))
        if file.read(len(RUN_MARK)) == RUN_MARK:
            return Kind("the checkpoint of a run of this project", "", "use the model that it writes, or resume it")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.lower() for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError):
        return None  # a damaged one; which, its reader says
    if any(name.endswith("/constants.pkl") for name in names):
        return Kind("a TorchScript program", "", "save the network's state_dict() where it was made")
    return None if any(name.endswith("data.pkl") for name in names) else kind


def _looks_pickled(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(9)
    is_safetensors = start[8:] == b"{"
    if path.suffix.lower() in PICKLE_SUFFIXES:
        # Many a .safetensors file was renamed; its own header is the safer way to read it.
        return not is_safetensors
    return start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")) and not is_safetensors


def _read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file, checked against the size of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        plausible = len(start) == 8 and 2 <= length <= HEADER_LIMIT
        text = file.read(min(length, size)) if plausible else start + file.read(192)
    if not plausible and text[8:9] == b"{" and length <= size:
        raise FileProblem(
            f"{path}: expected a header of at most {HEADER_LIMIT >> 20} MiB, found one of {length >> 20} MiB; write "
            "the file with fewer notes."
        )
    if not plausible or text[:1] != b"{":
        raise FileProblem(f"{path}: expected a safetensors file, found something else; use a .safetensors file.")
    if len(text) < length:
        raise FileProblem(
            f"{path}: the file is truncated: expected a header of {length} bytes, found {len(text)}; download or copy "
            "it again."
        )
    described = text.count(b'"data_offsets"')
    if described > MOST_DESCRIBED:
        raise FileProblem(
            f"{path}: expected a header of at most {MOST_DESCRIBED} tensors, found {described}; use another file."
        )
    try:
        header = parse_json(text, HEADER_LIMIT)
        ends = [_end_of(entry) for key, entry in header.items() if key != "__metadata__"]
        notes = header.setdefault("__metadata__", {})
        if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
            raise Problem("metadata that is no text")
    except ValueError as error:
        raise FileProblem(
            f"{path}: expected a safetensors file, found a damaged header ({_first_line(error)}); download or copy it "
            "again."
        ) from None
    expected = 8 + length + max(ends, default=0)
    if size < expected:
        raise FileProblem(
            f"{path}: the file is truncated: expected {expected} bytes, found {size}; download or copy it again."
        )
    return header


def _end_of(entry: Any) -> int:
    """Where a tensor's numbers end, counted from the header. Raises Problem for what describes no tensor."""
    numbers = [entry.get("shape"), entry.get("data_offsets")] if isinstance(entry, dict) else []
    if (
        not numbers
        or not isinstance(entry.get("dtype"), str)
        or not all(
            isinstance(row, list) and all(type(one) is int and 0 <= one < 2**63 for one in row) for row in numbers
        )
        or len(numbers[1]) != 2
    ):
        raise Problem("a tensor that is not described by dtype, shape and data_offsets")
    if len(numbers[0]) > MOST_DIMENSIONS:
        raise Problem(f"a tensor of {len(numbers[0])} dimensions, more than torch takes")
    bits = 8 * max(numbers[1][1] - numbers[1][0], 0)  # no format has numbers of less than one
    if math.prod(numbers[0]) > bits or math.prod(max(one, 1) for one in numbers[0]) >= 2**60:
        raise Problem("a tensor of more numbers than its bytes hold")
    return numbers[1][1]


def _read_safetensors(path: Path, prefix: str, device: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    if not _is_unicode(str(path)):
        reason = "expected a file whose path is UTF-8, which safetensors needs, found another; rename it."
        raise FileProblem(f"{path}: {reason}")
    try:
        with safe_open(str(path), framework="pt", device=device) as file:
            return {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, AttributeError, KeyError) as error:
        raise FileProblem(
            f"{path}: expected a safetensors file, found a damaged one ({_first_line(error)}); download it again."
        ) from error


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of a name that Python could only keep as halves of characters
        return False
    return True


def torch_reads_safely() -> bool:
    """Whether this torch reads pickles as plain data without known holes."""
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= SAFE_PICKLE_TORCH


def load_checkpoint(path: Path, advice: str, trailer: int = 0, mapped: bool = False) -> Any:
    """What a torch checkpoint (both formats of `torch.save`) holds, read as plain data. Raises FileProblem.

    advice: what to do where it cannot be read safely, a clause without its full stop. trailer, mapped: as in
    `read_torch_pickle`.
    """
    if not torch_reads_safely():
        raise FileProblem(
            f"{path}: this is a pickle, which only torch 2.10 or newer reads safely, found torch {torch.__version__}; "
            "update torch, or convert the file to .safetensors where torch is newer."
        )
    try:
        return read_torch_pickle(path, trailer, mapped)
    except Refused as problem:
        names = names_part(path)
        if b"_modules" in names and b"_parameters" in names:
            raise FileProblem(
                f"{path}: expected a checkpoint of plain tensors, found a whole module, which only the code that saved "
                f"it can read ({problem}); save its state_dict() there."
            ) from None
        raise FileProblem(
            f"{path}: expected a checkpoint of plain tensors, found one that cannot be read safely ({problem}); "
            f"{advice}."
        ) from None
    except (MemoryError, OSError) as error:
        raise FileProblem(
            f"{path}: the file could not be read ({shown(_first_line(error))}); it is damaged or too large for this "
            "computer."
        ) from error


def names_part(path: Path) -> bytes:
    """The part of a torch checkpoint that holds its names, unread."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.filename.endswith("/data.pkl") and member.compress_type == zipfile.ZIP_STORED:
                    if member.CRC == 0:  # as torch writes where its checksums are switched off
                        member.CRC = None
                    with archive.open(member) as file:
                        return file.read(min(_SEARCHED, member.file_size))
            return b""
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        with path.open("rb") as file:
            return file.read(min(_SEARCHED, path.stat().st_size))  # it sets aside what it is asked for


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """(the tensors at the top or in `state_dict`, where there are none the names of those nested deeper)."""
    loaded = load_checkpoint(path, "get the model as .safetensors from a source you trust")
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping):
        raise FileProblem(f"{path}: expected a pickled dictionary of tensors, found {type(loaded).__name__}.")
    # Detached: without the attributes, hooks and claims to gradients that a file may give to its tensors.
    tensors = {str(key): value.detach() for key, value in loaded.items() if isinstance(value, Tensor)}
    return tensors, [] if tensors else all_names(loaded)
