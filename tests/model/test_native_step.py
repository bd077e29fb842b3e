"""The native CPU step against the torch decoder, and against itself: not a bit depends on batch, chunks or threads."""

import itertools
import os
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model.config import EngineConfig, ModelConfig, RopeConfig
from model.decoder import Decoder
from model.engine.engine import Engine
from model.engine.forward import NativeForward, TorchForward
from model.engine.memory import for_serving
from model.engine.request import Request
from model.errors import ConfigError, StepError
from model.kernels.cpu import library
from model.kernels.cpu.build import NoLibrary
from model.sampling.params import SamplingParams
from tests.model.native_scene import Scene, tiny
from tests.model.test_engine import run

LOCAL = RopeConfig(theta=1000.0)
SHAPES: dict[str, ModelConfig] = {
    "llama": tiny(),
    "one kv head, odd sizes": tiny(
        num_heads=3, num_kv_heads=1, head_dim=10, hidden_size=50, intermediate_size=77, vocab_size=101
    ),
    "26 heads on one": tiny(num_heads=26, num_kv_heads=1, head_dim=24),
    "wide heads": tiny(head_dim=80, num_layers=1),
    "norms after the blocks, qk norm over all": tiny(norm_placement="post", qk_norm="projection"),
    "norms on both sides, caps, windows on some layers": tiny(
        norm_placement="both", qk_norm="head", sliding_window=21, full_attention_layers=(1,), local_rope=LOCAL,
        attention_soft_cap=5.0, logit_soft_cap=3.0, attention_scale=0.3, embedding_scale=8.0, activation="gelu_tanh",
    ),
    "layer norms, learned positions, plain MLP, biases": tiny(
        norm="layer", learned_positions=True, rope=None, gated_mlp=False, activation="gelu", qkv_bias=True,
        output_bias=True, mlp_bias=True, tie_word_embeddings=True,
    ),
    "part of a head turns, one layer without": tiny(rope=RopeConfig(rotary_dim=6), layers_without_rope=(1,)),
    "window with sink tokens": tiny(sliding_window=70, num_sink_tokens=3),
    "sink logits": tiny(sliding_window=33, sink_logits=True, full_attention_layers=(0,)),
    "multiplicative, folded": tiny(attention="multiplicative"),
    "all experts of each token": tiny(
        num_experts=3, num_experts_per_token=3, expert_intermediate_size=40, normalize_expert_weights=False
    ),
    "experts, one layer dense": tiny(
        num_experts=5, num_experts_per_token=2, expert_intermediate_size=40, dense_layers=(1,), qk_norm="head"
    ),
    "one expert of each token, norms on both sides": tiny(
        num_experts=3, num_experts_per_token=1, expert_intermediate_size=70, normalize_expert_weights=False,
        norm_placement="both",
    ),
    "yarn": tiny(rope=RopeConfig(scaling="yarn", factor=4.0, original_length=64, attention_factor=1.1)),
}  # fmt: skip


@pytest.fixture(params=["int8", "bf16", "bf16 on an int8 cache"])
def numbers(request) -> dict[str, object]:
    """What a scene's weights and its cache are kept in."""
    dtype, _, cache = request.param.partition(" on ")
    return {"dtype": dtype, "cache": torch.int8 if cache else torch.bfloat16}


@pytest.mark.parametrize("name", SHAPES)
def test_logits_agree_with_torch_in_prefill_chunks_and_mixed_steps(name, numbers):
    scene = Scene(SHAPES[name], **numbers)
    long, short = scene.add(400), scene.add(12)
    for work in (
        [(long, 0, 290)],
        [(long, 290, 398)],
        [(long, 398, 399), (short, 0, 11)],
        [(long, 399, 400), (short, 11, 12)],
    ):
        logits, expected = scene.run(*work), scene.expected(*work)
        similar = F.cosine_similarity(logits, expected)
        if scene.step.config.num_experts > scene.step.config.num_experts_per_token:
            # Rounding sends a token whose experts are nearly tied elsewhere, and those that see it take notice.
            kept = similar >= similar.quantile(0.2)
            logits, expected, similar = logits[kept], expected[kept], similar[kept]
        least, most = {"int8": (0.985, 0.06), "bf16": (0.9995, 0.015)}[numbers["dtype"]]
        assert similar.min() > least
        assert (logits - expected).abs().mean() / expected.std() < most


