"""The order of readings, their arithmetic on an injected clock, and real artifacts served on a
CPU.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from capturing import Capturing
from fake_nvml import NOT_SUPPORTED, FakeNvml, Gpu
from make_assess_models import LABELS, random_documents, saved, tiny
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
)

from pipeline.compare.blocks import in_time
from pipeline.config.settings.run import Run
from pipeline.config.settings.serving import Decode, ServingConfig, ServingLoad
from pipeline.errors import UserError
from pipeline.evaluation.serving import fastest
from pipeline.evaluation.serving import measure as serving
from pipeline.evaluation.serving.decoding import Fixed
from pipeline.evaluation.serving.measure import (
    MOST_ROUNDS,
    Readings,
    ServePass,
    draw_prompts,
    figures,
    measure_interleaved,
    serve_pass,
)
from pipeline.evaluation.serving.server import Reading, Server, load, weights_bytes
from pipeline.ledger.devices import table
from pipeline.ledger.devices.cuda.nvml import Absent, open_reader
from pipeline.ledger.devices.other import Other
from pipeline.ledger.devices.table import KINDS
from pipeline.ledger.gpu_sampler import Sampler
from pipeline.ledger.phases import PhaseClock
from pipeline.ledger.schema import RESULT_SCHEMA
from pipeline.ledger.values import Value
from pipeline.runs import serving_pass
from pipeline.tasks.table import Task

CAUSAL, CLASSES = Task.causal_lm, Task.sequence_classification
LOAD = ServingLoad(prompt=6, new=4, batch=2)
PROMPTS = [document.input_ids for document in random_documents([9, 14, 5])]
NS_PER_TOKEN = 1_000_000


class FakeClock:
    def __init__(self) -> None:
        self.ns = 0

    def __call__(self) -> int:
        return self.ns


class TimedModel:
    """A model whose forward takes a millisecond a token, the cached ones free."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock, self.calls = clock, []
        self.config = SimpleNamespace(
            get_text_config=lambda: SimpleNamespace(max_position_embeddings=10)
        )
        self.dtype = torch.float32

    def get_input_embeddings(self):
        return SimpleNamespace(num_embeddings=300)

    def parameters(self):
        return [torch.zeros(10, dtype=torch.float32)]

    def buffers(self):
        return [torch.zeros(3, dtype=torch.int8)]

    def forward(
        self, input_ids, past_key_values=None, use_cache=None, attention_mask=None, logits_to_keep=0
    ):
        self.calls.append((tuple(input_ids.shape), past_key_values, use_cache, logits_to_keep))
        self.clock.ns += NS_PER_TOKEN * input_ids.numel()
        return SimpleNamespace(
            logits=torch.zeros(*input_ids.shape, 5), past_key_values=(past_key_values or 0) + 1
        )

    __call__ = forward


class FakeServer:
    """Writes down who was called with what; reading k of an arm takes `seconds(k)`."""

    def __init__(self, name: str, log: list, seconds=lambda _: 1.0) -> None:
        self.name, self.log, self.seconds, self.count, self.weights_bytes = (
            name,
            log,
            seconds,
            0,
            100,
        )

    def once(self, prompt_ids: np.ndarray, new: int) -> Reading:
        self.log.append((self.name, prompt_ids.shape[0], prompt_ids.tobytes()))
        total = self.seconds(self.count)
        self.count += 1
        return Reading(total / 4, total * 3 / 4, len(prompt_ids) * new, None)


def measure(servers, pairs, **more):
    config = ServingConfig(**{"load": LOAD, "batches": [], "blocks": 2, **more})
    return measure_interleaved(servers, pairs, config=config, prompts=PROMPTS, seed=0)


WARM_UP = 2 + 4
"""Batches of each arm before the first that is kept: two to see how long one takes, four rounds
that are steady.
"""


# -- one reading ----------------------------------------------------------------------------------


def test_a_causal_reading_is_prefill_then_one_token_at_a_time() -> None:
    clock = FakeClock()
    model = TimedModel(clock)
    reading = Server(model, CAUSAL, torch.device("cpu"), clock).once(
        np.ones((2, 6), dtype=np.int32), 4
    )
    assert reading == Reading(0.012, 0.006, units=8, working_bytes=None, how="dynamic cache")
    assert reading.total_s == pytest.approx(0.018)
    assert model.calls == [((2, 6), None, True, 1)] + [
        ((2, 1), made, True, 1) for made in (1, 2, 3)
    ]


