import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.bench import __main__ as command
from model.bench import ratios, roofline, shapes
from model.bench.contenders import Contender
from model.bench.engine import measure_round
from model.bench.rounds import Answer, Ask
from model.bench.workers.llama_cpp import read_answer
from model.checkpoint import inspect_checkpoint
from model.config import CacheDtype, EngineConfig, ModelConfig
from model.engine.engine import Engine

pytestmark = pytest.mark.fast

SMOLLM2 = ModelConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3,
    head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip
ENGINES = (
    Contender("attendant int8", "attendant", "int8"),
    Contender("attendant bf16", "attendant", "bf16"),
    Contender("quick int8", "quick", "int8"),
    Contender("slow bf16", "slow", "bf16"),
)
LINEAR = 134_479_872  # the published 134,515,008 parameters less 61 norms of 576


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    shape = shapes.SHAPES["storyteller"] | {"vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 2}
    shapes.write_random(shape, tmp_path)
    return tmp_path


def test_decode_counts_only_what_came_while_the_whole_batch_was_decoding():
    arrivals = [[1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0]]
    answer = Answer.of(0.5, arrivals)
    assert answer == Answer(seconds=4.5, prefill_seconds=1.5, decode_seconds=2.0, decode_tokens=4)
    assert answer.decode_rate() == 2.0
    ask = Ask(batch=2, prompt_tokens=6, output_tokens=4, seed=0)
    assert answer.prefill_rate(ask) == 8.0
    assert answer.rate(ask) == pytest.approx(8 / 4.5)


def test_a_round_of_single_tokens_has_no_decode_rate():
    answer = Answer.of(0.0, [[1.0], [1.0]])
    assert (answer.decode_tokens, answer.decode_seconds) == (0, 0.0)
    assert answer.decode_rate() != answer.decode_rate()  # NaN: not a zero that looks like a result


def test_every_engine_is_asked_the_same_and_each_seed_something_else():
    ask = Ask(batch=2, prompt_tokens=5, output_tokens=1, seed=3)
    assert ask.prompts(100) == ask.prompts(100)
    assert ask.prompts(100) != Ask(2, 5, 1, seed=4).prompts(100)
    assert [len(prompt) for prompt in ask.prompts(100)] == [5, 5]


def test_no_round_finds_a_prompt_of_an_earlier_one_in_the_prefix_cache(tiny: Path):
    engine = Engine.from_checkpoint(tiny, EngineConfig(dtype="fp32", kv_cache_tokens=1024))
    for ask in (Ask(1, 33, 1, 1), Ask(2, 33, 1, 1), Ask(2, 33, 1, 2), Ask(2, 49, 1, 1)):
        measure_round(engine, ask)
    assert engine.scheduler.prefix.hit_tokens == 0


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("bf16", 2), ("int8", 1)])
def test_a_decode_step_reads_every_weight_once_and_the_cache_of_every_request(dtype: str, size: int):
    alone = roofline.decode_work(SMOLLM2, dtype, batch=1, context=0)
    assert alone.read_bytes == size * LINEAR
    assert alone.linear == 2 * LINEAR
    cache = roofline.decode_work(SMOLLM2, dtype, batch=8, context=100).read_bytes - alone.read_bytes
    assert cache == 8 * 100 * 30 * 2 * 3 * 64 * (4 if dtype == "fp32" else 2)


def test_a_number_of_an_int8_cache_takes_a_byte_and_its_part_of_a_scale():
    def cache(kind: CacheDtype) -> float:
        return roofline.decode_work(SMOLLM2, "int8", batch=8, context=100, cache=kind).read_bytes - LINEAR

    assert cache("int8") == 8 * 100 * 30 * 2 * 3 * (64 + 2)
    assert cache("fp8") == 8 * 100 * 30 * 2 * 3 * 64
    assert cache("auto") == 8 * 100 * 30 * 2 * 3 * 64 * 2


def test_prefill_puts_only_one_row_a_prompt_through_the_head():
    work = roofline.prefill_work(SMOLLM2, "bf16", batch=2, length=512)
    head = 49152 * 576
    assert work.linear == 2 * 2 * (512 * (LINEAR - head) + head)
    assert work.attention == 2 * 4 * 30 * 9 * 64 * sum(range(1, 513))


