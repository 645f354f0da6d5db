"""vLLM serves what Transformers serves: same folders, same tokens."""

import pytest
from engines import engine, expected, nested, served


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A nested tiny model. Shared by all tests: read it only."""
    return nested(tmp_path_factory.mktemp("nested") / "model")


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_a_width_gives_the_tokens_of_transformers(folder, bits):
    with engine(folder, hf_overrides={"quantization_config": {"quant_method": "matgptq", "bits": bits}}) as llm:
        assert served(llm) == expected(folder, bits)
