"""Text out of tokens: exact for any Unicode, in linear time, and a stop string is never shown."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from model.errors import CheckpointError, InvalidRequest
from model.text.chat_template import ChatTemplate
from model.text.detokenize import Detokenizer
from model.text.tokenizer import Tokenizer

CORPUS = ["the fox has the lantern", "naïve café", "fox and hound", "the end"] * 3


def train_byte_level() -> FastTokenizer:
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<bos>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    fast.train_from_iterator(CORPUS, trainer)
    fast.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return fast


def build_sentencepiece() -> FastTokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581the", "\u2581fox", "s"]
    fast = FastTokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    fast.add_special_tokens(["<unk>", "<s>", "</s>"])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast


@pytest.fixture(scope="module")
def fast() -> FastTokenizer:
    return train_byte_level()


@pytest.fixture(scope="module")
def tokenizer(fast, tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("byte-level")
    fast.save(str(directory / "tokenizer.json"))
    return Tokenizer.from_directory(directory)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("sentencepiece")
    build_sentencepiece().save(str(directory / "tokenizer.json"))
    return Tokenizer.from_directory(directory)


def streamed(
    tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = (), group: int = 1
) -> tuple[str, Detokenizer]:
    detokenizer = Detokenizer(tokenizer, stop)
    text = "".join(detokenizer.feed(ids[i : i + group]) for i in range(0, len(ids), group))
    return text + detokenizer.flush(), detokenizer


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40), group=st.integers(1, 5))
def test_streaming_any_unicode_gives_it_back(tokenizer, text, group):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert streamed(tokenizer, ids, group=group)[0] == text
    assert tokenizer.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 299), max_size=30))
def test_any_tokens_at_all_decode_as_the_library_decodes_them(tokenizer, fast, ids):
    ids = [i for i in ids if i < tokenizer.vocab_size]
    assert streamed(tokenizer, ids)[0] == tokenizer.decode(ids) == fast.decode(ids)


def test_half_a_character_is_never_shown(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.feed([i]) for i in tokenizer.encode("a🦊b", add_special_tokens=False)]
    assert "".join(pieces) == "a🦊b"
    assert "\ufffd" not in "".join(pieces)
    assert len(pieces) > 3


def test_bytes_that_never_become_a_character_end_as_one_replacement(tokenizer):
    fox = tokenizer.encode("🦊", add_special_tokens=False)
    assert streamed(tokenizer, fox[:-1])[0] == "\ufffd"


def test_special_tokens_are_not_text(tokenizer):
    assert tokenizer.encode("fox")[0] == 0
    assert tokenizer.decode([0, *tokenizer.encode("fox", add_special_tokens=False), 1]) == "fox"


def test_byte_fallback_tokens_join_to_characters(sentencepiece):
    ids = [259, *(3 + byte for byte in "é🦊".encode()), 260, 261]
    assert sentencepiece.decode(ids) == " theé🦊 foxs"
    assert streamed(sentencepiece, ids)[0] == " theé🦊 foxs"


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="abc é🦊", max_size=30),
    stop=st.lists(st.text(alphabet="abc é🦊", min_size=1, max_size=4), max_size=3),
    group=st.integers(1, 4),
)
def test_text_ends_before_the_first_stop_string_wherever_tokens_divide_it(tokenizer, text, stop, group):
    shown, detokenizer = streamed(tokenizer, tokenizer.encode(text, add_special_tokens=False), tuple(stop), group)
    found = [text.index(s) for s in stop if s in text]
    # Two stop strings can overlap: the one that is complete first decides, as it would for a reader of the stream.
    first_complete = min(((text.index(s) + len(s), text.index(s)) for s in stop if s in text), default=None)
    assert detokenizer.stopped == bool(found)
    if not found:
        assert shown == text
    else:
        assert shown in {text[:start] for start in found}
        assert len(shown) <= first_complete[1]
        assert not any(s in shown for s in stop)


def test_nothing_that_may_become_a_stop_string_is_shown_early(tokenizer):
    detokenizer = Detokenizer(tokenizer, ["the end"])
    shown = detokenizer.feed(tokenizer.encode("fox the e", add_special_tokens=False))
    assert shown == "fox "
    assert detokenizer.feed(tokenizer.encode("ar", add_special_tokens=False)) == "the ear"


def test_tokens_behind_a_stop_string_are_not_counted(tokenizer):
    ids = tokenizer.encode("a.b", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, ["."])
    assert detokenizer.feed(ids) == "a"
    assert (detokenizer.num_tokens, len(ids)) == (2, 3)


def test_what_is_held_back_stays_short_so_the_cost_of_a_token_does_not_grow(tokenizer):
    broken = tokenizer.encode("🦊", add_special_tokens=False)[0]
    detokenizer = Detokenizer(tokenizer, ["\ufffd\ufffdx", "the end"])
    for _ in range(2000):
        detokenizer.feed([broken])
        assert len(detokenizer._held) < len("the end")


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "missing"), ("{", "not a usable tokenizer"), ('{"model": {}}', "not a usable tokenizer")],
)
def test_a_broken_tokenizer_is_named(tmp_path, content, words):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json: {words}"):
        Tokenizer.from_directory(tmp_path)


def test_a_decoder_that_we_cannot_stream_is_refused(tmp_path, fast):
    raw = json.loads(fast.to_str()) | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="neither byte-level nor SentencePiece-style"):
        Tokenizer.from_directory(tmp_path)


MESSAGES = [{"role": "user", "content": "Hi"}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


def test_a_chat_is_rendered_with_the_special_tokens_of_the_checkpoint(tmp_path):
    config = {"bos_token": {"content": "<s>"}, "chat_template": [{"name": "default", "template": TEMPLATE}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.from_directory(tmp_path)
    assert template.render(MESSAGES) == "<s>[user]Hi>"
    (tmp_path / "chat_template.jinja").write_text("{{ messages | length }}")
    assert ChatTemplate.from_directory(tmp_path).render(MESSAGES) == "1"


def test_a_checkpoint_without_a_template_has_none(tmp_path):
    assert ChatTemplate.from_directory(tmp_path) is None


def test_a_template_that_does_not_compile_is_refused_at_the_start(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(CheckpointError, match="chat template"):
        ChatTemplate.from_directory(tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_a_template_that_fails_or_reaches_out_refuses_the_messages(source):
    with pytest.raises(InvalidRequest) as refusal:
        ChatTemplate(source, {}).render(MESSAGES)
    assert refusal.value.param == "messages"
