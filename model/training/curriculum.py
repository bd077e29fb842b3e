"""The recipe, as data: the shape of the model, the stages it goes through, and when it may go on."""

from dataclasses import dataclass

from model.config import ModelConfig
from model.training.documents import Form

CONTEXT = 1024


@dataclass(frozen=True)
class Stage:
    """A mix of documents, left once the recall accuracy on fresh ones (a running mean) reaches `gate`.

    forms: each form's share of the steps. min_steps: the least time spent in it.
    """

    forms: dict[Form, float]
    gate: float
    min_steps: int = 1


CURRICULUM = (
    Stage({"drill": 1.0}, gate=0.90, min_steps=600),
    Stage({"drill": 0.3, "brief": 0.4, "plain": 0.3}, gate=0.93, min_steps=200),
    Stage({"drill": 0.15, "brief": 0.2, "plain": 0.35, "long": 0.3}, gate=0.93, min_steps=300),
    Stage({"drill": 0.05, "brief": 0.2, "plain": 0.4, "long": 0.2, "longest": 0.15}, gate=2.0),  # the last: no exit
)


def storyteller_config(vocab_size: int, bos: int, eos: int) -> ModelConfig:
    """The embedded model: few layers, because every layer is a cost in serving, and recall needs only three."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=640,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_ids=(eos,),
    )
