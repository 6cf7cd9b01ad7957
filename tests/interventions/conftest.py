import pytest
import torch

from mechdiff.interventions import hooks
from tests.models import ARCHITECTURES, tiny_model


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    return tiny_model(request.param)


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    assert not hooks._TAPS
