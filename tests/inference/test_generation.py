"""The engine: an answer depends neither on its company, order and place, nor on what is reused."""

import random

import pytest
import torch
from torch import nn

import lora
from config import LLaVAConfig
from inference import engine as engine_module
from inference import generation
from inference.engine import Engine, Request
from inference.fast_linears import fast_linears
from inference.sampling import sample_tokens
from kernels import int8
from model import LLaVA, init_weights
from packing import IMAGE_TOKEN
from tests.tools.environment import DEVICES
from tests.tools.no_cache import generate_without_cache

SIZES = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip
FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 16},
    "gemma": {"head_dim": 16},
    "phi": {},
    "stablelm": {"use_parallel_residual": True},
    "openelm": {"model_dim": 64, "head_dim": 16, "num_query_heads": [4, 8], "num_kv_heads": [1, 2],
                "ffn_multipliers": [1.0, 2.0], "ffn_dim_divisor": 16, "rope_freq_constant": 10000,
                "normalize_qk_projections": True, "share_input_output_layers": True},
}  # fmt: skip
VISION = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 2, "patch_size": 4, "image_size": 16}  # fmt: skip


def build(family: str = "llama", **change) -> LLaVA:
    torch.manual_seed(0)
    model = LLaVA(LLaVAConfig(SIZES | {"model_type": family} | FAMILIES[family] | change, VISION))
    init_weights(model, 0.3)
    return model.eval()


def requests(count: int = 9, pictures: int = 2, seed: int = 1) -> list[Request]:
    """Ragged prompts with no picture, one or two, of only a few pictures; answers of 1 to 9 tokens."""
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
    """Batches of 1, 3 and 16, ragged, refilled, in another order, with reuse and without, equal to no cache at all."""
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


@pytest.mark.parametrize("family", ["llama", "openelm"])
def test_static_shapes_decode_the_same(family):
    """What a CUDA graph would replay: all rows at every step, waiting ones too, in place of those that are decoded."""
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


def spied(model: LLaVA, monkeypatch) -> dict[str, int]:
    """Pictures encoded, and tokens that went through the language model."""
    seen, see, forward = {"images": 0, "tokens": 0}, model.see, model.language_model.model.forward

    def count_images(images):
        seen["images"] += len(images)
        return see(images)

    def count_tokens(x, *rest):
        seen["tokens"] += len(x)
        return forward(x, *rest)

    monkeypatch.setattr(model, "see", count_images)
    monkeypatch.setattr(model.language_model.model, "forward", count_tokens)
    return seen


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


def test_a_chat_goes_on_from_what_has_been_read(monkeypatch):
    model, image = build(), torch.randn(1, 3, 16, 16)
    first = torch.tensor([5, IMAGE_TOKEN, 9])
    said = model.generate([first], image, max_new_tokens=6)[0]
    more = torch.cat([first, said, torch.tensor([8, 4])])
    want = generate_without_cache(model, [more], image, max_new_tokens=5).tolist()
    seen = spied(model, monkeypatch)
    assert model.generate([more], image, max_new_tokens=5).tolist() == want
    assert seen == {
        "images": 0,
        "tokens": 3 + 4,
    }  # the last token said, the two new ones; four of the five answered


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


def test_what_rows_hold_outlives_a_larger_cache(monkeypatch):
    model = build()
    first = Request(torch.arange(3, 23), max_new_tokens=5, tag=0)
    more = Request(torch.cat([first.ids, torch.arange(40, 59)]), max_new_tokens=6, tag=1)
    want, engine = alone(model, more), Engine(model, 2, slots=32)
    answers(engine, [first])
    seen = spied(model, monkeypatch)
    assert answers(engine, [more]) == {1: want} and engine.cache.slots == engine_module.CACHE_STEP
    assert seen["tokens"] == 19 + 5  # the beginning was still there


