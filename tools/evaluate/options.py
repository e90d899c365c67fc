"""What `maskwright evaluate` is asked for."""

from __future__ import annotations

from dataclasses import dataclass

USUAL_WORDS = 2000


@dataclass(frozen=True)
class EvaluateOptions:
    """The command line; None where it says nothing.

    Attributes:
        models: as they are named, that of `--against` among them, which is the last one.
        against: the one that the others are compared with.
        data: as `data.validation` in a config; None is that of the first run.
        samples, seq_len, micro_size, mask_ratio: in the place of what the first run has, or of defaults.
        words: how many are hidden in every model; None is USUAL_WORDS where tokenizers differ, and none otherwise.
        pll_documents: lines of text whose pseudo-log-likelihood is computed; 0 for none.
        field, documents: of raw text, as in `data.text`.
        probe: a file of labelled texts, with its columns `probe_text` and `probe_label`, as in `eval.probe`.
        precision: that the models compute in.
        run_code: run the code that a model has in its folder.
    """

    models: tuple[str, ...]
    against: str | None = None
    data: str | None = None
    samples: int | None = None
    seq_len: int | None = None
    micro_size: int | None = None
    mask_ratio: float | None = None
    words: int | None = None
    pll_documents: int = 0
    field: str | None = None
    documents: str | None = None
    probe: str | None = None
    probe_text: str = "text"
    probe_label: str = "label"
    precision: str = "fp32"
    run_code: bool = False

    def arguments(self) -> list[str]:
        """Write them as a command line, for ranks of the same command."""
        against = len(self.models) - 1 if self.against is not None else None
        words = [name for place, name in enumerate(self.models) if place != against]
        named = {
            "--against": self.against,
            "--data": self.data,
            "--samples": self.samples,
            "--seq-len": self.seq_len,
            "--micro-size": self.micro_size,
            "--mask-ratio": self.mask_ratio,
            "--words": self.words,
            "--pll-documents": self.pll_documents or None,
            "--field": self.field,
            "--documents": self.documents,
            "--probe": self.probe,
            **({} if self.probe is None else {"--probe-text": self.probe_text, "--probe-label": self.probe_label}),
            "--precision": self.precision,
        }
        flags = [*(["--pll"] if self.pll_documents else []), *(["--code"] if self.run_code else [])]
        options = [word for name, value in named.items() if value is not None for word in (name, str(value))]
        return [*options, *flags, "--", *words]
