"""Every classic mistake moves the logits beyond the tolerance of the exact tests."""

import numpy as np
import pytest
from faults import FAULTS, STORAGE_FAULTS
from reference import run

TOLERANCE = 1e-4
LENGTH = 132  # past the first HCA row, far past the indexer's top-k


def test_the_list_is_long():
    assert len({fault.__name__ for fault in FAULTS}) == len(FAULTS) >= 25


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_fault_is_caught(request, stored, monkeypatch, fault):
    model = request.getfixturevalue("exact_model" if fault in STORAGE_FAULTS else "decoded_model")
    ids, want = stored["s700/ids"][:LENGTH], stored["s700/exact/logits"][:LENGTH]
    fault(monkeypatch, model)
    assert np.abs(run(model, ids) - want).max() > TOLERANCE


def test_undone_faults_leave_no_trace(exact_model, decoded_model, stored):
    ids, want = stored["s700/ids"][:LENGTH], stored["s700/exact/logits"][:LENGTH]
    for model in (exact_model, decoded_model):
        assert np.abs(run(model, ids) - want).max() <= TOLERANCE