def test_changed_weights_and_training_forget_what_was_held():
    model, ids = build(), torch.arange(3, 25)[None]
    before = model.generate(ids, max_new_tokens=6)
    with torch.no_grad():
        model.language_model.model.layers[0].mlp.up_proj.weight.mul_(-1)
    changed = model.generate(ids, max_new_tokens=6)
    assert (
        changed.tolist()
        == generate_without_cache(model, ids, max_new_tokens=6).tolist()
        != before.tolist()
    )
    model.train().generate(ids, max_new_tokens=2)
    assert model not in generation.LAST_ENGINES


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
    options = [{}, {"max_new_tokens": 3}, {"until": lambda tokens: len(tokens) == 5}, {"temperature": 1.5, "seed": 4},
               {"temperature": 1.5, "seed": 5}, {"temperature": 1.5, "top_k": 1},
               {"temperature": 0.7, "top_p": 0.5}]  # fmt: skip
    asked = [Request(ids, tag=i, **({"max_new_tokens": 8} | o)) for i, o in enumerate(options)]
    made = answers(Engine(model, 4), asked)
    assert made == {i: answers(Engine(model, 1), [r])[i] for i, r in enumerate(asked)}
    assert made[1] == made[0][:3] and made[2] == made[0][:5] and made[5] == made[0]
    assert made[3] != made[4] and len(made[3]) == 8
    stopped = answers(
        Engine(model, 1), [Request(ids, max_new_tokens=8, stop=(made[0][2],), tag=0)]
    )[0]
    assert stopped == made[0][: made[0].index(made[0][2]) + 1]


def test_a_draw_has_the_probabilities_it_should():
    logits = (
        torch.tensor([0.45, 0.3, 0.2, 0.05]).log()[[2, 0, 3, 1]].expand(8000, -1)
    )  # at 1, 3, 0, 2

    def share(**options) -> list[float]:
        given = {"temperature": 1.0, "top_p": 1.0} | options
        drawn = sample_tokens(logits, generator=torch.Generator().manual_seed(0), **given)
        return (torch.bincount(drawn, minlength=4) / len(drawn)).tolist()

    assert share() == pytest.approx([0.2, 0.45, 0.05, 0.3], abs=0.02)
    assert share(top_k=2) == pytest.approx([0, 0.6, 0, 0.4], abs=0.02)
    assert share(top_p=0.74) == pytest.approx([0, 0.6, 0, 0.4], abs=0.02)
    assert share(top_p=0.76) == pytest.approx([0.2 / 0.95, 0.45 / 0.95, 0, 0.3 / 0.95], abs=0.02)
    assert share(top_k=2, top_p=0.55) == pytest.approx(
        [0, 1, 0, 0]
    )  # of the two, the first has 0.6
    half = torch.tensor([0.45, 0.3, 0.2, 0.05]).sqrt()
    assert share(temperature=2.0) == pytest.approx(
        (half / half.sum())[[2, 0, 3, 1]].tolist(), abs=0.02
    )


@pytest.mark.parametrize("kind", ["bf16", "int8", "nf4"])
def test_fast_products_are_those_of_the_modules(kind):
    """In bfloat16 and quantized; for few rows and many."""
    lm = build("phi").bfloat16().language_model
    for m in lm.modules():
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.bias)
    if kind != "bf16":
        lora.quantize(lm, kind)
    fast = fast_linears(lm)
    linears = [m for m in lm.modules() if isinstance(m, (nn.Linear, lora.Quantized))]
    assert set(fast) == set(linears) and len(linears) == 2 * 6 + 1
    for m in linears:
        for rows in (1, 3, 40):
            x = torch.randn(rows, 64 if m is lm.lm_head else m.in_features).bfloat16()
            want = m(x).double()
            assert (
                fast[m](x).double() - want
            ).norm() <= 6e-3 * want.norm()  # each is within a rounding of bfloat16


def test_int8_products_on_a_cpu_are_as_exact_as_unpacking():
    for rows, N, K in ((1, 64, 128), (16, 192, 64), (17, 64, 64), (2, 33, 17), (0, 64, 64)):
        g = torch.Generator().manual_seed(rows)
        x, q = (
            torch.randn(rows, K, generator=g).bfloat16(),
            int8.quantize(torch.randn(N, K, generator=g)),
        )
        exact = x.double() @ (q.weight.double() * q.SCB.double()[:, None] / 127).T
        ours, plain = (
            (f(x, q).double() - exact).norm() for f in (int8.matmul, int8.reference_matmul)
        )
        assert int8.matmul(x, q).shape == (rows, N) and ours <= 1.1 * plain


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantized_models_answer_as_their_unpacked_weights_do(kind):
    model, asked = build(), requests()
    lora.quantize(model.language_model, kind)
    made = answers(Engine(model, 3), asked)
    lora.merge(model.language_model, torch.float32)
    assert made == {r.tag: alone(model, r) for r in asked}
