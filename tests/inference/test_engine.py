"""The engine: an answer depends neither on its company, order and place, nor on what is reused."""

import contextlib
import random
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lora
from config import UserError
from inference import engine as engine_module
from inference.engine import Engine, Request
from model import LLaVA
from packing import IMAGE_TOKEN
from tests.tools.decoding_models import FAMILIES, build, spied
from tests.tools.environment import DEVICES
from tests.tools.no_cache import generate_without_cache


def requests(count: int = 9, pictures: int = 2, seed: int = 1) -> list[Request]:
    """Ragged prompts with 0 to 2 pictures, of only a few pictures; answers of 1 to 9 tokens."""
    g, draw = torch.Generator().manual_seed(seed), random.Random(seed)
    images, made = torch.randn(pictures, 3, 16, 16, generator=g), []
    for i in range(count):
        ids, chosen = torch.randint(3, 61, (draw.randint(2, 12),), generator=g), []
        for _ in range(i % 3):
            chosen.append(draw.randrange(pictures))
            ids = torch.cat([ids[:2], torch.tensor([IMAGE_TOKEN]), ids[2:]])
        ids[:2] = torch.tensor([1, 2])
        made.append(Request(ids, images[chosen], draw.randint(1, 9), stop=(7,), tag=i))
    return made


def alone(model: LLaVA, r: Request) -> list[int]:
    """Without the engine and its cache."""
    return generate_without_cache(
        model, [r.ids], r.images, max_new_tokens=r.max_new_tokens, eos_token_id=7
    )[0].tolist()


