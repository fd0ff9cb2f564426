"""LLaVA.generate: what it keeps from one call to the next, and when it forgets it."""

import copy

import pytest
import torch

from config import UserError
from inference import generation
from packing import IMAGE_TOKEN
from tests.tools.decoding_models import build, spied
from tests.tools.no_cache import generate_without_cache
from tests.tools.small_llava import small


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


def test_an_engine_is_forgotten_when_an_optimizer_changed_the_weights():
    model = build()
    prompt = torch.arange(1, 30)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def answer_of(model) -> list[int]:
        return model.generate([prompt], max_new_tokens=8)[0].tolist()

    answer_of(model)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    generation.forget_engine(model)
    assert answer_of(model) == answer_of(copy.deepcopy(model))


def test_an_id_that_the_model_has_no_row_for_is_one_line():
    model = small("llama", "siglip", vocab=97)
    with pytest.raises(UserError, match="tokenizer: makes id 97, and the model has 97; fix: "):
        model.generate([torch.tensor([1, 97])], max_new_tokens=1)