def test_a_classification_reading_is_one_forward() -> None:
    clock = FakeClock()
    model = TimedModel(clock)
    reading = Server(model, CLASSES, torch.device("cpu"), clock).once(
        np.ones((2, 6), dtype=np.int32), 4
    )
    assert reading == Reading(prefill_s=0.012, decode_s=0.0, units=2, working_bytes=None)
    assert len(model.calls) == 1


def written(model, prompt: np.ndarray, new: int, decode: Decode) -> tuple[torch.Tensor, str]:
    """Return the tokens that a server writes in its second batch, after one of other prompts, and
    how.
    """
    server = Server(model, CAUSAL, model.device, lambda: 0, decode)
    server.once(prompt[::-1], new)
    decoder, tokens = server._decoder[1], []
    for name in ("prefill", "step"):
        write = getattr(decoder, name)
        setattr(decoder, name, lambda *given, write=write: tokens.append(write(*given).clone()))
    how = server.once(prompt, new).how
    return torch.cat(tokens, dim=1), how


@pytest.mark.parametrize(
    ("decode", "how"),
    [
        (Decode.auto, "dynamic cache"),
        (Decode.dynamic, "dynamic cache"),
        (Decode.static, "static cache"),
        (Decode.compile, "static cache, compiled (1 graph)"),
    ],
)
def test_generation_is_greedy_and_the_cache_changes_nothing(
    decode: Decode, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # traced, no C++ made of it
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model = tiny(CAUSAL)
    prompt = draw_prompts(PROMPTS, 3, 8, 0)
    tokens, told = written(model, prompt, 5, decode)
    assert told == how
    ids = torch.from_numpy(prompt.astype(np.int64))
    for _ in range(5):  # without a cache, all logits
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens, ids[:, 8:])


def refuses(*_) -> None:
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (
            lambda patch, model: patch.setattr(
                model, "_can_compile_fullgraph", False, raising=False
            ),
            "LlamaForCausalLM has no static cache",
        ),
        (
            lambda patch, model: patch.setattr(Fixed, "prefill", refuses),
            "not static: operation not permitted when stream is capturing",
        ),
        (
            lambda patch, model: patch.setattr(Fixed, "step", lambda self: self.logits.neg_()),
            "not static: its predictions are not those of a growing cache (cosine -",
        ),
    ],
)
def test_what_no_static_cache_can_serve_is_served_without_and_says_why(
    broken, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = tiny(CAUSAL), draw_prompts(PROMPTS, 3, 8, 0)
    expected, _ = written(model, prompt, 5, Decode.dynamic)
    broken(monkeypatch, model)
    tokens, how = written(model, prompt, 5, Decode.static)
    assert how.startswith(f"dynamic cache ({why}")
    assert torch.equal(tokens, expected)


def test_a_cache_of_fixed_size_is_made_once_for_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list = []
    init = Fixed.__init__
    monkeypatch.setattr(
        Fixed,
        "__init__",
        lambda self, *given, **more: made.append(given) or init(self, *given, **more),
    )
    server = Server(tiny(CAUSAL), CAUSAL, torch.device("cpu"), lambda: 0, Decode.static)
    for rows in (3, 3, 2, 2):
        server.once(draw_prompts(PROMPTS, rows, 8, 0), 5)
    assert [prompt.shape for _, _, prompt, _ in made] == [(3, 8), (2, 8)]


def test_one_new_token_needs_no_cache() -> None:
    server = Server(tiny(CAUSAL), CAUSAL, torch.device("cpu"), lambda: 0, Decode.static)
    assert server.once(draw_prompts(PROMPTS, 2, 8, 0), 1).how == "dynamic cache"


def test_the_clock_is_read_after_the_device_has_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Watched(Other):
        counts_memory = True

        def synchronise(self) -> None:
            events.append(f"sync {self.at}")

        def reset_memory(self) -> None:
            events.append("reset")

        def allocator(self) -> Any:
            return SimpleNamespace(allocated=300, peak_allocated=350)

    monkeypatch.setitem(KINDS, "meta", Watched)
    model = tiny(CAUSAL).to("meta")
    server = Server(
        model, CAUSAL, torch.device("meta"), lambda: len(events.append("read") or events)
    )
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **kw: events.append("forward") or forward(**kw))
    reading = server.once(np.ones((2, 6), dtype=np.int32), 3)
    edge = ["sync meta", "read"]
    assert events == ["reset", *edge, "forward", *edge, "forward", "forward", *edge]
    assert reading.working_bytes == 50


