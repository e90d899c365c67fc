"""Whether validation data are enough to evaluate on."""

from __future__ import annotations

from trainer.config import Config
from trainer.data.batch import Samples
from trainer.errors import UserError
from trainer.inputs.pairs import refuse_single_block


def refuse_small_validation(config: Config, objective: Samples, blocks: int, tokens: int) -> None:
    """Refuse validation data of no block; or of one, where another is to be read beside it.

    Raises:
        UserError: with the numbers.
    """
    where = f"data.validation={config.data.validation}"
    refuse_single_block(blocks, objective, "validation data", where)
    if blocks == 0:
        more = " (data.text.validation_fraction), give more text" if config.data.holds_out else ""
        raise UserError(
            f"The validation data has {tokens:,} tokens: not one block of {config.data.seq_len}.",
            where=where,
            remedy=f"Hold out more{more}, set a smaller data.seq_len, or leave data.validation out.",
        )
