"""Fingerprints of what stored work was made from: reward functions, data and weights.

Equal in every process for the same thing, and different for what computes differently. Where that
cannot be known the fingerprint equals no other one, so that nothing stored is used again.
"""

from __future__ import annotations

import ast
import copyreg
import dis
import enum
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import struct
import sys
import sysconfig
import types
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from trimtab.plugins.value_config import load_config

logger = logging.get_logger(__name__)

# Of a larger tensor this much is read: blocks at even distances, the first and the last among them.
WHOLE, BLOCKS, BLOCK = 2**20, 64, 4096
MOST_OBJECTS = 1_000_000  # that a reward function may hold
# Written into a configuration by the one who saved or loaded it
VOLATILE = ("_name_or_path", "name_or_path", "transformers_version", "_commit_hash")


class Unknown(Exception):
    """The state of this object cannot be read."""


def identify(func: Callable[..., Any]) -> str:
    """
    Tells stored rewards from those of another function.

    The name and a digest of all that the function computes with: its code, defaults, closure and
    attributes, the arguments of a `functools.partial`, the attributes of an instance, and, from
    there on, the functions, classes, modules and values that the code names. Of installed packages
    it is the version that counts, of a model its weights. Not seen are files that the function
    reads, services that it asks and the environment.

    A function, or an instance that is called, with an attribute `version` is told by its name and
    version alone.

    Args:
        func (`Callable`):
            A reward function.

    Returns:
        `str`: Equal in every process; if something cannot be read, equal to no other one, with a
        warning.
    """
    name = _name(func)
    try:
        return f"{name}:{_Digester(_owners(func)).digest(func).hex()[:32]}"
    except Unknown as error:
        logger.warning_once(
            f"reward function {name!r} depends on {error}, which cannot be compared with that of "
            "another run: its stored rewards are not used again. Give the function an attribute "
            f"`version` (`{name.split('.')[-1]}.version = '1'`) and change that with the rewards"
        )
        return f"{name}:unknown:{uuid.uuid4().hex}"


def known(identity: str) -> bool:
    """Whether [`identify`] could read all of a function."""
    return ":unknown:" not in identity


def digest_of(value: Any) -> str:
    """A digest of plain data, arrays, models or functions. Raises `Unknown` where it cannot."""
    return _Digester().digest(value).hex()[:32]


def columns_read(func: Callable[..., Any], columns: Iterable[str]) -> list[str]:
    """Those columns of a dataset that a reward function may read, by its parameters and code."""
    columns = sorted(columns)
    try:
        parameters = inspect.signature(func, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):
        return columns
    code = _code(func)
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD and (
            code is None or _reads_variable(code, parameter.name)
        ):
            return columns
    return [column for column in columns if column in {p.name for p in parameters}]


def weights_fingerprint(name_or_path: str, kwargs: Mapping[str, Any] | None = None) -> str:
    """
    Tells a model's weights from others, whatever they are called.

    Read are the configuration, the header of every weights file (names, types and shapes) and of
    each tensor all bytes up to 1 MiB, of a larger one 64 blocks of 4 KiB at even distances: enough
    for any training or merging, which change tensors all over, and seconds for 140 GB.

    Args:
        name_or_path (`str`):
            A folder, or the id of a model that has been loaded before.
        kwargs (`dict[str, Any]`, *optional*):
            Of `from_pretrained`; `revision`, `subfolder` and `cache_dir` count.

    Returns:
        `str`: Hexadecimal digest.
    """
    from transformers.utils import cached_file

    kwargs = {
        k: v for k, v in (kwargs or {}).items() if k in ("revision", "subfolder", "cache_dir")
    }
    folder = Path(name_or_path, kwargs.get("subfolder", ""))
    if not folder.is_dir():  # the snapshot of the revision in the hub's cache
        folder = Path(str(cached_file(name_or_path, "config.json", **kwargs))).parent
    paths = sorted(folder.glob("*.safetensors")) or sorted(
        path for kind in ("*.bin", "*.pt", "*.gguf") for path in folder.glob(kind)
    )
    if not paths:
        raise ValueError(
            f"{str(folder)!r} has no weights of the base model; give a folder that save_pretrained "
            "wrote, or a hub id"
        )
    digest = hashlib.sha256()
    config = folder / "config.json"
    if config.exists():
        fields = json.loads(config.read_text())
        fields = {k: v for k, v in fields.items() if k not in VOLATILE}
        digest.update(json.dumps(fields, sort_keys=True).encode())
    adapter = folder / "adapter_config.json"
    if adapter.exists():  # transformers puts it into the model that it names
        fields = json.loads(adapter.read_text())
        digest.update(json.dumps(fields, sort_keys=True).encode())
        digest.update(weights_fingerprint(fields["base_model_name_or_path"]).encode())
    for path in paths:
        digest.update(path.name.encode())
        for part in _sampled_file(path):
            digest.update(part)
    return digest.hexdigest()[:32]


