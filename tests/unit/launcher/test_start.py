from __future__ import annotations

import gc

from launcher.start import _imports_kept


def test_what_a_rank_imports_is_never_searched_for_garbage():
    gc.unfreeze()
    try:
        with _imports_kept():
            kept = [[] for _ in range(10_000)]
            assert not gc.isenabled()
        assert gc.isenabled() and gc.get_freeze_count() > len(kept)
    finally:
        gc.unfreeze()
