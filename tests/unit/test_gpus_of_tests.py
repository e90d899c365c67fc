from __future__ import annotations

import os

import pytest
import torch

from tests.ranks import ON_GPUS


@pytest.mark.skipif(ON_GPUS, reason="GPUs are asked for")
def test_tests_see_no_gpu_unless_they_are_asked_for():
    """Gpu A2: forked ranks could not use one, and two ranks would meet on it."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert not torch.cuda.is_available()