# -- the order of readings ------------------------------------------------------------------------


def test_pairs_are_read_in_blocks_of_both_orders_with_the_same_prompts() -> None:
    log: list = []
    servers = {arm: FakeServer(arm, log) for arm in ("student", "teacher", "int8")}
    read = measure(servers, [("student", "teacher"), ("int8", "teacher")], blocks=3)
    warm_up, rest = log[: 3 * WARM_UP], log[3 * WARM_UP :]
    sized = ["student", "student", "teacher", "teacher", "int8", "int8"]
    assert [name for name, *_ in warm_up] == sized + 4 * ["student", "teacher", "int8"]
    expected: list[str] = []
    for block in range(3):
        for arm, base in (("student", "teacher"), ("int8", "teacher")):
            expected += [arm if letter == "A" else base for letter in read.orders[arm, base][block]]
    assert [name for name, *_ in rest] == expected
    prompts = [{prompt for *_, prompt in rest[start : start + 8]} for start in (0, 8, 16)]
    assert [len(in_block) for in_block in prompts] == [1, 1, 1]
    assert len(set.union(*prompts)) == 3


def test_seconds_of_a_pair_stand_in_the_order_they_were_read() -> None:
    log: list = []
    servers = {
        "a": FakeServer("a", log, lambda k: 10.0 + k),
        "b": FakeServer("b", log, lambda k: 20.0 + k),
    }
    read = measure(servers, [("a", "b")])
    first = 2 + read.warm_up["rounds"]
    assert read.seconds["a", "b"][0].tolist() == [
        [10 + first, 11 + first],
        [12 + first, 13 + first],
    ]
    assert read.seconds["a", "b"][1].tolist() == [
        [20 + first, 21 + first],
        [22 + first, 23 + first],
    ]
    assert [reading.total_s for reading in read.readings["a"].at_load] == [
        10 + first + k for k in range(4)
    ]


def test_a_linear_drift_cancels_within_a_block() -> None:
    log: list = []
    servers = {arm: FakeServer(arm, log, lambda _: 1.0 + 0.01 * len(log)) for arm in "ab"}
    ours, theirs = measure(servers, [("a", "b")]).seconds["a", "b"]
    np.testing.assert_allclose(ours.sum(axis=1), theirs.sum(axis=1))
    assert (ours != theirs).all()


def test_short_readings_repeat_their_batch() -> None:
    log: list = []
    servers = {"a": FakeServer("a", log, lambda k: 0.006), "b": FakeServer("b", log, lambda k: 0.5)}
    read = measure(servers, [("a", "b")])
    # after two batches each, and four rounds of 4 and of 1
    order = [name for name, *_ in log[4 + 4 * 5 :]]
    block = [
        name
        for letter in read.orders["a", "b"][0]
        for name in (4 * ["a"] if letter == "A" else ["b"])
    ]
    assert order[:10] == block  # 4 x 6 ms are at least 20 ms
    np.testing.assert_allclose(read.seconds["a", "b"][0], 0.006)  # of one batch
    assert len(read.readings["a"].at_load) == 2 * 2 * 4
    log.clear()
    instant = {"a": FakeServer("a", log, lambda k: 0.0)}
    measure(instant, [])
    assert len(log) == 2 + 4 * 64 + 2 * 2 * 64


def test_an_arm_in_no_pair_is_read_as_often() -> None:
    log: list = []
    read = measure({arm: FakeServer(arm, log) for arm in "abcd"}, [("a", "b")])
    blocks = [order.lower() for order in read.orders["a", "b"]]
    assert [name for name, *_ in log[4 * WARM_UP :]] == [*blocks[0], *"cddc", *blocks[1], *"cddc"]
    assert {arm: len(own.at_load) for arm, own in read.readings.items()} == dict.fromkeys("abcd", 4)


