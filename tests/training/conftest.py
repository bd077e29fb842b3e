import pytest
from tokenizers import Tokenizer

from model.training.vocabulary import train_tokenizer


@pytest.fixture(scope="session")
def vocabulary() -> Tokenizer:
    """The tokenizer, trained as a run trains it."""
    return train_tokenizer(seed=0)
