"""What is measured: one table of names, and the meter that fills it.

The names are those of metrics.jsonl and of the TensorBoard scalars.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Sequence
from typing import Any

import torch

from trainer.state import TrainState

COUNTERS = {
    "step": "optimizer steps done",
    "samples": "blocks consumed, those passed over by rollbacks included",
    "tokens": "positions consumed: samples × seq_len, that of their phase",
    "time": "seconds since 1970",
}
TRAINING_METRICS = {
    "train/loss": "mean cross-entropy over all predicted tokens of the step's global batch, nats; of a loss of several "
    "terms, the weighted sum of their means",
    "train/learning_rate": "rate of the step",
    "train/grad_norm": "global 2-norm of the gradients before clipping; null when not finite",
    "train/skipped_steps": "steps skipped so far because a gradient was not finite or their norm above its bound",
    "train/loss_scale": "loss scale of fp16; 1 in other precisions",
    "train/epoch": "passes over the training data; of a mixture, over the source that is seen most often",
    "resilience/rollbacks": "returns to a checkpoint so far because training had diverged",
    "resilience/skipped_samples": "blocks passed over by them",
    "throughput/tokens_per_second": "positions a second over all ranks, since the last line",
    "throughput/mfu": "model FLOP/s over the peak FLOP/s of all devices, since the last line; null on CPUs",
    "time/data_wait_fraction": "share of the time since the last line spent waiting for the loader, rank 0",
    "time/save_seconds": "time that saving stopped training for since the last line, rank 0, seconds",
    "memory/peak_gib": "peak memory: of the device on CUDA, of the process on CPU; the largest rank, GiB",
    "memory/reserved_gib": "peak of what torch holds of the device for it, gaps included; on CPU as memory/peak_gib",
}
BATCH_METRICS = {
    "batch/global_size": "sequences of the step",
    "batch/seq_len": "tokens a sequence of the step",
}
TERM_METRICS = {
    "train/loss/TERM": "mean loss of one term (mlm, clm, nsp, sop, rtd, soft, cosine) over its labels in the step's "
    "global batch, nats; cosine: 1 − the cosine",
    "train/ignored/TERM": "of pairs (nsp, sop): share of the step's blocks without one, which have no label",
}
SOURCE_METRICS = {
    "source/NAME/loss": "the same as train/loss, over the blocks of one source; null when the batch has none",
    "source/NAME/epochs": "passes over the source so far",
    "source/NAME/tokens": "positions of the source consumed so far",
}
EVALUATION_METRICS = {
    "eval/loss": "mean cross-entropy over the validation blocks, with masks that stay the same, nats; of several terms "
    "the weighted sum of their means",
    "eval/perplexity": "exp(mean cross-entropy of the predicted tokens), which is exp(eval/loss) where that is all; of "
    "rtd, the generator's",
    "eval/masked_accuracy": "share of masked (plm: predicted) tokens told right; with objective.name mlm and plm; of "
    "rtd, the generator's",
    "eval/accuracy": "share of tokens predicted right; with objective.name clm",
}
TERM_EVALUATION_METRICS = {
    "eval/TERM/loss": "mean loss of one term (mlm, clm, nsp, sop, rtd, soft, cosine) over its labels, nats; cosine: "
    "1 − the cosine",
    "eval/TERM/accuracy": "share of its labels predicted right; soft: share of positions where model and teacher find "
    "the same token likeliest; not of cosine",
    "eval/rtd/precision": "of the tokens that are told to be replaced, the share that is; with objective.name rtd",
    "eval/rtd/recall": "of the replaced tokens, the share that is told; with objective.name rtd",
    "eval/TERM/ignored": "of pairs (nsp, sop): share of the validation blocks without one, which have no label",
}
PHASE_EVALUATION_METRICS = {
    "eval/seq_len": "tokens of a validation block, those of the last phase; in a run of several phases",
    "eval/rope_theta": "theta of the model's rotary positions in the evaluation (of its global layers, if it has local "
    "ones); where phases change it",
    "eval/local_rope_theta": "the same of its local layers",
}
PROBE_METRICS = {
    "eval/probe/accuracy": "share of the labelled texts whose class is told right by what was fitted to the others; "
    "mean over the folds",
    "eval/probe/accuracy_std": "its standard deviation over the folds",
    "eval/probe/macro_f1": "mean of the F1 of the classes; mean over the folds",
    "eval/probe/macro_f1_std": "its standard deviation over the folds",
    "eval/probe/majority": "share of the most frequent class: what the accuracy is to be compared with",
}
EVENT_METRICS = {
    "event": "skip (the step changed nothing), rollback (to the checkpoint of `step`) or diverged (the run ends)",
    "event/reason": "what was seen",
    "event/first_sample": "first t of the samples concerned",
    "event/end_sample": "t after the last of them",
    "event/from_step": "the step in which it happened; `step` is an earlier one if the run has since gone back to that",
}


class ThroughputMeter:
    """Speed and waiting since the last line.

    Args:
        flops_per_token: training FLOPs a position, in each phase of the run, without the head's.
        head_flops: training FLOPs of the head, a position for which it computes logits.
        peak_flops: FLOP/s of all devices together; NaN when it is not known.
    """

    def __init__(self, flops_per_token: Sequence[float], head_flops: float, peak_flops: float) -> None:
        self._flops_per_token, self._head_flops, self._peak_flops = flops_per_token, head_flops, peak_flops
        self._saving = 0.0
        self.restart()

    def restart(self) -> None:
        """Begin an interval; an evaluation is left out of it by restarting after it."""
        self._start, self._tokens, self._flops, self._waited = time.perf_counter(), 0, 0.0, 0.0

    def trained(self, tokens: int, head_rows: int, phase: int) -> None:
        """Count the positions of a step, and those of them for which logits were computed."""
        self._tokens += tokens
        self._flops += tokens * self._flops_per_token[phase] + head_rows * self._head_flops

    def waited(self, seconds: float) -> None:
        """Count time spent waiting for the loader."""
        self._waited += seconds

    def saved(self, seconds: float) -> None:
        """Count time in which a save stopped training; it is no part of the interval."""
        self._saving += seconds
        self._start += seconds

    def read(self) -> dict[str, float]:
        seconds = max(1e-9, time.perf_counter() - self._start)
        saving, self._saving = self._saving, 0.0
        return {
            "throughput/tokens_per_second": self._tokens / seconds,
            "throughput/mfu": self._flops / seconds / self._peak_flops,
            "time/data_wait_fraction": min(1.0, self._waited / seconds),
            "time/save_seconds": saving,
        }


def counters(state: TrainState) -> dict[str, float]:
    return {"step": state.step, "samples": state.samples, "tokens": state.tokens, "time": time.time()}


def peak_memory_gib(device: torch.device) -> tuple[float, float]:
    """Return the most that tensors took, and the most that torch took from the device for them, in GiB.

    On a CPU both are the peak of the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30, torch.cuda.max_memory_reserved(device) / 2**30
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    return resident, resident


def as_json(values: dict[str, Any]) -> dict[str, Any]:
    """Replace what is not finite by null: JSON has no NaN."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