@pytest.mark.parametrize("block_size", [4, 8, 16, 32, 48])
def test_blocks_may_be_smaller_and_larger_than_a_group_of_keys(block_size, numbers):
    scene = Scene(tiny(num_layers=1), **numbers, block_size=block_size)
    sequence = scene.add(90)
    for work in ((sequence, 0, 70), (sequence, 70, 90)):
        logits, expected = scene.run(work), scene.expected(work)
        assert F.cosine_similarity(logits, expected).min() > 0.99


def test_a_block_of_bf16_may_hold_two_tokens():
    scene = Scene(tiny(num_layers=1), "bf16", block_size=2)
    sequence = scene.add(90)
    for work in ((sequence, 0, 70), (sequence, 70, 90)):
        assert F.cosine_similarity(scene.run(work), scene.expected(work)).min() > 0.99


def whole(scene: Scene, length: int) -> torch.Tensor:
    return scene.run((scene.add(length), 0, length))


@pytest.mark.parametrize("name", SHAPES)
def test_prefill_chunks_and_decode_give_the_same_bits(name, numbers):
    scene = Scene(SHAPES[name], **numbers)
    expected = whole(scene, 300)
    parts = [0, 1, 2, 66, 67, 200, 255, 256, 257, 299, 300]
    steps = [scene.run((0, start, stop)) for start, stop in itertools.pairwise(parts)]
    assert torch.equal(torch.cat(steps), expected)


def test_a_context_that_is_split_over_the_threads_gives_the_same_bits(numbers):
    scene = Scene(tiny(), **numbers)
    sequence = scene.add(800)
    scene.run((sequence, 0, 500))
    together = scene.run((sequence, 500, 800))
    for position in (600, 767, 768, 799):  # of three and four splits
        assert torch.equal(scene.run((sequence, position, position + 1))[0], together[position - 500])


@pytest.mark.parametrize("name", SHAPES)
def test_a_sequence_gives_the_same_bits_in_any_company(name, numbers):
    scene = Scene(SHAPES[name], **numbers)
    alone = whole(scene, 270)
    others = [scene.add(length) for length in (1, 13, 40, 129, 64)]
    scene.run(*((i, 0, len(scene.token_ids[i]) - 1) for i in others if len(scene.token_ids[i]) > 1))
    decodes = [(i, len(scene.token_ids[i]) - 1, len(scene.token_ids[i])) for i in others]
    mixed = scene.run(*decodes, (0, 100, 269))
    assert torch.equal(mixed[len(others) :], alone[100:269])
    together = scene.run(*decodes, (0, 269, 270))
    assert torch.equal(together[-1:], alone[269:])


@pytest.mark.parametrize("name", SHAPES)
def test_one_thread_and_three_give_the_same_bits(name, numbers):
    results = []
    for num_threads in (1, 3):
        scene = Scene(SHAPES[name], **numbers, num_threads=num_threads)
        prefill = whole(scene, 299)
        scene.token_ids[0] = torch.cat([scene.token_ids[0], torch.tensor([7])])
        results.append(torch.cat([prefill, scene.run((0, 299, 300))]))
    assert torch.equal(*results)


def test_hundreds_of_steps_on_more_threads_than_cores_give_the_same_bits():
    """Threads that lose their core come back into a phase or a step that is over: they must find nothing to do."""
    shape = SHAPES["experts, one layer dense"]
    few, many = Scene(shape, "int8", num_threads=1), Scene(shape, "int8", num_threads=7)
    for scene in (few, many):
        sequence = scene.add(400)
    for position in range(400):
        work = (sequence, position, position + 1)
        assert torch.equal(many.run(work), few.run(work))


