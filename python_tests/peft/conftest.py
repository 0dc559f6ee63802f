import peft
import pytest

from python_tests.peft.adapters import CORE_METHODS
from python_tests.tiny import MIXTURES, counted_fusions, gpt2, llama


@pytest.fixture(params=[llama, gpt2], ids=["linear", "conv1d"])
def base(request):
    return request.param()


@pytest.fixture(params=CORE_METHODS)
def method(request):
    return request.param


@pytest.fixture
def fused_calls():
    with counted_fusions() as calls:
        yield calls


@pytest.fixture(scope="session")
def adapters_of_transformers():
    """Skips where transformers refuses the PEFT that is here, whoever's the adapter."""
    try:
        llama().add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    except (ImportError, ValueError) as error:
        if isinstance(error, ValueError) and "version of PEFT" not in str(error):
            raise
        pytest.skip(f"transformers refuses this PEFT: {error}")


@pytest.fixture(params=MIXTURES, scope="module")
def mixture(request):
    return MIXTURES[request.param]()
