"""Every run of the suite draws the same examples, and small networks run faster on one thread."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("wdat", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("wdat")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
