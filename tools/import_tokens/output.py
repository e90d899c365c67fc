"""The output folder: claimed for one job, locked against a second one, and never overwritten."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tools.prepare.job import TOKENIZER_FOLDER
from trainer.data.manifest import IMPORT_WORK_FOLDER, MANIFEST, SPLITS, Manifest, read_data_manifest
from trainer.errors import UserError
from trainer.runtime.files import replace_synced, sync_files, sync_folder
from trainer.runtime.record_lock import RecordLock, try_record_lock

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Output:
    """Where the data sets of one import go; an interrupted one leaves its work folder there.

    Attributes:
        settings, tokenizer_sha256: what a data set that is already there must have been made with.
        newest_input_ns: modification time of the newest input.
    """

    folder: Path
    settings: dict[str, Any]
    tokenizer_sha256: str
    newest_input_ns: int

    @property
    def work_folder(self) -> Path:
        return self.folder / IMPORT_WORK_FOLDER

    @property
    def folders(self) -> dict[str, Path]:
        """The folder of each split: the output itself, or one in it for each when some documents are held out."""
        return (
            {name: self.folder / name for name in SPLITS}
            if self.settings["validation_fraction"]
            else {"train": self.folder}
        )

    def finished(self) -> dict[str, Manifest] | None:
        """Read the manifests that an earlier run of the same job wrote; None when it still has work to do.

        Raises:
            UserError: when there is a data set of another job.
        """
        manifests: dict[str, Manifest] = {}
        for folder in (self.folder, *(self.folder / name for name in SPLITS)):
            if (folder / MANIFEST).is_file():
                manifest = read_data_manifest(folder)
                self._refuse_other(folder, manifest)
                manifests.update({name: manifest for name, own in self.folders.items() if own == folder})
        if len(manifests) < len(self.folders):
            return None
        shutil.rmtree(self.work_folder, ignore_errors=True)
        return manifests

    def _refuse_other(self, folder: Path, manifest: Manifest) -> None:
        differs = [
            "other input files" if name == "inputs" else f"{name} {manifest.settings.get(name)!r}, not {value!r}"
            for name, value in self.settings.items()
            if manifest.settings.get(name) != value
        ]
        if manifest.tokenizer_sha256 != self.tokenizer_sha256:
            differs.append("another tokenizer")
        if self.newest_input_ns > (folder / MANIFEST).stat().st_mtime_ns:
            differs.append("input files that have changed since")
        if differs:
            raise UserError(
                f"'{folder}' already holds a data set, of {'; '.join(differs)}.",
                where=str(folder),
                remedy="Choose another --output, or delete the folder.",
            )

    @contextlib.contextmanager
    def claimed(self, console: Console) -> Iterator[None]:
        """Create the output and keep a second import out of it; what interrupts the work says how to go on.

        Raises:
            UserError: when it holds anything that is not an interrupted run, or another one is writing to it.
        """
        if self.folder.is_dir() and not self.work_folder.is_dir() and any(self.folder.iterdir()):
            held = ", ".join(sorted(path.name for path in self.folder.iterdir())[:5])
            raise UserError(
                f"The output folder already holds other files: {held}.",
                where=str(self.folder),
                remedy="Choose an --output that is new or empty.",
            )
        try:
            for folder in (self.work_folder, *self.folders.values()):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"Cannot create the output folder: {error.strerror}.",
                where=str(self.folder),
                remedy="Choose another --output.",
            ) from None
        with open(self.work_folder / "lock", "w") as file:
            if try_record_lock(file.fileno()) is RecordLock.THEIRS:
                raise UserError(
                    "Another import is writing to this folder.",
                    where=str(self.folder),
                    remedy="Wait for it, or choose another --output.",
                )
            try:
                yield
            except KeyboardInterrupt:
                console.print("Interrupted. Finished shards are kept: run the same command again to continue.")
                raise
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
                remedy = "Free some space and run the same command again to continue."
                raise UserError(f"Cannot write: {error.strerror}.", where=str(self.folder), remedy=remedy) from None

    def save_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        tokenizer.save_pretrained(str(self.folder / TOKENIZER_FOLDER))
        sync_files(self.folder / TOKENIZER_FOLDER)

    def commit(self, manifests: dict[str, Manifest]) -> None:
        """Write the manifests, that of "train" last, and remove what no manifest names."""
        named = {self.folders[name]: {entry.name for entry in manifests[name].shards} for name in manifests}
        for folder in (*(self.folder / name for name in SPLITS), self.folder):
            for path in [*folder.glob("shard-*"), *folder.glob(".shard-*.tmp")]:
                if path.name.startswith(".") or path.name.split(".")[0] not in named.get(folder, ()):
                    path.unlink()  # left by a killed run of other input or splits
            if folder not in named and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        for name in reversed(self.folders):
            replace_synced(self.folders[name] / MANIFEST, manifests[name].to_json().encode())
        shutil.rmtree(self.work_folder, ignore_errors=True)
        sync_folder(self.folder)