def test_a_window_bounds_what_its_layers_read():
    windowed = replace(SMOLLM2, sliding_window=50, full_attention_layers=(0, 1))
    assert roofline.attended(windowed, 100) == 2 * 100 + 28 * 50
    assert roofline.attended(windowed, 20) == 30 * 20


def test_of_experts_only_those_that_a_token_is_sent_to_count():
    sparse = replace(
        SMOLLM2, num_experts=8, num_experts_per_token=2, expert_intermediate_size=100, dense_layers=tuple(range(29))
    )
    dense_mlp, experts = 3 * 576 * 1536, 576 * (8 + 2 * 3 * 100)
    assert roofline.layer_weights(sparse) == roofline.layer_weights(SMOLLM2) - dense_mlp + experts


def test_the_roofline_is_the_slower_of_reading_and_computing():
    machine = roofline.Machine(bandwidth=100.0, rates={"int8": 50.0, "bf16": 10.0})
    assert roofline.Work(read_bytes=300.0, linear=50.0, attention=5.0).seconds(machine, "int8") == 3.0
    assert roofline.Work(read_bytes=100.0, linear=50.0, attention=20.0).seconds(machine, "int8") == 3.0


def test_of_two_measurements_of_a_machine_the_best_of_each_number_counts():
    early, late = roofline.Machine(3.0, {"int8": 1.0, "bf16": 7.0}), roofline.Machine(2.0, {"int8": 5.0, "bf16": 6.0})
    assert early.or_better(late) == late.or_better(early) == roofline.Machine(3.0, {"int8": 5.0, "bf16": 7.0})


def test_a_shape_is_written_as_a_directory_that_we_and_transformers_load(tiny: Path):
    assert inspect_checkpoint(tiny).config.vocab_size == 400
    theirs = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    ids = torch.tensor([[5, 300, 7]])
    engine = Engine.from_checkpoint(tiny, EngineConfig(dtype="fp32", kv_cache_tokens=64))
    asked = Ask(batch=1, prompt_tokens=3, output_tokens=2, seed=0)
    assert measure_round(engine, asked).decode_tokens == 1
    assert theirs(ids).logits.shape == (1, 3, 400)


@pytest.mark.parametrize("name", sorted(shapes.SHAPES))
def test_every_shape_is_one_that_we_load(name: str, tmp_path: Path):
    small = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    shapes.write_random(shapes.SHAPES[name] | small, tmp_path)
    assert inspect_checkpoint(tmp_path).config.num_heads == shapes.SHAPES[name]["num_attention_heads"]


def test_the_tokenizer_of_a_shape_has_exactly_its_vocabulary_and_reads_what_it_writes(tiny: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert len(tokenizer) == 400
    text = tokenizer.decode([300, 301, 399])
    assert text.isascii()
    assert tokenizer.decode(tokenizer.encode("Once, there wäs.")) == "Once, there wäs."


@pytest.mark.parametrize("name", ["storyteller", "smollm2-135m", "llama-8b"])
def test_the_tensors_of_a_shape_are_those_that_its_roofline_counts(name: str):
    shape = shapes.SHAPES[name]
    model = ModelConfig(
        vocab_size=shape["vocab_size"], hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"], num_layers=shape["num_hidden_layers"],
        num_heads=shape["num_attention_heads"], num_kv_heads=shape["num_key_value_heads"],
        head_dim=shape["head_dim"], max_position_embeddings=1024,
    )  # fmt: skip
    matrices = [sizes for _, sizes in shapes.tensors(shape) if len(sizes) == 2]
    looked_up = 0 if shape["tie_word_embeddings"] else model.vocab_size * model.hidden_size
    counted = roofline.layer_weights(model) + roofline.head_weights(model)
    assert sum(rows * columns for rows, columns in matrices) - looked_up == counted


@pytest.fixture
def still_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = roofline.Machine(bandwidth=1e10, rates={"fp32": 1e11, "bf16": 1e11, "int8": 1e11})
    monkeypatch.setattr(roofline, "measure_machine", lambda: machine)


@pytest.mark.usefixtures("still_machine")
def test_the_engine_benchmark_writes_medians_rounds_and_the_machine(tiny: Path, capsys: pytest.CaptureFixture[str]):
    file = tiny / "out" / "engine.json"
    options = ["--model", str(tiny), "--dtype", "fp32", "--batch", "1", "2", "--context", "4", "8", "--output", "4"]
    command.main(["engine", *options, "--rounds", "2", "--json", str(file)])
    written = json.loads(file.read_text())
    assert [(row["batch"], row["context"]) for row in written["rows"]] == [(1, 4), (1, 8), (2, 4), (2, 8)]
    assert all(len(row["rounds"]) == 2 for row in written["rows"])
    assert written["roofline"]["bandwidth"] == 1e10
    assert written["machine"]["torch"] == torch.__version__
    assert "batch 2: decode at context 8 keeps" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["steps", "prefix"])
