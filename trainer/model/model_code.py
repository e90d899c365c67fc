"""Models whose classes are in a folder of their own, beside config.json, and not in transformers.

Such a folder is asked for by name (`model.code`), or is one of those that ship in `encoders/`; of others nothing is
run. Its files are read once, and what was read is imported: there is no copy in a cache, as transformers makes one,
which ranks would write at once and a read-only home would refuse. The same bytes go into checkpoints, and into what
`convert` writes.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.abc import MetaPathFinder, SourceLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_imports

from trainer.errors import UserError
from trainer.runtime.files import bytes_hash, give_usual_mode, shipped
from trainer.runtime.paths import is_local, real_path, user_path
from trainer.runtime.user_files import read_json

AUTO_CONFIG = "AutoConfig"
_SHIPPED_FOLDER = shipped("trainer", "model/encoders")
SHIPPED: Mapping[str, Path] = {"nezha": _SHIPPED_FOLDER / "nezha"}
"""Model type → the folder of its code, of the types that transformers has not and maskwright brings along."""
_REFERENCE = re.compile(r"[^\W\d]\w*\.[^\W\d]\w*")  # a module of the folder, and a class in it
_PACKAGE = "maskwright_code_"
_known: dict[str, ModelCode] = {}


@dataclass(frozen=True)
class ModelCode:
    """The code of one folder, as it was when it was read.

    Attributes:
        folder: where it was read.
        where: what named it, for messages: a config key, or a file.
        auto_map: name of a class of transformers that loads models → module and name of the class here.
        files: name → content of the modules, with those that they import from beside them.
    """

    folder: Path
    where: str
    auto_map: Mapping[str, str]
    files: Mapping[str, bytes]

    @property
    def is_shipped(self) -> bool:
        """Whether it is maskwright's own, of the version that runs."""
        return self.folder.parent == _SHIPPED_FOLDER

    def hashes(self) -> dict[str, str]:
        """Compute the xxh3_128 of each file, by name."""
        return {name: bytes_hash(content) for name, content in sorted(self.files.items())}

    def write(self, folder: Path) -> None:
        """Write the files into a folder, whose config.json has the `auto_map`."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
            give_usual_mode(folder / name)

    def class_name(self, auto_class: str) -> str | None:
        """Return the name of the class that `auto_class` of transformers loads; None where the folder has none."""
        reference = self.auto_map.get(auto_class)
        return None if reference is None else reference.rpartition(".")[2]

    def file_of(self, auto_class: str) -> Path:
        """Give the file of the class that `auto_class` of transformers loads."""
        return self.folder / f"{self.auto_map[auto_class].partition('.')[0]}.py"

    def load(self, auto_class: str) -> Any:
        """Import the class that `auto_class` of transformers loads, which runs the code.

        Raises:
            UserError: naming file and line of what the code raises; when there is no such class in it.
        """
        module, _, name = self.auto_map[auto_class].partition(".")
        try:
            found = getattr(importlib.import_module(f"{self._install()}.{module}"), name, None)
        except (Exception, SystemExit) as error:  # whatever the code does when it is imported
            raise UserError(
                f"The model's own code cannot be imported: {type(error).__name__}: {' '.join(str(error).split())}",
                where=f"{self.where}: {place_of(error, self) or self.file_of(auto_class)}",
                remedy="Correct it, or install what it needs. Of the modules beside it those are found that it imports "
                "as `from .module import name`, the form that transformers follows.",
            ) from error
        base = PretrainedConfig if auto_class == AUTO_CONFIG else PreTrainedModel
        if not (isinstance(found, type) and issubclass(found, base)):
            what = "has no class" if found is None else f"has no {base.__name__}"
            raise UserError(
                f"{module}.py {what} '{name}', which auto_map names for {auto_class}.",
                where=f"{self.where}: {self.folder / 'config.json'}",
                remedy=f"Name a class of it that is a transformers.{base.__name__}.",
            )
        return found

    def _install(self) -> str:
        """Make a package of these bytes importable, under a name that no others have."""
        all_of_it = (str(self.folder), sorted(self.auto_map.items()), sorted(self.files.items()))
        package = _PACKAGE + bytes_hash(repr(all_of_it).encode())
        if package not in _known:
            module = ModuleType(package)
            module.__path__ = []
            sys.modules[package] = module
            sys.meta_path.append(_Importer(package, self))
            _known[package] = self
        return package


class _Importer(MetaPathFinder, SourceLoader):
    """Imports the modules of one ModelCode from its bytes; nothing is compiled into a file."""

    def __init__(self, package: str, code: ModelCode) -> None:
        self.package, self.code = package, code

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        package, _, name = fullname.rpartition(".")
        if package != self.package or f"{name}.py" not in self.code.files:
            return None
        return importlib.util.spec_from_loader(fullname, self)

    def get_filename(self, fullname: str) -> str:
        return str(self.code.folder / f"{fullname.rpartition('.')[2]}.py")  # for tracebacks

    def get_data(self, path: str) -> bytes:
        return self.code.files[Path(path).name]


def is_stock(kind: type) -> bool:
    """Tell whether a class, of a config or a model, is one of transformers itself."""
    return kind.__module__.startswith("transformers.")


def code_of(config: PretrainedConfig) -> ModelCode | None:
    """Find the code that the class of a config comes from; None for a class of transformers."""
    return _known.get(type(config).__module__.partition(".")[0])


def shipped_code(model_type: Any) -> ModelCode | None:
    """Read the code of a type that maskwright brings along; None for any other type."""
    folder = SHIPPED.get(model_type) if isinstance(model_type, str) else None
    return None if folder is None else read_code(folder, "model", read_json(folder / "config.json"))


def unused_code(source: str | None) -> list[str]:
    """Say in a line that a folder has code of its own which is not used; nothing for any other source.

    A folder of a type that transformers or maskwright has is one of a known class, whatever its `auto_map` says; it may
    be a copy whose code was changed since.

    Args:
        source: a folder, or the file of a config in it, or a name on the hub.
    """
    if source is None or not is_local(source):
        return []
    path = real_path(user_path(source, "model"))
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file():
        return []
    fields = read_json(folder / "config.json")
    own = fields.get("auto_map") if isinstance(fields, dict) else None
    if not isinstance(own, dict) or not list(folder.glob("*.py")):
        return []
    known = shipped_code(fields.get("model_type"))
    try:
        if known is not None and read_code(folder, "", fields).hashes() == known.hashes():
            return []
    except UserError:
        pass  # it is not used, whatever is wrong with it
    whose = "transformers'" if known is None else "maskwright's"
    return [f"code: '{source}' has code of its own, which is not used; {whose} class of its type is"]


def read_code(folder: Path, where: str, fields: Mapping[str, Any]) -> ModelCode:
    """Read the code of a model's folder, without running any of it.

    Args:
        where: what named the folder, for messages.
        fields: of its config.json.

    Raises:
        UserError: when `auto_map` names no classes of this folder, or a file is missing or no Python.
    """
    auto_map = _own_classes(folder, where, fields.get("auto_map"))
    files: dict[str, bytes] = {}
    wanted = [(reference.partition(".")[0], "auto_map") for reference in auto_map.values()]
    while wanted:
        module, named_by = wanted.pop()
        path = folder / f"{module}.py"
        if path.name in files:
            continue
        try:
            files[path.name] = path.read_bytes()
            wanted += [(name, path.name) for name in sorted(get_relative_imports(path))]
        except (OSError, UnicodeDecodeError) as error:
            why = "there is no such file" if isinstance(error, FileNotFoundError) else f"it cannot be read ({error})"
            raise UserError(
                f"{named_by} needs {path.name} of the model's own code, and {why}.",
                where=f"{where}: {path}",
                remedy="Put it beside config.json, all in one folder: transformers follows `from .module import name`.",
            ) from None
    return ModelCode(folder, where, auto_map, files)


def _own_classes(folder: Path, where: str, auto_map: Any) -> dict[str, str]:
    """Choose the entries of an `auto_map` for the config and for models."""
    found = {
        name: reference
        for name, reference in (auto_map.items() if isinstance(auto_map, dict) else ())
        if name == AUTO_CONFIG or name.startswith("AutoModel")
    }
    place = f"{where}: {folder / 'config.json'}"
    foreign = [reference for reference in found.values() if not _REFERENCE.fullmatch(str(reference))]
    if foreign:
        raise UserError(
            f"auto_map names '{foreign[0]}', which is no class in a file of this folder.",
            where=place,
            remedy='Download the files that it means into the folder, and write "MODULE.CLASS".',
        )
    if AUTO_CONFIG not in found:
        raise UserError(
            "With model.code the config.json has to say which class its config is, and it has no auto_map entry "
            f"'{AUTO_CONFIG}'.",
            where=place,
            remedy=f'Add "auto_map": {{"{AUTO_CONFIG}": "MODULE.CLASS", "AutoModelForMaskedLM": "MODULE.CLASS"}}, '
            "or set model.code=false.",
        )
    return found


def wants_code(where: str, fields: Mapping[str, Any]) -> UserError:
    """Make the error for a folder whose type nobody knows but its own code, which was not asked for."""
    return UserError(
        f"'{fields['model_type']}' is no type of the installed transformers: the folder wants code of its own to be "
        "run (auto_map), and nothing of it was.",
        where=where,
        remedy="If you trust that code, set model.code=true.",
    )


def place_of(error: BaseException, code: ModelCode | None) -> str | None:
    """Find file and line of a model's own code where an error came from; None where it came from elsewhere."""
    if code is None:
        return None
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).parent == code.folder:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).parent == code.folder]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else None
