"""What lies beside the tokens of the shards of a data set, mapped file by file as it is needed."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np

from trainer.data.dataset import ShardSet
from trainer.data.shard_checks import check_content, check_sizes

_MAPPED_FILES = 64  # kept open; a data set may have thousands, a batch reads from few


class ShardParts:
    """The files of one kind, by the number of their shard.

    A file is mapped on first use and, where reads are verified, compared with its checksum when this process first maps
    it: borders that have moved would train another run without a word.

    Args:
        suffix: of the files: "doc", or a token mark.
        dtype: of their items.
    """

    def __init__(self, shards: ShardSet, suffix: str, dtype: str) -> None:
        self._shards, self._suffix, self._dtype = shards, suffix, dtype
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()  # the one used last comes last
        self._checked: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": OrderedDict(), "_checked": set()}  # a worker maps the files itself

    def __getitem__(self, shard: int) -> np.ndarray:
        """Map the file of a shard.

        Raises:
            DamagedError: when it is not the one that the manifest records.
        """
        mapped = self._maps.pop(shard, None)
        if mapped is None:
            if len(self._maps) == _MAPPED_FILES:
                self._maps.popitem(last=False)
            entry, folder = self._shards.manifest.shards[shard], self._shards.folder
            if shard not in self._checked:
                if self._shards.settings.verify:
                    check_content(folder, entry, self._suffix)
                else:
                    check_sizes(folder, entry)
                self._checked.add(shard)
            # As a plain array: each view of a memmap costs microseconds, and a batch takes many.
            mapped = np.asarray(np.memmap(folder / f"{entry.name}.{self._suffix}", self._dtype, "r"))
        self._maps[shard] = mapped
        return mapped