def test_an_arm_against_itself_is_read_four_times_a_block() -> None:
    read = measure({"a": FakeServer("a", [], lambda k: 100.0 + k)}, [("a", "a")])
    first = 100 + 2 + read.warm_up["rounds"]
    taken, _ = in_time(*read.seconds["a", "a"], read.orders["a", "a"])
    assert taken.tolist() == [first + k for k in range(8)]
    assert len(read.readings["a"].at_load) == 8


def test_readings_are_discarded_until_they_are_steady_or_the_rounds_are_over() -> None:
    cooling = lambda k: 1.0 + 0.3 * 0.5**k
    steady = measure({arm: FakeServer(arm, [], cooling) for arm in "ab"}, [("a", "b")])
    # two rounds fell by 2.1%, then 1.05%: 1% each at most
    assert steady.warm_up == {"rounds": 7, "steady": True}
    assert measure({"a": FakeServer("a", [])}, []).warm_up == {"rounds": 4, "steady": True}
    restless = measure({"a": FakeServer("a", [], lambda k: 1.1**k)}, [])
    assert restless.warm_up == {"rounds": MOST_ROUNDS, "steady": False}


def test_another_seed_orders_blocks_otherwise_and_the_same_seed_alike() -> None:
    servers = {arm: FakeServer(arm, []) for arm in "ab"}
    read = lambda seed: measure_interleaved(
        servers,
        [("a", "b")],
        config=ServingConfig(load=LOAD, batches=[], blocks=6),
        prompts=PROMPTS,
        seed=0,
        order_seed=seed,
    ).orders["a", "b"]
    assert read(1) == read(1)
    assert len({tuple(read(seed)) for seed in range(20)}) > 4


def test_other_batch_sizes_are_read_forth_and_back_and_the_declared_one_not_again() -> None:
    log: list = []
    servers = {arm: FakeServer(arm, log) for arm in "ab"}
    readings = measure(servers, [("a", "b")], batches=[1, 2, 5]).readings
    extra = [(name, size) for name, size, _ in log if size != LOAD.batch]
    # warm-up of each, then in turns
    assert extra == [(name, size) for size in (1, 5) for name in "aabbabba"]
    assert {size: len(own) for size, own in readings["a"].by_batch.items()} == {1: 2, 2: 4, 5: 2}
    assert readings["a"].by_batch[5][0].units == 20


def test_prompts_are_real_tokens_and_seeded() -> None:
    whole = np.concatenate(PROMPTS).tolist()
    drawn = draw_prompts(PROMPTS, 5, 7, 3)
    assert drawn.shape == (5, 7)
    assert all(any(row == whole[at : at + 7] for at in range(len(whole))) for row in drawn.tolist())
    np.testing.assert_array_equal(drawn, draw_prompts(PROMPTS, 5, 7, 3))
    assert (drawn != draw_prompts(PROMPTS, 5, 7, 4)).any()
    assert draw_prompts([np.array([4, 5])], 1, 5, 0)[0].tolist() in (
        [4, 5, 4, 5, 4],
        [5, 4, 5, 4, 5],
    )
    assert draw_prompts([np.array([4, 5])], 2, 2, 0).tolist() == [[4, 5], [4, 5]]


# -- figures --------------------------------------------------------------------------------------


def readings_of(totals: list[float], working: list[int | None] | None = None) -> Readings:
    at_load = [
        Reading(total / 4, total * 3 / 4, 8, above)
        for total, above in zip(totals, working or [None] * len(totals), strict=True)
    ]
    return Readings(at_load, {1: [Reading(0.1, 0.3, 4, None)], 2: at_load})


def test_figures_by_hand() -> None:
    result = figures(
        readings_of([0.4, 0.8, 0.6, 0.6], [70, 90, 80, 60]), 1000, task=CAUSAL, load=LOAD, devices=2
    )
    values = {key: entry["value"] for key, entry in result.items()}
    assert values == {
        "device_s_per_1k_units": pytest.approx(0.6 * 2 * 1000 / 8),
        "prefill_device_s_per_1k_tokens": pytest.approx(0.15 * 2 * 1000 / 12),
        "decode_device_s_per_1k_tokens": pytest.approx(0.45 * 2 * 1000 / 6),
        "p50_s": pytest.approx(0.6),
        "prefill_p50_s": pytest.approx(0.15),
        "prefill_p95_s": pytest.approx(0.1925),
        "token_p50_s": pytest.approx(0.15),  # 0.45 s for 3 further tokens
        "token_p95_s": pytest.approx(0.1925),
        "p95_s": pytest.approx(0.77),  # between the third and fourth of 0.4 0.6 0.6 0.8, at 0.85
        "peak_bytes": 1090,
        "weights_bytes": 1000,
        "batch_1_device_s_per_1k_units": pytest.approx(0.4 * 2 * 1000 / 4),
        "batch_2_device_s_per_1k_units": pytest.approx(0.6 * 2 * 1000 / 8),
    }
    assert result["p50_s"]["provenance"] == "measured"
    assert result["device_s_per_1k_units"]["provenance"] == "derived"


