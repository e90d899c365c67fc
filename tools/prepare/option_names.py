"""What messages call the options of reading: by the command line's names, or by the keys of a run's config."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OptionNames:
    """How a user of one kind names an option, such as `--documents line` or `data.text.documents: line`.

    Attributes:
        input: what the command line calls the option `input`.
    """

    of_config: bool = False
    input: str = "input"

    def __call__(self, option: str, value: str = "") -> str:
        """Name the option `option` (as the command line spells it, without dashes), set to `value` if that is given."""
        if self.of_config:
            key = "data.train" if option == "input" else f"data.text.{option.replace('-', '_')}"
            return f"{key}: {value}" if value else key
        return f"--{self.input if option == 'input' else option} {value}".rstrip()


COMMAND_LINE = OptionNames()
CONFIG = OptionNames(of_config=True)
