import pytest

from python_tests.tiny import gpt2, llama


@pytest.fixture(params=[llama, gpt2], ids=["linear", "conv1d"])
def base(request):
    return request.param()
