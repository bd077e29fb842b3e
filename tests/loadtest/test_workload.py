"""Workloads are data: from a seed and an index any worker makes the same conversation, of the lengths asked for."""

import random
import statistics
import tomllib
from collections import Counter

import pytest

from loadtest.workload import SHIPPED, Length, WorkloadError, Workloads

pytestmark = pytest.mark.fast

NAMES = list(tomllib.loads(SHIPPED.read_text()))


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_workload_makes_the_same_conversation_again_and_another_for_another_index(name):
    one, again = (Workloads(name, seed=1).conversation(7) for _ in range(2))
    assert one == again
    assert one.turns != Workloads(name, seed=1).conversation(8).turns
    assert one.turns != Workloads(name, seed=2).conversation(7).turns


@pytest.mark.parametrize("name", NAMES)
def test_the_longest_shipped_conversation_fits_a_context_of_1024_tokens(name):
    workloads = Workloads(name, seed=0)
    for index in range(300):
        turns = workloads.conversation(index).turns
        assert sum(len(turn.text.split()) + turn.max_tokens for turn in turns) < 1000


def test_log_normal_lengths_have_their_median_and_their_longest():
    generator = random.Random(0)
    drawn = [Length(60, sigma=0.9, longest=500).draw(generator) for _ in range(20_000)]
    assert statistics.median(drawn) == pytest.approx(60, rel=0.03)
    assert statistics.quantiles(drawn, n=100)[15] == pytest.approx(60 * 2.718**-0.9, rel=0.05)
    assert max(drawn) == 500


def test_words_are_counted_in_the_tokens_of_the_server():
    assert len(Workloads("fixed", seed=0, tokens_per_word=2.0).conversation(0).turns[0].text.split()) == 64


def test_shared_prefixes_are_as_many_and_as_long_as_the_data_says():
    texts = [Workloads("shared-prefix", seed=0).conversation(index).turns[0].text.split() for index in range(200)]
    assert len({tuple(text[:400]) for text in texts}) == 8
    assert len({tuple(text[400:]) for text in texts}) == 200
    assert {len(text) for text in texts} == {440}


def test_a_mix_keeps_its_weights():
    kinds = Counter(Workloads("mixed", seed=0).conversation(index).workload.name for index in range(3000))
    assert kinds["chat"] / 3000 == pytest.approx(6 / 15, abs=0.03)
    assert kinds["slow"] / 3000 == pytest.approx(1 / 15, abs=0.03)


def test_a_conversation_sends_its_whole_past_with_each_turn():
    conversation = Workloads("multi-turn", seed=0).conversation(0)
    texts = [turn.text for turn in conversation.turns]
    body = conversation.request(2, ["one", "two"])
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user", "assistant", "user"]
    assert [message["content"] for message in body["messages"]] == [texts[0], "one", texts[1], "two", texts[2]]
    assert conversation.path == "/v1/chat/completions"
    assert conversation.turns[0].think_seconds == 0 < conversation.turns[1].think_seconds


def test_a_request_asks_for_a_stream_that_counts_its_tokens():
    conversation = Workloads("interactive", seed=0).conversation(0)
    body = conversation.request(0, [])
    assert body["prompt"] == conversation.turns[0].text
    assert body["stream_options"] == {"include_usage": True}
    assert (body["stream"], body["max_tokens"], body["priority"]) == (True, 64, 0)


def test_the_lengths_of_a_trace_and_of_the_command_line_stand_before_those_of_the_workload():
    traced = Workloads("story", seed=0).conversation(0, input_tokens=30, output_tokens=7)
    assert (len(traced.turns[0].text.split()), traced.turns[0].max_tokens) == (30, 7)
    assert Workloads("fixed", seed=0, max_tokens=5).conversation(0).turns[0].max_tokens == 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[other]\ninput = 1\noutput = 1", "has no workload 'mine': other"),
        ("[mine]\ninput = 1", "needs output"),
        ("[mine]\ninput = 1\nprompt = 'a'\noutput = 1", "either input or prompt"),
        ("[mine]\ninput = 1\noutput = 1\nspeed = 3", "mine has speed"),
        ("[mine]\ninput = { mean = 3 }\noutput = 1", "mean"),
        ("[mine]\nmix = { other = 1 }", "mixes other"),
    ],
)
def test_a_workload_that_cannot_be_is_refused_in_words(tmp_path, text, words):
    (tmp_path / "my.toml").write_text(text)
    with pytest.raises(WorkloadError, match=words):
        Workloads(f"{tmp_path / 'my.toml'}:mine", seed=0)
