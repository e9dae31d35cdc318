import pytest

from tests.peft_contract import tiny_hub


def pytest_configure(config):
    config.addinivalue_line("markers", "skipf: upstream's misspelling of skipif")


@pytest.fixture(scope="session")
def tiny_hub_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny_hub")
    tiny_hub.build(directory)
    return directory


@pytest.fixture(autouse=True, scope="module")
def offline_hub(tiny_hub_dir):
    """Run upstream's tests where the Hub ids of their models are local paths, and let nothing ask the Hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tiny_hub_dir)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield
