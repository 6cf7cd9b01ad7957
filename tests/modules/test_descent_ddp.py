"""Two processes descend as one does with all of their rows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.modules import descent_job

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", ["clt", "steering"])
def test_two_processes_fit_what_one_fits(tmp_path, kind):
    descent_job.main(kind, str(tmp_path / "data"), "1")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.modules.descent_job", kind, str(tmp_path / "data"), "2"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / "data" / f"{kind}-{n}.pt", weights_only=True) for n in (1, 2))
    assert one["state"].keys() == two["state"].keys()
    for name, value in one["state"].items():
        other = two["state"][name]
        if kind == "clt" and name in ("weight", "bias"):  # the control shuffles the rows of its process
            value, other = value[0], other[0]
        torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-5, msg=name)
    assert not torch.allclose(one["state"]["mapped_weight"], torch.eye(12)) if kind == "clt" else True
    # A batch of the contrast is scored by means, so that validation depends on its batches a little.
    assert two["losses"]["val/loss"] == pytest.approx(
        one["losses"]["val/loss"], rel=1e-4 if kind == "clt" else 0.2
    )
    shared = [name for name in one["losses"] if name.endswith("energy")]
    assert len(shared) == (2 if kind == "steering" else 0)
    for name in shared:
        assert two["losses"][name] == pytest.approx(one["losses"][name], rel=1e-4)
