"""How the model is taught to look things up: a start that favours matching, and a loss on where a few heads look.

Who holds what is a two-step lookup. First, every object reads the nearest name before it (binding). Then the word
before an answer reads the last sentence that told the owner (recall). Plain next-token loss finds this circuit too
late: on two cores the model settles for guessing inside the cast, and stays there for millions of tokens. The generator
knows where the evidence stands, so the trainer says it: one head of the first layer is asked to look at the binder, two
heads of a later layer at the evidence. With the guidance, and with keys that start as copies of queries, a toy with 240
names went from a guess to 97 % within 1.4 million tokens; without either it stood at 35 % after 2.4 million.

Where the story is free, two heads of the last layer are asked to look at what may come: at the cast before a name is
drawn, at the objects in play before one is talked about. Without it the model had recall at 95 %, and still every
third name it drew was of nobody in the story. And at the end of a sentence one head looks at how long a story was asked
for; without it a short story came out as long as any.

The result is an ordinary Llama: guidance changes the loss, never the forward pass, and fades with the learning rate.
"""

import torch
from torch import Tensor

from model.attention.dense import DenseCausalAttention
from model.attention.scores import Scores
from model.config import ModelConfig
from model.decoder import Decoder, DecoderLayer
from model.layers import MLP

Head = tuple[int, int]

# (layer, head). Two guided heads of a layer read different key/value groups: neither has to serve the other's match.
BINDING: Head = (0, 0)
HOLDER_RECALL: Head = (2, 0)
PLACE_RECALL: Head = (2, 2)
LENGTH: Head = (1, 0)
# Two heads, because the names of a whole cast, blended in the 64 numbers of one head, resemble too many strangers.
CHOICE: tuple[Head, ...] = ((3, 0), (3, 2))


NOWHERE = -1


class GuidedAttention(DenseCausalAttention):
    """Dense causal attention that also measures how well the guided heads look where they should.

    targets: for each guided head, rows of (sequence, position that looks, positions to look at), padded with NOWHERE:
    [rows, 2 + most positions]. How the weight is spread over the positions is the head's own affair. After the forward
    pass, `loss()` is the sum of each head's mean cross-entropy with its targets.
    """

    def __init__(self, batch: int, length: int, targets: dict[Head, Tensor]) -> None:
        super().__init__(batch, length)
        self.targets = targets
        self.losses: list[Tensor] = []

    def __call__(self, scores: Scores, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `DenseCausalAttention`; the output is the same, bit for bit."""
        for (guided_layer, head), rows in self.targets.items():
            if guided_layer == scores.layer and len(rows):
                self.losses.append(self._look(scores, head, q[:, head], k[:, head * k.shape[1] // q.shape[1]], rows))
        return super().__call__(scores, q, k, v)

    def _look(self, scores: Scores, head: int, q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
        """q, k: [batch * length, head_dim] of one head. Mean of -log(attention weight on the targets)."""
        assert scores.soft_cap is None, "capped scores are not guided"
        with torch.autocast(q.device.type, enabled=False):
            q, k = (x.float().unflatten(0, (self.batch, self.length)) for x in (q, k))
            sequence, source, targets = rows[:, 0], rows[:, 1], rows[:, 2:]
            if scores.energy is None:
                odds = torch.bmm(q, k.transpose(1, 2))[sequence, source] * scores.scale
            else:  # one query a row: all pairs of the head would be head_dim numbers each
                looking, keys = q[sequence, source][:, None, None], k[sequence][:, None]
                odds = scores(looking, keys, [head])[:, 0, 0]
            future = torch.arange(self.length, device=q.device) > source[:, None]
            weights = odds.masked_fill(future, float("-inf")).log_softmax(-1)
            looked = weights.gather(1, targets.clamp(min=0)).masked_fill(targets == NOWHERE, float("-inf"))
            missed: Tensor = -looked.logsumexp(1).mean()
            return missed

    def loss(self) -> Tensor:
        """The sum over the guided heads. Call once, after the forward pass."""
        return torch.stack(self.losses).sum()


@torch.no_grad()
def favour_copying(decoder: Decoder, generator: torch.Generator) -> None:
    """Turn fresh weights into a start that copies what attention finds (compare Trockman and Kolter 2023).

    The output of each key/value group's first query head starts as the transpose of the values, so what it attends to
    is copied. Values are the same in all layers: a name that one layer has copied, the next can copy on, and the tied
    head can read. What else is written into the residual stream starts small, or it would drown the words. All
    embeddings share one random vector, by which keys that match queries prefer near tokens: equal vectors turn apart as
    rotary positions part. Nothing here depends on the score function.
    """
    config = decoder.config
    std = config.hidden_size**-0.5
    decoder.init_weights(generator, std)
    decoder.embedding.add_(torch.randn(config.hidden_size, generator=generator) * std)
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    copied = torch.randn(keys, config.hidden_size, generator=generator) * std
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        assert isinstance(layer.mlp, MLP)
        layer.mlp.down.weight.mul_(0.25)
        layer.output.weight.mul_(0.25)
        _, _, v = layer.qkv.weight.split((queries, keys, keys))
        v.copy_(copied)
        for head, shared in _first_heads(config):
            layer.output.weight[:, head] = 0.25 * v[shared].T


@torch.no_grad()
def favour_matching(decoder: Decoder, generator: torch.Generator) -> None:
    """`favour_copying`, and keys that start as copies of their group's first query head: a token attends to its equals.

    For dot products: an additive score of equal vectors is no larger than another.
    """
    favour_copying(decoder, generator)
    config = decoder.config
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        q, k, _ = layer.qkv.weight.split((queries, keys, keys))
        for head, shared in _first_heads(config):
            k[shared] = q[head]


def _first_heads(config: ModelConfig) -> list[tuple[slice, slice]]:
    """For each key/value group: the rows of its first query head, and its own rows of keys or values."""
    dim = config.head_dim
    starts = [(group * config.group_size * dim, group * dim) for group in range(config.num_kv_heads)]
    return [(slice(query, query + dim), slice(key, key + dim)) for query, key in starts]