def answers(engine: Engine, asked: list[Request], **options) -> dict[int, list[int]]:
    return {r.tag: tokens for r, tokens in engine.serve(asked, **options)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_is_the_same_in_any_company(family, device, monkeypatch):
    """Ragged batches of 1, 3 and 16, refilled, in another order, with reuse and without.

    All of them give what no cache at all gives.
    """
    model, asked = build(family).to(device), requests()
    want = {r.tag: alone(model, r) for r in asked}
    assert len({tuple(t) for t in want.values()}) > 5
    shuffled = random.Random(2).sample(asked, len(asked))
    for rows, order in ((1, asked), (3, asked), (3, shuffled), (16, shuffled)):
        engine = Engine(model, rows, slots=24)
        assert engine.use_graph == (device == "cuda")
        assert answers(engine, order) == want
        assert answers(engine, order) == want  # what the rows still hold is used
    monkeypatch.setattr(engine_module, "MIN_PREFIX", 10**9)
    assert answers(Engine(model, 3), asked) == want


@pytest.mark.parametrize("family", ["llama", "openelm", "gemma3_text"])
def test_static_shapes_decode_the_same(family):
    """What a CUDA graph would replay: all rows at every step, not only those being decoded."""
    model, asked = build(family), requests()
    engine = Engine(model, 4, slots=24)
    engine.use_graph, seen = True, set()

    def replay():
        seen.add(engine.inputs.shape)
        return engine._forward(engine.inputs)

    engine._replay = replay
    want = {r.tag: alone(model, r) for r in asked}
    assert answers(engine, asked) == want and answers(engine, asked[::-1]) == want
    assert seen == {(2, 4)}
    full = [
        Request(torch.arange(3, 53), max_new_tokens=n, tag=n) for n in (206, 3)
    ]  # 256 slots, to the last
    want = generate_without_cache(model, [full[0].ids], max_new_tokens=206)[0].tolist()
    assert answers(engine, full) == {206: want, 3: want[:3]}
    assert engine.cache.slots == 256


def test_beams_do_not_cross_the_switch_of_a_longrope():
    """Before and behind it they are what no cache gives; across it they are refused."""
    model = build("phi3")  # switches behind 20 tokens
    for length, new in ((5, 9), (12, 9), (25, 9)):
        ids = [torch.arange(3, 3 + length)]
        want = generate_without_cache(model, ids, max_new_tokens=new, num_beams=3)
        assert torch.equal(model.generate(ids, max_new_tokens=new, num_beams=3), want)
    for length, new in ((5, 17), (13, 9), (20, 2)):
        with pytest.raises(UserError, match=f"^max_new_tokens: {new} tokens .* cross 20, .*; fix"):
            model.generate([torch.arange(3, 3 + length)], max_new_tokens=new, num_beams=3)


def test_a_place_is_taken_as_soon_as_it_is_free():
    model, steps = build(), []
    asked = [
        Request(torch.tensor([1, i + 3]), max_new_tokens=n, tag=i)
        for i, n in enumerate((6, 1, 2, 3, 1))
    ]
    engine, drawn = Engine(model, 2), []
    finished = [r.tag for r, _ in engine.serve((drawn.append(r) or r for r in asked), steps.append)]
    assert [[r.tag for r, _ in step] for step in steps] == [
        [0, 1],
        [0, 2],
        [0, 2],
        [0, 3],
        [0, 3],
        [0, 3],
        [4],
    ]
    assert finished == [1, 2, 0, 3, 4] or finished == [1, 2, 3, 0, 4]
    assert drawn == asked


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_picture_is_encoded_and_prefilled_once_for_many_questions(rows, monkeypatch):
    model, image = build(), torch.randn(1, 3, 16, 16)
    asked = [
        Request(torch.tensor([5, IMAGE_TOKEN, 9, 3 + i]), image.clone(), 1, tag=i) for i in range(8)
    ]
    want = {r.tag: alone(model, r) for r in asked}
    seen = spied(model, monkeypatch)
    assert answers(Engine(model, rows), asked) == want
    assert seen == {"images": 1, "tokens": 1 + model.image_tokens + 2 + 7 * 1}
    other = Request(torch.tensor([5, IMAGE_TOKEN, 9, 3]), image.flip(3), 1, tag=0)
    engine = Engine(model, rows)
    assert answers(engine, [asked[0]]) == {0: want[0]} and answers(engine, [other]) == {
        0: alone(model, other)
    }
    assert seen["images"] == 1 + 3 and seen["tokens"] > 2 * (3 + model.image_tokens)


def test_a_row_that_has_moved_left_behind_what_it_held_then():
    """Two prompts go on from one answer, of which one row has only the beginning."""
    model = build()
    long, engine = Request(torch.arange(3, 25), max_new_tokens=12, tag=1), Engine(model, 2)
    said = answers(engine, [Request(torch.tensor([1, 2]), max_new_tokens=2, tag=0), long])[1]
    asked = [
        Request(torch.cat([long.ids, torch.tensor([*said, 8, i])]), max_new_tokens=4, tag=i)
        for i in (4, 5)
    ]
    assert answers(engine, asked) == {r.tag: alone(model, r) for r in asked}


def test_a_row_is_continued_only_where_its_windows_still_hold_what_is_seen(monkeypatch):
    """The next turn of a chat reuses all of it; what leaves it earlier is computed anew."""
    model = build("gemma3_text")
    first = Request(torch.arange(3, 33), max_new_tokens=5, tag=0)
    engine = Engine(model, 2)
    said = answers(engine, [first])[0]
    turn = Request(torch.cat([first.ids, torch.tensor([*said, 8, 9])]), max_new_tokens=3, tag=1)
    other = Request(torch.cat([first.ids, torch.tensor([50, 51])]), max_new_tokens=3, tag=2)
    want = {1: alone(model, turn), 2: alone(model, other)}
    seen = spied(model, monkeypatch)
    assert answers(engine, [turn]) == {1: want[1]} and seen["tokens"] == 3 + 2
    assert answers(engine, [other]) == {2: want[2]} and seen["tokens"] == 5 + 32 + 2
    assert [k.size(2) for k in engine.cache.k] == [11, 256]


def test_what_rows_hold_outlives_a_larger_cache(monkeypatch):
    model = build()
    first = Request(torch.arange(3, 23), max_new_tokens=5, tag=0)
    more = Request(torch.cat([first.ids, torch.arange(40, 59)]), max_new_tokens=6, tag=1)
    want, engine = alone(model, more), Engine(model, 2, slots=32)
    answers(engine, [first])
    seen = spied(model, monkeypatch)
    assert answers(engine, [more]) == {1: want} and engine.cache.slots == engine_module.CACHE_STEP
    assert seen["tokens"] == 19 + 5  # the beginning was still there


class LargestCache(TorchDispatchMode):
    """Measures how many numbers of caches are in memory at most."""

    def __init__(self, tensors: list[torch.Tensor]):
        super().__init__()
        self.tensors = [weakref.ref(t) for t in tensors]
        self.most = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op is torch.ops.aten.new_zeros.default and out.dim() == 4:
            self.tensors.append(weakref.ref(out))
            alive = [ref() for ref in self.tensors]
            self.most = max(self.most, sum(t.numel() for t in alive if t is not None))
        return out


def test_a_cache_grows_by_one_tensor_at_a_time():
    """Old and new one together may not fit into a GPU's memory."""
    engine = Engine(build(), rows=2, slots=32)
    old = sum(t.numel() for t in engine.cache.tensors())
    filled = [torch.randn_like(t) for t in engine.cache.tensors()]
    for tensor, values in zip(engine.cache.tensors(), filled, strict=True):
        tensor.copy_(values)

    with LargestCache(engine.cache.tensors()) as largest:
        engine.cache.grow(128)
    tensors = engine.cache.tensors()
    new = sum(t.numel() for t in tensors)
    assert engine.cache.slots == 128 and new == 4 * old
    assert largest.most <= new + old // len(tensors)
    for tensor, values in zip(tensors, filled, strict=True):
        assert torch.equal(tensor[:, :, :32], values) and not tensor[:, :, 32:].any()


def test_a_step_is_captured_on_the_gpu_of_the_cache(monkeypatch):
    """Whatever GPU is current, on a stream of that GPU, and without a say of other threads.

    torch.cuda is replaced by what notes how it is called: no GPU is needed.
    """
    current = [0]
    calls = []

    @contextlib.contextmanager
    def device(chosen):
        current.append(torch.device(chosen).index)
        yield
        current.pop()

    class Stream:
        def __init__(self):
            self.gpu = current[-1]

        def wait_stream(self, other):
            calls.append(("waits", self.gpu, other.gpu))

    class Graph:
        def replay(self):
            calls.append(("replay", current[-1]))

    @contextlib.contextmanager
    def graph(_, stream=None, capture_error_mode="global"):
        calls.append(("capture", current[-1], stream and stream.gpu, capture_error_mode))
        yield

    fakes = SimpleNamespace(
        device=device,
        Stream=Stream,
        CUDAGraph=Graph,
        graph=graph,
        current_stream=Stream,
        stream=lambda stream: contextlib.nullcontext(),
    )
    model, asked = build(), requests(1)
    engine = Engine(model, rows=1)
    assert not engine.use_graph
    with torch.inference_mode():
        engine._admit(asked)
        engine.rows[0].add(engine._sample()[0])
        engine.use_graph = True
        engine.device = torch.device("cuda", 1)
        with monkeypatch.context() as patch:
            patch.setattr(engine_module.torch, "cuda", fakes)
            engine._step()
            engine._step()
    assert current == [0]
    assert calls == [
        ("waits", 1, 1),
        ("waits", 1, 1),
        ("capture", 1, 1, "thread_local"),
        ("replay", 1),
        ("replay", 1),
    ]


def test_stopping_early_leaves_nothing_half_done():
    model, asked = build(), requests()
    engine = Engine(model, 3)
    running = engine.serve(asked)
    next(running)
    running.close()
    assert engine.active == 0 and not any(row.cached_ids for row in engine.rows)
    assert not any("forward" in vars(m) for m in model.modules())
    assert answers(engine, asked) == {r.tag: alone(model, r) for r in asked}


def test_wrong_requests_are_refused():
    model = build()
    with pytest.raises(ValueError, match="1 image placeholders but 0 images"):
        next(Engine(model, 1).serve([Request(torch.tensor([1, IMAGE_TOKEN]))]))
    with pytest.raises(ValueError, match="0 image placeholders but 1 images"):
        next(Engine(model, 1).serve([Request(torch.tensor([1]), torch.zeros(1, 3, 16, 16))]))
    with pytest.raises(ValueError, match="a prompt is empty"):
        next(Engine(model, 1).serve([Request(torch.tensor([], dtype=torch.long))]))
    with pytest.raises(ValueError, match="beam search"):
        model.generate(torch.tensor([[1, 2]]), num_beams=2, temperature=0.5)


def test_each_request_has_its_own_way_to_end_and_to_draw():
    model, ids = build(), torch.arange(3, 9)
    options = [
        {},
        {"max_new_tokens": 3},
        {"until": lambda tokens: len(tokens) == 5},
        {"temperature": 1.5, "seed": 4},
        {"temperature": 1.5, "seed": 5},
        {"temperature": 1.5, "top_k": 1},
        {"temperature": 0.7, "top_p": 0.5},
    ]
    asked = [Request(ids, tag=i, **({"max_new_tokens": 8} | o)) for i, o in enumerate(options)]
    made = answers(Engine(model, 4), asked)
    assert made == {i: answers(Engine(model, 1), [r])[i] for i, r in enumerate(asked)}
    assert made[1] == made[0][:3] and made[2] == made[0][:5] and made[5] == made[0]
    assert made[3] != made[4] and len(made[3]) == 8
    stopped = answers(
        Engine(model, 1), [Request(ids, max_new_tokens=8, stop=(made[0][2],), tag=0)]
    )[0]
    assert stopped == made[0][: made[0].index(made[0][2]) + 1]


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantized_models_answer_as_their_unpacked_weights_do(kind):
    model, asked = build(), requests()
    lora.quantize(model.language_model, kind)
    made = answers(Engine(model, 3), asked)
    lora.merge(model.language_model, torch.float32)
    assert made == {r.tag: alone(model, r) for r in asked}