def test_what_was_not_read_is_null_with_its_reason() -> None:
    one_new = ServingLoad(prompt=6, new=1, batch=2)
    classes = figures(readings_of([0.4]), 1000, task=CLASSES, load=LOAD, devices=1)
    causal = figures(readings_of([0.4]), 1000, task=CAUSAL, load=one_new, devices=1)
    assert (
        classes["decode_device_s_per_1k_tokens"]["why_missing"] == "a classifier generates nothing"
    )
    assert causal["decode_device_s_per_1k_tokens"]["why_missing"] == "one new token is prefill"
    assert classes["peak_bytes"]["why_missing"] == "a CPU has no device memory to count"


def test_bytes_of_weights_count_scales_buffers_and_tied_weights_once() -> None:
    model = tiny(CAUSAL)  # tied: the head is the embedding
    buffers = sum(buffer.numel() * 4 for buffer in model.buffers())
    hidden, wide, vocabulary = 64, 128, 259
    layer = 4 * hidden * hidden + 3 * hidden * wide + 2 * hidden
    assert weights_bytes(model) == 4 * (vocabulary * hidden + 2 * layer + hidden) + buffers
    quantized = torch.nn.Linear(4, 4, bias=False)
    quantized.weight.SCB = torch.zeros(4)
    assert weights_bytes(quantized) == 64 + 16
    quantized.weight.SCB = None
    quantized.weight.quant_state = SimpleNamespace(
        as_dict=lambda packed: {
            "absmax": torch.zeros(3),
            "shape": (4, 4),
            "nested_absmax": torch.zeros(2),
        }
    )
    assert weights_bytes(quantized) == 64 + 20


# -- artifacts on disk ----------------------------------------------------------------------------


def serve(artifacts, pairs, *, task=CAUSAL, clock=None, prompts=PROMPTS, **more):
    config = ServingConfig(**{"load": LOAD, "batches": [1], "blocks": 2, **more})
    return serve_pass(
        artifacts,
        pairs,
        task=task,
        labels=LABELS if task is CLASSES else None,
        prompts=prompts,
        config=config,
        device="cpu",
        devices=1,
        seed=0,
        clock=clock or PhaseClock(),
        sampler=Sampler(Absent("no GPU")),
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Task, Path]:
    return {
        task: saved(tiny(task), tmp_path_factory.mktemp(task.value)) for task in (CAUSAL, CLASSES)
    }


@pytest.mark.parametrize("task", [CAUSAL, CLASSES])
def test_artifacts_are_served_and_the_result_has_its_form(folders, task: Task) -> None:
    clock = PhaseClock()
    served = serve({"a": folders[task], "b": folders[task]}, [("a", "b")], task=task, clock=clock)
    form = RESULT_SCHEMA["properties"]["rows"]["items"]["properties"]["serving"]
    jsonschema.validate(
        json.loads(json.dumps(served.serving["a"], allow_nan=False)),
        {**form, "$defs": RESULT_SCHEMA["$defs"]},
    )
    assert served.seconds["a", "b"][0].shape == (2, 2)
    assert (served.seconds["a", "b"][1] > 0).all()
    assert served.serving["a"]["device_s_per_1k_units"]["value"] > 0
    assert served.how == dict.fromkeys(
        "ab", "float32, dynamic cache" if task is CAUSAL else "float32"
    )
    assert set(clock.read_ns()) == {"model_load", "generate", "other"}