@pytest.mark.parametrize("name", SHAPES)
def test_a_step_in_parts_gives_the_same_bits(name, numbers):
    """Eight threads take the decodes in two parts and the prompts in 16; of few heads each splits its contexts."""
    results = []
    for num_threads in (1, 8):
        scene = Scene(SHAPES[name], **numbers, num_threads=num_threads, max_tokens=2048)
        lengths = [300, *range(20, 40), 299]
        steps = [[(0, length - 6) for length in lengths]]
        steps += [[(stop + i, stop + i + 1) for _, stop in steps[0]] for i in range(3)]
        steps += [[(stop + 3, stop + 5) for _, stop in steps[0]]]
        sequences = [scene.add(length) for length in lengths]
        seen = []
        for step in steps:
            *batch, samples = scene.batch([(i, *work) for i, work in zip(sequences, step, strict=True)])
            queries = scene.step.empty_queries(len(samples[::2]))
            stepped = scene.step.forward(*batch, samples[::2], queries)
            seen += [stepped.hidden.clone(), stepped.logits.clone(), stepped.likeliest.clone(), queries]
        results.append(seen)
    assert all(torch.equal(alone, in_parts) for alone, in_parts in zip(*results, strict=True))


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_a_long_prompt_in_parts_gives_the_same_bits(num_threads, numbers):
    """A part attends to the rows of those before it, which other threads store at the same time."""
    few = Scene(tiny(), **numbers, num_threads=1)
    sequence = few.add(900)
    starts = [*range(0, 900, 64), 900]
    expected = torch.cat([few.run((sequence, *work)) for work in itertools.pairwise(starts)])
    scene = Scene(tiny(), **numbers, num_threads=num_threads, max_tokens=1024)
    sequence, other = scene.add(900), scene.add(40)
    for _ in range(5):
        together = scene.run((other, 0, 37), (sequence, 0, 900))
        assert torch.equal(together[37:], expected)


def test_hundreds_of_steps_in_parts_on_more_threads_than_cores_give_the_same_bits():
    few, many = Scene(tiny(), "int8", num_threads=1), Scene(tiny(), "int8", num_threads=6)
    for scene in (few, many):
        sequences = [scene.add(64) for _ in range(24)]
    for _ in range(4):
        for position in range(64):
            work = [(sequence, position, position + 1) for sequence in sequences]
            assert torch.equal(many.run(*work), few.run(*work))


@pytest.mark.parametrize("instruction_set", library.INSTRUCTION_SETS)
def test_every_instruction_set_computes_the_step(instruction_set, numbers):
    if instruction_set not in library.load().instruction_sets:
        pytest.skip("this machine lacks it")
    logits = whole(Scene(tiny(), **numbers, instruction_set=instruction_set), 80)
    plain = whole(Scene(tiny(), **numbers, instruction_set="portable"), 80)
    assert F.cosine_similarity(logits, plain).min() > 0.9995


def test_avx512_and_avx2_give_the_same_bits():
    if "avx512" not in library.load().instruction_sets:
        pytest.skip("this machine lacks it")
    for kind, cache in itertools.product(("int8", "bf16"), (torch.bfloat16, torch.int8)):
        best = whole(Scene(tiny(), kind, cache=cache, instruction_set="avx512"), 300)
        assert torch.equal(whole(Scene(tiny(), kind, cache=cache, instruction_set="avx2"), 300), best)


@pytest.mark.parametrize("cache", [torch.bfloat16, torch.int8])
def test_keys_and_values_can_be_read_back(cache):
    scene = Scene(tiny(head_dim=10), "bf16", cache=cache, block_size=8)
    sequence = scene.add(20)
    scene.run((sequence, 0, 20))
    scene.expected((sequence, 0, 20))
    _, _, plan, _ = scene.batch([(sequence, 0, 20)])
    slots = torch.from_numpy(plan.slot_mapping)
    for layer in range(3):
        for ours, theirs in zip(scene.pool.gather(layer, slots), scene.twin_pool.gather(layer, slots), strict=True):
            assert ours.shape == theirs.shape
            torch.testing.assert_close(ours.float(), theirs, atol=0.05, rtol=0.05)


def test_nothing_is_ever_stored_in_the_null_block():
    for cache in (torch.bfloat16, torch.int8):
        scene = Scene(tiny(), "int8", cache=cache, block_size=4)
        scene.run((scene.add(50), 0, 50))
        assert not scene.pool.memory[:, 0].any()


def test_more_hidden_rows_than_a_step_has_get_their_logits(numbers):
    scene = Scene(tiny(), **numbers, max_tokens=16)
    sequence = scene.add(16)
    stepped = scene.step.forward(*scene.batch([(sequence, 0, 16)]))
    again = scene.step.logits(stepped.hidden.repeat(3, 1))
    assert torch.equal(again, stepped.logits.repeat(3, 1))