def safetensors_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors of a safetensors file begin, and its header. Raises `ValueError`."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= path.stat().st_size else b""
    if len(text) < length or not length:
        raise ValueError(f"{str(path)!r} is cut off")
    header = json.loads(text)
    header.pop("__metadata__", None)
    return 8 + length, header


def _sampled_file(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    if path.suffix == ".safetensors":
        start, header = safetensors_header(path)
        yield json.dumps(header, sort_keys=True).encode()
        parts = [(start + tensor["data_offsets"][0], start + tensor["data_offsets"][1])
                 for tensor in header.values()]  # fmt: skip
    else:
        yield size.to_bytes(8, "little")
        parts = [(start, min(start + 2**26, size)) for start in range(0, size, 2**26)]
    with path.open("rb") as file:
        for start, stop in sorted(parts):
            for first, last in _blocks(stop - start):
                file.seek(start + first)
                yield file.read(last - first)


def _blocks(size: int) -> list[tuple[int, int]]:
    """Which of `size` bytes are read."""
    if size <= WHOLE:
        return [(0, size)]
    starts = [i * (size - BLOCK) // (BLOCKS - 1) for i in range(BLOCKS)]
    return [(start, start + BLOCK) for start in starts]


def guidance_fingerprint(folder: str | Path) -> str:
    """Tells the policies of a value model from another's: a hash of its weights and its scale."""
    digest = hashlib.sha256()
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        raise ValueError(f"{str(folder)!r} has no weights")
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    if (Path(folder) / "config.json").exists():  # an adapter to train on has none
        digest.update(json.dumps(load_config(str(folder)).candidate_scale).encode())
    return digest.hexdigest()[:16]


def state_fingerprint(module: Any) -> str:
    """Tells the weights of a loaded model from others, as [`weights_fingerprint`] does on disk."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        _update_tensor(digest, tensor)
    return digest.hexdigest()[:32]


def _update_tensor(digest: Any, tensor: Any) -> None:
    import torch

    digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    for first, last in _blocks(len(flat)):
        digest.update(flat[first:last].cpu().numpy().tobytes())


def _name(func: Any) -> str:
    while isinstance(func, functools.partial):
        func = func.func
    named = func if hasattr(func, "__qualname__") else type(func)
    return named.__qualname__


def _code(func: Any) -> types.CodeType | None:
    """Of what runs when `func` is called, if that is written in Python."""
    while not hasattr(func, "__code__"):
        if isinstance(func, functools.partial):
            func = func.func
        elif isinstance(func, types.MethodType):
            func = func.__func__
        else:
            call = vars(type).get("__call__") if isinstance(func, type) else type(func).__call__
            if not isinstance(call, types.FunctionType):
                return None
            func = call
    return func.__code__


def _reads_variable(code: types.CodeType, name: str) -> bool:
    if name in code.co_cellvars or {"locals", "vars", "eval"} & set(code.co_names):
        return True
    names = (i.argval for i in dis.get_instructions(code) if i.opname.startswith("LOAD"))
    return any(name in n if isinstance(n, tuple) else name == n for n in names)


@functools.cache
def _library_folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    return tuple({str(Path(paths[name]).resolve()) for name in names} | {"<frozen"})


def _installed(file: str | None) -> bool:
    """Whether a source file is of Python or of an installed package: its version tells it."""
    if not file:
        return False
    path = file if file.startswith("<") else str(Path(file).resolve())
    return path.startswith(_library_folders()) or "-packages" in path


def _installed_module(name: str | None) -> bool:
    name = name or ""
    if name.split(".")[0] in sys.stdlib_module_names:
        return True
    return _installed(getattr(sys.modules.get(name), "__file__", None))


@functools.cache
def _version(module: str) -> str:
    top = module.split(".")[0]
    if top in sys.stdlib_module_names:
        return ""
    try:
        return importlib.metadata.version(top)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(top), "__version__", ""))


class _Digester:
    """
    Digests objects from the leaves up: what an object is made of is digested before it.

    A cycle is cut where it closes. Tags keep values of different types apart.

    Args:
        owners (`list`, *optional*):
            Objects whose attribute `version`, if they have one, stands for all of them.
    """

    def __init__(self, owners: Sequence[Any] = ()) -> None:
        self.owners = owners
        self.done: dict[int, tuple[Any, bytes]] = {}  # keeps the objects, and so their ids
        self.open: dict[int, int] = {}  # depth by id
        self.modules: set[str] = set()

    def digest(self, value: Any) -> bytes:
        if value is None or (isinstance(value, (bool, int, float, complex, str, bytes)) and (
            type(value) in (bool, int, float, complex, str, bytes)
        )):  # fmt: skip
            return self._combine(type(value).__name__, _plain(value))
        if id(value) in self.done:
            return self.done[id(value)][1]
        if id(value) in self.open:
            return self._combine("cycle", str(self.open[id(value)]).encode())
        if len(self.done) > MOST_OBJECTS:
            raise Unknown(f"more than {MOST_OBJECTS:,} objects")
        self.open[id(value)] = len(self.open)
        try:
            result = self._digest(value)
        except RecursionError as error:
            raise Unknown(
                f"an object of {type(value).__qualname__} that is nested deeply"
            ) from error
        finally:
            del self.open[id(value)]
        self.done[id(value)] = value, result
        return result

    @staticmethod
    def _combine(tag: str, *parts: bytes) -> bytes:
        digest = hashlib.sha256(tag.encode())
        for part in parts:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.digest()

    def _all(self, tag: str, values: Iterable[Any]) -> bytes:
        return self._combine(tag, *map(self.digest, values))

    def _digest(self, value: Any) -> bytes:
        kind = type(value)
        if kind in (list, tuple):
            return self._all(kind.__name__, value)
        if kind is dict or kind is types.MappingProxyType:
            return self._all("dict", (x for item in value.items() for x in item))
        if kind in (set, frozenset):  # in no order
            return self._combine(kind.__name__, *sorted(map(self.digest, value)))
        if kind is bytearray:
            return self._combine("bytearray", bytes(value))
        if isinstance(value, types.CodeType):
            return self._code(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return self._all("method", (value.__func__, value.__self__))
        if isinstance(value, functools.partial):
            return self._all("partial", (value.func, value.args, value.keywords))
        if isinstance(value, types.ModuleType):
            return self._module(value.__name__)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, (types.BuiltinFunctionType, types.MethodWrapperType)):
            owner = value.__self__
            of = b"" if owner is None or isinstance(owner, types.ModuleType) else self.digest(owner)
            return self._combine("builtin", str(value.__qualname__).encode(), of)
        if isinstance(value, (types.GetSetDescriptorType, types.MemberDescriptorType,
                              types.WrapperDescriptorType, types.MethodDescriptorType,
                              types.ClassMethodDescriptorType)):  # fmt: skip
            return self._combine("descriptor", value.__qualname__.encode())
        if isinstance(value, (staticmethod, classmethod)):
            return self._all(kind.__name__, (value.__func__,))
        if isinstance(value, property):
            return self._all("property", (value.fget, value.fset, value.fdel))
        if isinstance(value, functools.cached_property):
            return self._all("cached_property", (value.func,))
        if hasattr(value, "cache_info") and hasattr(value, "__wrapped__"):  # what it keeps is no
            return self._all("cache", (value.__wrapped__,))  # part of what it computes
        if isinstance(value, enum.Enum):
            return self._all("enum", (kind.__qualname__, value.name, value.value))
        if isinstance(value, Path):
            return self._all("path", (str(value),))
        return self._array_or_model(value) or self._instance(value)

    def _array_or_model(self, value: Any) -> bytes | None:
        module = type(value).__module__.split(".")[0]
        if module == "numpy" and hasattr(value, "tobytes") and value.dtype.kind != "O":
            return self._combine(
                "array", f"{type(value).__name__} {value.dtype.str} {value.shape}".encode(),
                value.tobytes(),
            )  # fmt: skip
        torch = sys.modules.get("torch")
        if torch is None:
            return None
        if isinstance(value, torch.Tensor):
            digest = hashlib.sha256(b"tensor")
            _update_tensor(digest, value)
            return digest.digest()
        if isinstance(value, (torch.dtype, torch.device)):
            return self._combine("torch", str(value).encode())
        if _of_transformers(value, "configuration_utils", "PreTrainedConfig"):
            fields = {k: v for k, v in value.to_dict().items() if k not in VOLATILE}
            return self._combine("config", json.dumps(fields, sort_keys=True, default=str).encode())
        if _of_transformers(value, "modeling_utils", "PreTrainedModel"):
            weights = state_fingerprint(value).encode()
            return self._combine(
                "model", self.digest(type(value)), self.digest(value.config), weights
            )
        if _of_transformers(value, "tokenization_utils_base", "PreTrainedTokenizerBase"):
            backend = getattr(value, "backend_tokenizer", None)
            known: Any = sorted(value.get_vocab().items())
            if backend is not None:
                known = json.loads(backend.to_str())
                del known["padding"], known["truncation"]  # those of the last call
            text = json.dumps(known, sort_keys=True)
            return self._all("tokenizer", (text, value.chat_template, value.all_special_tokens))
        return None

    def _instance(self, value: Any) -> bytes:
        """By the protocol that says what an object's state is, that of pickling."""
        kind = type(value)
        if any(value is owner for owner in self.owners):
            version = getattr(value, "version", None)
            if isinstance(version, (str, int)):
                return self._all("version", (kind.__qualname__, version))
        try:
            reduce = copyreg.dispatch_table.get(kind)
            reduced = reduce(value) if reduce is not None else value.__reduce_ex__(4)
        except Exception as error:  # any kind, by the object's own method
            raise Unknown(f"an object of {kind.__module__}.{kind.__qualname__}") from error
        if isinstance(reduced, str):  # the name of a global
            return self._all("global", (kind.__module__, reduced))
        make, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        return self._all(
            "instance",
            (kind, make, arguments, state, list(items or ()), list(pairs or ())),
        )

    def _code(self, code: types.CodeType) -> bytes:
        return self._all(
            "code",
            (code.co_code, code.co_consts, code.co_names, code.co_varnames, code.co_freevars,
             code.co_argcount, code.co_kwonlyargcount, code.co_flags,
             getattr(code, "co_exceptiontable", b"")),
        )  # fmt: skip

    def _function(self, func: types.FunctionType) -> bytes:
        version = func.__dict__.get("version")
        if isinstance(version, (str, int)):
            return self._all("version", (func.__qualname__, version))
        cells = []
        for name, cell in zip(func.__code__.co_freevars, func.__closure__ or ()):
            try:
                cells.append((name, cell.cell_contents))
            except ValueError:  # not set yet
                cells.append((name, None))
        if _installed(func.__code__.co_filename):
            name = f"{func.__module__} {func.__qualname__} {_version(func.__module__ or '')}"
            return self._all("installed", (name, cells))
        attributes = {k: v for k, v in func.__dict__.items() if k != "__wrapped__"}
        return self._all(
            "function",
            (func.__code__, func.__defaults__, func.__kwdefaults__, cells, attributes,
             *(self._global(func, name) for name in _globals_named(func.__code__)),
             *(self._import(func, name) for name in _imports(func.__code__))),
        )  # fmt: skip

    def _global(self, func: types.FunctionType, name: str) -> bytes:
        if name in func.__globals__:
            return self._combine(name, self.digest(func.__globals__[name]))
        return self._combine(name)  # a builtin

    def _import(self, func: types.FunctionType, imported: tuple[int, str]) -> bytes:
        level, name = imported
        if level:
            name = _absolute(level, name, func.__globals__.get("__package__") or "")
        return self._module(name)

    def _module(self, name: str) -> bytes:
        """By its version if it is installed, else by its source, and that of what it imports."""
        known = self._combine("module", name.encode())
        if name in self.modules:
            return known
        self.modules.add(name)
        file = None
        for part in (name.split(".")[0], name):  # the first says whether it is installed
            if part in sys.stdlib_module_names:
                return known
            file = _source_file(part)
            if _installed(file):
                return self._combine("module", name.encode(), _version(name).encode())
        if file is None or not file.endswith(".py"):
            return known
        source = Path(file).read_bytes()
        package = name if Path(file).name == "__init__.py" else name.rpartition(".")[0]
        imports = []
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                imports += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = _absolute(node.level, node.module or "", package)
                imports += [base, *(f"{base}.{alias.name}" for alias in node.names)]
        return self._combine("module", name.encode(), source, *map(self._module, imports))

    def _class(self, kind: type) -> bytes:
        if _installed_module(kind.__module__):
            name = f"{kind.__module__} {kind.__qualname__} {_version(kind.__module__)}"
            return self._combine("class", name.encode())
        if issubclass(kind, enum.Enum):
            return self._all("enumeration", [kind.__qualname__, *kind.__members__])
        own = [
            (name, value)
            for name, value in sorted(vars(kind).items())
            if name not in CLASS_FIELDS and not name.startswith(("__dataclass", "_abc"))
        ]
        return self._all("class", (kind.__qualname__, list(kind.__bases__), own))


CLASS_FIELDS = {
    "__annotate__", "__annotate_func__", "__annotations__", "__abstractmethods__", "__dict__",
    "__doc__", "__firstlineno__", "__module__", "__orig_bases__", "__parameters__", "__qualname__",
    "__static_attributes__", "__weakref__", "__annotations_cache__",
}  # fmt: skip


def _owners(func: Any) -> list[Any]:
    """The function itself, what a partial calls, and what a method is bound to."""
    owners = [func]
    while isinstance(owners[-1], functools.partial):
        owners.append(owners[-1].func)
    if isinstance(owners[-1], types.MethodType):
        owners.append(owners[-1].__self__)
    return owners


def _of_transformers(value: Any, module: str, name: str) -> bool:
    """`isinstance` without the import, which takes seconds: there is an instance only after it."""
    loaded = sys.modules.get(f"transformers.{module}")
    return loaded is not None and isinstance(value, getattr(loaded, name))


def _absolute(level: int, name: str, package: str) -> str:
    try:
        return importlib.util.resolve_name("." * level + name, package) if level else name
    except ImportError:
        return name


def _source_file(module: str) -> str | None:
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None and module not in sys.modules:
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError, AttributeError):  # a name in a module, for example
            spec = None
        file = spec.origin if spec is not None and spec.has_location else None
    return file


def _plain(value: Any) -> bytes:
    if isinstance(value, float):
        return struct.pack("<d", value)
    if isinstance(value, bytes):
        return value
    return repr(value).encode("utf-8", "surrogatepass")


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _globals_named(code: types.CodeType) -> list[str]:
    """Names that the code and the functions inside it look up outside of them."""
    return sorted(
        {
            instruction.argval
            for each in _codes(code)
            for instruction in dis.get_instructions(each)
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
        }
    )


def _imports(code: types.CodeType) -> list[tuple[int, str]]:
    """Modules that the code imports when it runs: level and name."""
    found = set()
    for each in _codes(code):
        instructions = list(dis.get_instructions(each))
        for i, instruction in enumerate(instructions):
            if instruction.opname == "IMPORT_NAME":
                levels = [
                    x.argval for x in instructions[max(0, i - 2) : i] if type(x.argval) is int
                ]
                found.add((levels[0] if levels else 0, instruction.argval))
    return sorted(found)