def test_a_pass_on_an_injected_clock_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    now = FakeClock()

    def slow_load(folder, task, device, *, now_ns, **_) -> Server:
        now.ns += 7
        return Server(TimedModel(now), task, torch.device(device), now_ns)

    monkeypatch.setattr(serving, "load", slow_load)
    clock = PhaseClock(now)
    served = serve({"a": Path("a"), "b": Path("b")}, [("a", "b")], clock=clock, batches=[1])
    # 2 or 1 rows of 6 prompt tokens and 3 decoded ones
    batch_ns, one_ns = 18 * NS_PER_TOKEN, 9 * NS_PER_TOKEN
    # Of each arm: a warm-up of 2, 4 rounds and 4 readings of 2 batches (18 ms < 20 ms); at batch 1,
    # 2 and 2 x 3.
    assert {name: ns for name, ns in clock.read_ns().items() if ns} == {
        "model_load": 14,
        "generate": 2 * (18 * batch_ns + 8 * one_ns),
    }
    for arm in "ab":
        values = {
            key: entry["value"]
            for key, entry in served.serving[arm].items()
            if entry["value"] is not None
        }
        assert values == pytest.approx(
            {
                "device_s_per_1k_units": 18 / 8,
                "prefill_device_s_per_1k_tokens": 1.0,
                "decode_device_s_per_1k_tokens": 1.0,
                "p50_s": 0.018,
                "p95_s": 0.018,
                "weights_bytes": 43,
                "prefill_p50_s": 0.012,
                "prefill_p95_s": 0.012,
                "token_p50_s": 0.002,
                "token_p95_s": 0.002,
                "batch_1_device_s_per_1k_units": 9 / 4,
            }
        )
    np.testing.assert_allclose(served.seconds["a", "b"], 0.018)


def test_an_unquantized_artifact_is_served_in_the_dtype_asked_for(folders) -> None:
    server = load(
        folders[CAUSAL], CAUSAL, "cpu", labels=None, now_ns=lambda: 0, dtype=torch.bfloat16
    )
    assert server.dtype == "bfloat16"
    assert server.weights_bytes < 0.51 * weights_bytes(tiny(CAUSAL))


def test_a_classifier_without_a_padding_token_serves_batches(tmp_path: Path) -> None:
    model = tiny(CLASSES)
    model.config.pad_token_id = None
    served = serve({"a": saved(model, tmp_path)}, [], task=CLASSES)
    assert served.serving["a"]["device_s_per_1k_units"]["value"] > 0


def test_an_encoder_serves_too(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=259,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        id2label=dict(enumerate(LABELS)),
    )
    served = serve({"a": saved(BertForSequenceClassification(config), tmp_path)}, [], task=CLASSES)
    assert served.serving["a"]["device_s_per_1k_units"]["value"] > 0