def test_the_likeliest_tokens_come_with_the_logits(numbers):
    scene = Scene(tiny(vocab_size=101), **numbers)
    stepped = scene.step.forward(*scene.batch([(scene.add(30), 0, 30)]))
    largest, likeliest = stepped.logits.max(dim=1)
    assert torch.equal(stepped.likeliest, likeliest)
    assert torch.equal(stepped.largest, largest)


class TestRefusals:
    """Refused before anything is computed, and the step goes on."""

    @pytest.fixture
    def scene(self):
        scene = Scene(tiny(), "int8", max_tokens=32)
        scene.add(20)
        return scene

    def refused(self, scene, match, change, work=(0, 0, 20)):
        token_ids, positions, plan, rows = scene.batch([work])
        before = scene.pool.memory.clone()
        batch = {"token_ids": token_ids, "positions": positions, "plan": plan, "sample_rows": rows}
        change(batch)
        with pytest.raises(StepError, match=match):
            scene.step.forward(**batch)
        assert torch.equal(scene.pool.memory, before)
        assert scene.run((0, 0, 20)).isfinite().all()

    @pytest.mark.parametrize("block", [0, -1, 97, 2**40])
    def test_a_block_that_is_not_there(self, scene, block):
        def change(batch):
            batch["plan"].block_tables[0, 1] = block

        self.refused(scene, f"block {block}", change)

    @pytest.mark.parametrize("position", [-1, 1024, 7])
    def test_a_position_out_of_the_context_or_order(self, scene, position):
        def change(batch):
            batch["positions"][3] = position

        self.refused(scene, f"row 3 has the position {position}", change)

    @pytest.mark.parametrize("token_id", [-1, 320])
    def test_a_token_out_of_the_vocabulary(self, scene, token_id):
        def change(batch):
            batch["token_ids"][5] = token_id

        self.refused(scene, f"token id {token_id}", change)

    def test_a_sample_of_no_row(self, scene):
        self.refused(scene, "row 20", lambda batch: batch["sample_rows"].__setitem__(0, 20))

    def test_samples_out_of_order(self, scene):
        self.refused(
            scene, "row 3, which is not there, or out of order", lambda batch: batch["sample_rows"].__setitem__(4, 3)
        )

    def test_more_tokens_than_it_was_made_for(self, scene):
        scene.add(33)
        self.refused(scene, "tokens or samples: 33", lambda batch: None, work=(1, 0, 33))

    def test_a_table_too_short_for_its_positions(self, scene):
        self.refused(scene, "too short a table", lambda batch: batch["positions"].add_(32))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_threads_of_its_own():
    scene = Scene(tiny(), "int8")
    expected = whole(scene, 40)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(scene.run((0, 0, 40)), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(scene.run((0, 0, 40)), expected)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc here")
def test_threads_without_work_sleep():
    before = {task.name for task in Path("/proc/self/task").iterdir()}
    scene = Scene(tiny(), "int8", num_threads=3)
    whole(scene, 40)
    own = [task for task in Path("/proc/self/task").iterdir() if task.name not in before]
    assert len(own) == 2
    deadline = time.monotonic() + 30
    while any((task / "stat").read_text().rpartition(")")[2].split()[0] != "S" for task in own):
        assert time.monotonic() < deadline, "still awake"
    assert whole(scene, 30).isfinite().all()


def test_steps_of_several_engines_do_not_mix(tiny_llama):
    engines = [Engine.from_checkpoint(tiny_llama[0], EngineConfig(dtype=kind)) for kind in ("int8", "bf16")]
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    alone = [run(engine, [Request("a", list(range(3, 60)), params)]) for engine in engines]
    streams = [engine.generate(Request("a", list(range(3, 60)), params)) for engine in engines]
    tokens = [[], []]
    for outputs in zip(*streams, strict=True):
        for seen, output in zip(tokens, outputs, strict=True):
            seen += output.token_ids
    assert tokens == [found["a"] for found in alone]


class TestChoice:
    def engine(self, directory, **options) -> Engine:
        return Engine.from_checkpoint(directory, EngineConfig(**options))

    @pytest.mark.parametrize("kind", ["int8", "bf16"])
    def test_the_cpu_gets_native_kernels_for_small_dtypes(self, tiny_llama, kind):
        assert isinstance(self.engine(tiny_llama[0], dtype=kind).runner.compute, NativeForward)
        assert isinstance(self.engine(tiny_llama[0], dtype=kind, kernels="torch").runner.compute, TorchForward)

    def test_fp32_stays_with_torch_and_says_why(self, tiny_llama, caplog):
        caplog.set_level("INFO")
        assert isinstance(self.engine(tiny_llama[0], dtype="fp32").runner.compute, TorchForward)
        assert "kernels: torch, because the weights are float32" in caplog.text

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"dtype": "fp32"}, "float32"),
            ({"dtype": "int8", "block_size": 12}, "block_size 12"),
            ({"dtype": "int8", "block_size": 2, "kv_cache_dtype": "int8"}, "block_size 2"),
        ],
    )
    def test_native_kernels_that_cannot_be_had_are_refused(self, tiny_llama, options, match):
        with pytest.raises(ConfigError, match=match):
            self.engine(tiny_llama[0], kernels="native", **options)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"attention": "additive"}, "additive"),
            ({"rope": RopeConfig(scaling="dynamic", factor=2.0, original_length=64)}, "length of the prompt"),
        ],
    )
    def test_shapes_that_it_does_not_know_stay_with_torch(self, changes, reason, caplog):
        caplog.set_level("INFO")
        decoder = Decoder(tiny(**changes)).eval().requires_grad_(False)
        decoder.init_weights(torch.Generator().manual_seed(0))
        decoder.fold_scores()
        engine = Engine(decoder.bfloat16(), EngineConfig(dtype="bf16"))
        assert isinstance(engine.runner.compute, TorchForward)
        assert reason in caplog.text
        with pytest.raises(ConfigError, match=rf"kv_cache_dtype 'int8' is for native kernels, .*{reason}"):
            Engine(decoder, EngineConfig(dtype="bf16", kv_cache_dtype="int8"))

    def test_auto_is_served_in_bf16_and_other_dtypes_as_asked(self):
        assert for_serving(tiny(), EngineConfig(device="cpu")) == (EngineConfig(device="cpu", dtype="bf16"), None)
        for config in (EngineConfig(device="cpu", dtype="fp32"), EngineConfig(device="cpu", dtype="int8")):
            assert for_serving(tiny(), config) == (config, None)

    @pytest.mark.parametrize(
        ("options", "threads"),
        [
            ({"dtype": "auto"}, 6),
            ({"dtype": "int8"}, 6),
            ({"dtype": "fp32"}, 3),  # torch's threads wait for one another
            ({"kernels": "torch", "dtype": "bf16"}, 3),
            ({"dtype": "auto", "num_threads": 2}, 2),
        ],
    )
    def test_an_engine_takes_all_of_its_cores_where_the_step_is_native(self, options, threads):
        config, _ = for_serving(tiny(), EngineConfig(device="cpu", **options), cores=6)
        assert config.num_threads == threads

    @pytest.mark.parametrize(
        ("changes", "options", "match"),
        [
            ({"attention": "additive"}, {}, "additive"),
            ({"rope": RopeConfig(scaling="dynamic", original_length=64)}, {}, "length of the prompt"),
            ({}, {"block_size": 12}, "block_size 12"),
            ({}, {"kernels": "torch"}, "asked for"),
        ],
    )
    def test_auto_stays_as_it_is_where_the_native_step_cannot_run(self, changes, options, match):
        config = EngineConfig(device="cpu", **options)
        served, reason = for_serving(tiny(**changes), config)
        assert served == config
        assert match in str(reason)

    def test_an_int8_cache_is_refused_before_loading_where_the_native_step_cannot_run(self):
        with pytest.raises(ConfigError, match=r"kv_cache_dtype 'int8' is for native kernels, .*additive"):
            for_serving(tiny(attention="additive"), EngineConfig(device="cpu", kv_cache_dtype="int8"))

    def test_fp32_has_no_int8_cache(self, tiny_llama):
        with pytest.raises(ConfigError, match=r"kv_cache_dtype 'int8' is for native kernels, .*float32"):
            self.engine(tiny_llama[0], device="cpu", kv_cache_dtype="int8")

    def test_without_a_compiler_torch_computes(self, tiny_llama, monkeypatch, caplog):
        def none() -> None:
            raise NoLibrary("no C++ compiler (g++ or clang++)")

        monkeypatch.setattr(library, "load", none)
        caplog.set_level("WARNING")
        assert isinstance(self.engine(tiny_llama[0], dtype="int8").runner.compute, TorchForward)
        assert "no C++ compiler" in caplog.text
