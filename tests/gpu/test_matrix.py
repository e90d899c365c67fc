"""What a GPU computes is what a CPU computes: each precision, stage, kernel and way of attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.gpu.runs import MARKS, MODERNBERT, NEZHA, losses_of, only_on_a_gpu, trained, write_run

pytestmark = MARKS
HALF = 0.05  # nats: of a loss near 6, what bf16 and fp16 may be off by in 12 steps
EXACT = 5e-3  # fp32, summed in another order
DOCUMENTS = {"document_attention": True}
MODERN = {"preset": "modernbert-base", "overrides": MODERNBERT}
OWN_CODE = {"preset": "nezha-base", "overrides": NEZHA}
FROZEN = {"frozen": ["roberta.encoder.*"]}
FP32, FP16 = {"precision": "fp32"}, {"precision": "fp16"}
REFERENCES: dict[str, dict[str, Any]] = {
    "plain": {"train": FP32},
    "documents": {"train": FP32, "model": DOCUMENTS},
    "modernbert": {"train": FP32, "model": {**MODERN, **DOCUMENTS}},
    "nezha": {"train": FP32, "model": {**OWN_CODE, **DOCUMENTS}},
    "frozen": {"train": FP32, "model": FROZEN},
}
CASES: dict[str, tuple[str, float, dict[str, Any]]] = {
    "fp32": ("plain", EXACT, {"train": FP32}),
    "fp32, ZeRO-0": ("plain", EXACT, {"train": FP32, "deepspeed": "zero0"}),
    "fp32, documents by a mask": ("documents", EXACT, {"train": FP32, "model": DOCUMENTS}),
    "fp32, ModernBERT's windows": ("modernbert", EXACT, {"train": FP32, "model": {**MODERN, **DOCUMENTS}}),
    "fp32, NEZHA's distances": ("nezha", EXACT, {"train": FP32, "model": {**OWN_CODE, **DOCUMENTS}}),
    "fp32, torch's kernels": ("plain", EXACT, {"train": FP32, "model": {"kernels": "torch"}}),
    "fp32, in one micro-batch": ("plain", EXACT, {"train": FP32, "batch": {"micro_size": 16}}),
    "bf16": ("plain", HALF, {}),
    "bf16, ZeRO-2": ("plain", HALF, {"deepspeed": "zero2"}),
    "bf16, ZeRO-3": ("plain", HALF, {"deepspeed": "zero3"}),
    "bf16, offload": ("plain", HALF, {"deepspeed": "zero2_offload"}),
    "bf16, accumulated in fp32": ("plain", HALF, {"train": {"gradient_accumulation_dtype": "fp32"}}),
    "bf16, checkpointing": ("plain", HALF, {"model": {"activation_checkpointing": True}}),
    "bf16, documents": ("documents", HALF, {"model": DOCUMENTS}),
    "bf16, ModernBERT's windows": ("modernbert", HALF, {"model": {**MODERN, **DOCUMENTS}}),
    "bf16, NEZHA's distances": ("nezha", HALF, {"model": {**OWN_CODE, **DOCUMENTS}}),
    "bf16, NEZHA compiled": ("nezha", HALF, {"model": {"compile": True, **OWN_CODE, **DOCUMENTS}}),
    "bf16, compiled": ("plain", HALF, {"model": {"compile": True}}),
    "bf16, compiled documents": ("documents", HALF, {"model": {"compile": True, **DOCUMENTS}}),
    "bf16, frozen layers": ("frozen", HALF, {"model": FROZEN}),
    "bf16, frozen layers, ZeRO-3": ("frozen", HALF, {"model": FROZEN, "deepspeed": "zero3"}),
    "bf16, frozen layers, compiled": ("frozen", HALF, {"model": {"compile": True, **FROZEN}}),
    "bf16, deterministic": ("plain", HALF, {"train": {"deterministic": True}}),
}
ON_GPUS_ONLY: dict[str, tuple[str, float, dict[str, Any]]] = {
    "fp16": ("plain", HALF, {"train": FP16}),
    "bf16, CUDA graphs": ("plain", HALF, {"model": {"compile": "reduce-overhead"}, "batch": {"micro_size": 16}}),
    "bf16, tuned": ("plain", HALF, {"model": {"compile": "max-autotune"}}),
    "bf16, Triton's cross-entropy": ("plain", HALF, {"model": {"kernels": "triton"}}),
    "bf16, automatic micro-batch": ("plain", HALF, {"batch": {"micro_size": "auto"}}),
    **{
        f"bf16, {backend} attention": ("plain", HALF, {"model": {"attention_backend": backend}})
        for backend in ("flash", "cudnn", "efficient", "math")
    },
}


@pytest.fixture(scope="module")
def references(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The losses of runs on the CPU, in fp32."""
    found = {}
    for name, sections in REFERENCES.items():
        config = write_run(workspace, tmp_path_factory.mktemp(name), **sections)
        trained(config, CUDA_VISIBLE_DEVICES="")
        found[name] = losses_of(config)
        assert found[name][-1] < found[name][0] - 0.3, "equal losses say little if it does not learn"
    return found


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=only_on_a_gpu) for name in ON_GPUS_ONLY)])
def test_losses_are_those_of_a_cpu(
    name: str, references: dict[str, list[float]], workspace: Path, tmp_path: Path
) -> None:
    reference, tolerance, sections = {**CASES, **ON_GPUS_ONLY}[name]
    config = write_run(workspace, tmp_path, **sections)
    said = trained(config)
    assert "COMPILE LIMIT" not in said
    assert losses_of(config) == pytest.approx(references[reference], abs=tolerance, rel=0), said