@pytest.mark.parametrize(
    "settings", [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}]
)
def test_quantized_artifacts_are_served_as_they_are(
    folders, tmp_path: Path, settings: dict
) -> None:
    pytest.importorskip("bitsandbytes")
    quantized = AutoModelForCausalLM.from_pretrained(
        folders[CAUSAL],
        quantization_config=BitsAndBytesConfig(**settings),
        dtype=torch.float32,
        device_map="cpu",
    )
    served = serve(
        {"q": saved(quantized, tmp_path), "reference": folders[CAUSAL]}, [("q", "reference")]
    )
    assert served.how == {
        "q": "float32, quantized weights, dynamic cache",
        "reference": "float32, dynamic cache",
    }
    # By hand: the embedding (259 x 64, tied) and the norms stay in fp32, seven matrices a layer are
    # quantized.
    elements, rows, rest = (
        2 * 7 * 64 * 64 + 2 * 3 * 64 * 64,
        2 * (4 * 64 + 2 * 128 + 64),
        4 * (259 * 64 + 5 * 64),
    )
    scales = 4 * rows if "load_in_8bit" in settings else 4 * (elements // 64) + 2 * 7 * 16 * 4
    buffers = sum(buffer.nbytes for buffer in quantized.buffers())
    weights = elements if "load_in_8bit" in settings else elements // 2
    assert served.serving["q"]["weights_bytes"]["value"] == weights + scales + rest + buffers
    assert served.serving["q"]["device_s_per_1k_units"]["value"] > 0


def test_a_load_that_no_artifact_can_serve_is_refused(folders) -> None:
    artifacts = {"a": folders[CAUSAL]}
    with pytest.raises(
        UserError, match=r"serving\.load\.prompt: 2050 tokens of prompt and answer.*2048 positions"
    ):
        serve(artifacts, [], load=ServingLoad(prompt=2046, new=4, batch=1))
    with pytest.raises(UserError, match=r"model\.path: the tokenizer gives token 900"):
        serve(artifacts, [], prompts=[np.array([1, 900])])
    with pytest.raises(UserError, match="data: no test document gives a prompt"):
        serve(artifacts, [], prompts=[])


# -- energy and the other way of writing ----------------------------------------------------------


def joules_of(nvml: FakeNvml) -> Value:
    """Return units per joule of a server that takes a second for a batch of 100 units, on this
    board.
    """
    sampler = Sampler(open_reader(["GPU-1"], nvml=nvml, now_ns=nvml.clock), now_ns=nvml.clock)
    sampler.mark()

    def once(*_) -> Reading:
        nvml.pass_time(1)
        sampler.tick()
        return Reading(0.5, 0.5, 100, None)

    return serving._units_per_joule(
        SimpleNamespace(once=once), np.ones((2, 6)), 4, sampler, PhaseClock(nvml.clock)
    )


def test_units_per_joule_are_those_of_the_batches_between_two_readings() -> None:
    found = joules_of(FakeNvml())
    assert (found.value, found.provenance) == (pytest.approx(100 / 200), "derived")  # 200 W


@pytest.mark.parametrize(
    ("board", "why"),
    [
        (Gpu(refuses={"energy": NOT_SUPPORTED}), "NVML"),
        (Gpu(frozen=True), "the energy counter stood still"),
        (Gpu(processes=3), "other processes were on the device"),
    ],
)
def test_joules_that_are_not_the_jobs_own_are_none(board: Gpu, why: str) -> None:
    found = joules_of(FakeNvml(board))
    assert found.value is None
    assert why in (found.why_missing or "")


def test_an_arm_with_a_cache_of_fixed_size_is_read_with_a_growing_one_too(folders) -> None:
    both = {"a": folders[CAUSAL], "b": folders[CAUSAL]}
    served = serve(both, [("a", "b")], decode=Decode.static)
    assert served.how == dict.fromkeys(both, "float32, static cache")
    assert all(
        served.serving[arm]["dynamic_cache_device_s_per_1k_units"]["value"] > 0 for arm in both
    )
    assert "dynamic_cache_device_s_per_1k_units" not in serve(both, [("a", "b")]).serving["a"]
    assert ServePass.from_json(json.loads(json.dumps(served.to_json()))).how == served.how


def test_a_probe_is_booked_with_the_warm_up_and_stands_in_the_result(
    folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "_opened", {"cpu": Capturing})
    monkeypatch.setattr(fastest, "WAYS", (Decode.graph,))
    clock = PhaseClock()
    served = serve({"a": folders[CAUSAL]}, [], clock=clock, decode=Decode.auto)
    probes = served.decode["a"]
    assert [probe["batch"] for probe in probes] == [2, 1]  # the load, then the other size
    took_s = sum(probe["took_s"] for probe in probes)
    assert served.serving["a"]["decode_probe_s"]["value"] == pytest.approx(took_s)
    assert 0 < took_s < clock.read_ns()["generate"] / 1e9
    assert served.how["a"] == f"float32, {probes[0]['how']}"
    assert ServePass.from_json(json.loads(json.dumps(served.to_json()))).decode == served.decode
    asked = serve({"a": folders[CAUSAL]}, [], decode=Decode.graph)
    assert "decode_probe_s" not in asked.serving["a"]


@pytest.mark.parametrize(
    ("asked", "gate", "expected"),
    [
        (Decode.auto, None, Decode.auto),
        (Decode.auto, SimpleNamespace(), Decode.graph),  # both sides, and both looks, in one way
        (Decode.compile, SimpleNamespace(), Decode.compile),
    ],
)
def test_in_a_gate_nothing_is_timed(
    asked: Decode, gate: Any, expected: Decode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "_opened", {"cpu": Capturing})
    run = Run(serving=ServingConfig(decode=asked))
    session = SimpleNamespace(run=run, gate=gate, device=torch.device("cpu"))
    assert serving_pass._asked_decode(SimpleNamespace(session=session)) is expected
