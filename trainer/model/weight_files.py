"""The weight files of a checkpoint to continue from: names and shapes without their data, and what is no weights."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from trainer.errors import UserError
from trainer.runtime.files import is_lfs_pointer
from trainer.runtime.paths import is_local, user_path

_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_WHERE = "model.from_pretrained"


def weight_shapes(source: str) -> dict[str, torch.Size] | None:
    """Read the shapes of a checkpoint's weights by name, not the weights; None if its files are not on this machine.

    Of a hub name what an earlier start downloaded is looked at, and nothing is fetched.

    Raises:
        UserError: when there is no weight file, a part of it is missing, or one cannot be read.
    """
    folder = source_folder(source)
    found = next((folder / name for name in _FILES if (folder / name).is_file()), None) if folder else None
    if folder is None or (found is None and not is_local(source)):
        return None
    if found is None:
        others = sorted(path.name for path in folder.glob("*") if path.suffix in (".h5", ".msgpack", ".ckpt", ".pt"))
        raise _cannot_load(
            source,
            "there is neither a model.safetensors nor a pytorch_model.bin"
            + (f", only {', '.join(others[:3])}" if others else ""),
            "Give a folder as save_pretrained writes it, with config.json and whole weight files.",
        )
    weights: dict[str, torch.Size] = {}
    for path in _parts(source, found):
        weights.update(_read(source, path))
    return weights


def source_folder(source: str) -> Path | None:
    """Find the folder of a checkpoint; of a hub name the one in the cache, None when there is none."""
    if is_local(source):
        return user_path(source, _WHERE)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, local_files_only=True))
    except Exception:  # not there, no such name: the hub's own errors, and ValueError
        return None


def refuse_lfs_pointers(folder: Path) -> None:
    """Refuse a folder that Git cloned without its large files.

    Raises:
        UserError: naming those that are pointers.
    """
    pointers = [path.name for path in sorted(folder.glob("*")) if is_lfs_pointer(path)]
    if pointers:
        raise UserError(
            f"In '{folder}' Git LFS has left a pointer in the place of {', '.join(pointers[:4])}: the content was not "
            "fetched.",
            where=_WHERE,
            remedy="Run `git lfs pull` in that folder.",
        )


def _parts(source: str, found: Path) -> list[Path]:
    if found.suffix != ".json":
        return [found]
    try:
        names = sorted(set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()))
        paths = [found.parent / Path(str(name)).name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _cannot_load(source, f"{found.name} is no index of weight files ({error})") from None
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise _cannot_load(source, f"{found.name} names {', '.join(missing[:4])}, and there is no such file")
    return paths


def _read(source: str, path: Path) -> dict[str, torch.Size]:
    try:
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(source, path)
    except SafetensorError as error:
        raise _cannot_load(source, f"{path.name} is cut short or damaged ({error})") from None
    except pickle.UnpicklingError:
        raise _cannot_load(
            source,
            f"{path.name} holds more than weights, which would be code to run, or is damaged",
            "Save the weights alone, as model.save_pretrained does, or torch.save(model.state_dict(), PATH).",
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:200]
        raise _cannot_load(source, f"{path.name} is cut short or damaged ({reason})") from None


def _read_safetensors(path: Path) -> dict[str, torch.Size]:
    with safe_open(path, framework="pt") as file:
        return {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _read_pickle(source: str, path: Path) -> dict[str, torch.Size]:
    content = torch.load(path, map_location="meta", weights_only=True)
    shapes = {name: value.shape for name, value in _items(content) if isinstance(value, torch.Tensor)}
    if not shapes:
        inside = [name for name, value in _items(content) if isinstance(value, Mapping)]
        raise _cannot_load(
            source,
            f"{path.name} is a training checkpoint: its weights lie under '{inside[0]}'"
            if inside
            else f"{path.name} holds no weights by name",
            f"Save the weights alone: torch.save(torch.load(PATH)['{inside[0]}'], NEW/pytorch_model.bin)."
            if inside
            else "Save the weights by name, as torch.save(model.state_dict(), PATH) does.",
        )
    return shapes


def _items(content: Any) -> list[tuple[str, Any]]:
    return [(str(name), value) for name, value in content.items()] if isinstance(content, Mapping) else []


def _cannot_load(source: str, why: str, remedy: str = "Fetch or save it again, whole.") -> UserError:
    return UserError(f"Cannot load weights from '{source}': {why}.", where=_WHERE, remedy=remedy)