def test_the_older_benchmarks_take_the_same_options_as_ever(name: str, tiny: Path):
    file = tiny / f"{name}.json"
    options = ["--dtype", "int8", "--context", "12", "--steps", "2", "--threads", "1", "--json", str(file)]
    command.main([name, *options, "--model", str(tiny), *(["--batch", "2"] if name == "steps" else [])])
    assert json.loads(file.read_text())["rows"]


def test_a_model_with_weights_is_not_called_random(tiny: Path):
    with pytest.raises(SystemExit, match="weights of its own"):
        command.main(["prefix", "--model", str(tiny), "--random-weights"])


def test_the_result_of_llama_cpp_is_found_among_what_it_prints():
    row = {"pp": 64, "tg": 63, "pl": 8, "t_pp": 0.5, "t_tg": 2.0, "t": 2.5}
    assert read_answer(f"loading\n\n{json.dumps(row)}\n") == Answer(2.5, 0.5, 2.0, 504)
    with pytest.raises(ValueError, match="no result"):
        read_answer("loading\n")


def test_a_ratio_is_the_median_of_ratios_within_rounds():
    # The machine was twice as slow in the second round, for both.
    assert ratios.ratio([100.0, 50.0, 90.0], [50.0, 25.0, 30.0]) == 2.0
    assert ratios.ratio([100.0, math.nan, 90.0], [50.0, 25.0, 30.0]) == 2.5
    assert math.isnan(ratios.ratio([math.nan], [1.0]))


def test_the_median_leaves_out_rounds_that_failed():
    assert ratios.median([3.0, math.nan, 1.0]) == 2.0
    assert math.isnan(ratios.median([math.nan]))


def test_the_best_peer_is_the_one_with_the_highest_median_and_never_ours():
    rates = {"attendant int8": [100.0], "attendant bf16": [80.0], "quick int8": [50.0], "slow bf16": [40.0]}
    any_kind, over_transformers, over_bf16 = ratios.COMPARISONS
    assert ratios.compare(any_kind, rates, ENGINES) == (2.0, "quick int8")
    assert ratios.compare(over_bf16, rates, ENGINES) == (2.0, "slow bf16")
    assert ratios.compare(over_transformers, rates, ENGINES) is None
    assert ratios.compare(any_kind, {"quick int8": [50.0]}, ENGINES) is None


def test_the_table_names_who_is_not_installed_and_shows_the_part_of_the_roofline():
    rates = {"attendant int8": [1200.0, 1000.0, 1100.0], "quick int8": [500.0, 550.0, math.nan]}
    rates |= {"attendant bf16": [math.nan] * 3}
    ceilings = {"batch 1": {"int8": 2000.0, "bf16": 1000.0}}
    drawn = ratios.table("decode", {"batch 1": rates}, ceilings, ENGINES, {"slow bf16": "not installed: slow"})
    assert drawn.splitlines() == [
        "| decode | batch 1 |",
        "|---|---|",
        "| attendant int8 | 1,100 (55%) |",
        "| attendant bf16 | failed |",
        "| quick int8 | 525 (26%) |",
        "| slow bf16 | not installed: slow |",
        "| attendant int8 over the best peer of any kind | **2.11** (quick int8) |",
        "| attendant int8 over transformers bf16 | - |",
        "| attendant bf16 over the best bf16 peer | - |",
    ]
