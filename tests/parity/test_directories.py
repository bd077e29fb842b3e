"""The same model in every form in which directories are published: shards, dtypes, older names and older spellings."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from model.attention.dense import DenseCausalAttention
from model.checkpoint import inspect_checkpoint, load_checkpoint
from model.engine.engine import Engine
from model.engine.request import Request
from model.sampling.params import SamplingParams
from model.text.chat_template import ChatTemplate
from tests.parity.conftest import SMALL, TOLERANCE, Pair, pair_of, prompt_of, run, tokens
from tests.parity.models import CASES, FAMILIES, build, write

PROMPT = prompt_of(29)


def assert_same(pair):
    """The logits of a prompt, as both sides compute them."""
    with torch.inference_mode():
        hidden = pair.ours(torch.tensor(PROMPT), torch.arange(len(PROMPT)), DenseCausalAttention(1, len(PROMPT)))
        torch.testing.assert_close(pair.ours.logits(hidden), pair.logits(PROMPT), atol=TOLERANCE, rtol=0)


def edit_weights(directory, edit):
    file = directory / "model.safetensors"
    save_file(edit(load_file(file)), file)


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_are_read_like_one_file(tmp_path, family):
    theirs = build(family)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_same(Pair(tmp_path, theirs, load_checkpoint(tmp_path)))


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, torch.bfloat16) for family in FAMILIES), ("llama", torch.float16)]
)
def test_half_precision_on_disk_is_computed_in_full(tmp_path, family, dtype):
    build(family).to(dtype).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    header = read_header(tmp_path / "model.safetensors")
    assert {entry["dtype"] for entry in header.values()} == {{torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]}
    pair = Pair(tmp_path, theirs, load_checkpoint(tmp_path))
    assert {parameter.dtype for parameter in pair.ours.parameters()} == {torch.float32}
    assert_same(pair)


def read_header(file):
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


@pytest.mark.parametrize("case", ["llama, tied", "qwen3, tied", "gemma2", "gpt2"])
def test_a_tied_head_that_is_written_a_second_time_is_read_once(tmp_path, case):
    theirs = write(case, tmp_path)
    head = {"lm_head.weight": theirs.get_output_embeddings().weight.clone()}
    assert "lm_head.weight" not in read_header(tmp_path / "model.safetensors")
    edit_weights(tmp_path, lambda tensors: tensors | head)
    assert_same(Pair(tmp_path, theirs, load_checkpoint(tmp_path)))


@pytest.mark.parametrize("case", ["gpt2", "gpt2, untied"])
def test_gpt2_as_it_was_first_published_has_no_prefix_and_holds_its_masks(tmp_path, case):
    theirs = write(case, tmp_path)
    masks = {
        f"h.{layer}.attn.{name}": mask
        for layer in range(4)
        for name, mask in (("bias", torch.ones(1, 1, 256, 256).tril()), ("masked_bias", torch.tensor(-1e4)))
    }
    edit_weights(tmp_path, lambda held: {name.removeprefix("transformer."): t for name, t in held.items()} | masks)
    assert_same(Pair(tmp_path, theirs, load_checkpoint(tmp_path)))


def test_rotary_frequencies_that_old_exporters_wrote_are_passed_over(tmp_path):
    theirs = write("llama", tmp_path)
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(4)}
    edit_weights(tmp_path, lambda tensors: tensors | frequencies)
    assert_same(Pair(tmp_path, theirs, load_checkpoint(tmp_path)))


def to_older_spelling(raw):
    """A config as the hub has it from before transformers 5."""
    old = {name: value for name, value in raw.items() if name not in ("rope_parameters", "dtype")}
    old["torch_dtype"] = raw["dtype"]
    rope = raw.get("rope_parameters") or {}
    if "full_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if rope:
        scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
        old["rope_theta"] = rope["rope_theta"]
        old["rope_scaling"] = None if scaling == {"rope_type": "default"} else scaling
        if "partial_rotary_factor" in rope:
            old["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return old


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("gpt2")])
def test_the_older_spelling_of_a_config_means_the_same(tmp_path, case):
    build(case).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    new, old = inspect_checkpoint(tmp_path).config, to_older_spelling(json.loads(file.read_text()))
    assert "rope_parameters" not in old
    file.write_text(json.dumps(old))
    assert inspect_checkpoint(tmp_path).config == new
    if (old["rope_scaling"] or {}).get("rope_type"):
        old["rope_scaling"]["type"] = old["rope_scaling"].pop("rope_type")
        file.write_text(json.dumps(old))
        assert inspect_checkpoint(tmp_path).config == new


@pytest.mark.parametrize(
    "case", ["qwen2, window on upper layers", "qwen3", "gemma2", "gemma3", "gemma3, every third layer global",
             "smollm3", "smollm3, window where there is no rope"],
)  # fmt: skip
def test_layer_types_that_are_not_written_follow_the_rule_of_the_family(tmp_path, case):
    build(case).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    written, raw = inspect_checkpoint(tmp_path).config, json.loads(file.read_text())
    del raw["layer_types"]
    if case == "gemma3, every third layer global":
        raw["sliding_window_pattern"] = 3
    file.write_text(json.dumps(raw))
    assert inspect_checkpoint(tmp_path).config == written


def test_each_of_several_end_of_sequence_tokens_ends_a_completion_as_generate_does(tmp_path):
    pair = pair_of("llama", tmp_path)
    written = pair.greedy(PROMPT)
    later, sooner = written[40], written[25]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [later, sooner], "bos_token_id": 1}))
    engine = Engine(load_checkpoint(tmp_path), SMALL)
    request = Request("ends", PROMPT, SamplingParams(max_tokens=64, temperature=0.0))
    outputs = run(engine, [request])["ends"]
    stop = min(written.index(later), written.index(sooner)) + 1
    assert tokens(outputs) == written[:stop]
    assert outputs[-1].finish_reason == "stop"


CHATML = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {% if loop.first and message['role'] != 'system' %}\n"
    "        {{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}\n"
    "    {% endif %}\n"
    "    {{ '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_template_in_either_place_renders_as_theirs_does(tmp_path, place):
    fast = FastTokenizer(models.WordLevel({"<s>": 0, "a": 1}, unk_token="a"))
    theirs = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>")
    theirs.chat_template = CHATML
    theirs.save_pretrained(tmp_path, save_jinja_files=place.endswith("jinja"))
    assert (tmp_path / "chat_template.jinja").exists() == place.endswith("jinja")
    messages = [{"role": "user", "content": " naïve 🦊 "}, {"role": "assistant", "content": "<b>"}]
    ours = ChatTemplate.from_directory(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    for prompt in (True, False):
        expected = reloaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert ours.render(messages, add_generation_prompt=prompt) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{% if m.role == 'assistant' %}{%- generation -%} {{ m.content }} {%- endgeneration -%}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}",
        "{{ messages | tojson }}{{ messages[0] | tojson(indent=2, ensure_ascii=True) }}{{ '<&>' | tojson }}",
        "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.content | upper }}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n}}{{ tools }}",
    ],
)
def test_what_transformers_adds_to_jinja_renders_as_theirs_does(source):
    fast = FastTokenizer(models.WordLevel({"<s>": 0, "a": 1}, unk_token="a"))
    theirs = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", chat_template=source)
    messages = [{"role": "user", "content": "naïve <b>"}, {"role": "assistant", "content": "🦊\n"}]
    template = ChatTemplate(source, {"bos_token": "<s>"})
    assert template.render(messages) == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    template.close()
