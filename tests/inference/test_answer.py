"""From a question to the text of its answer: placeholders, batches, the cut at the stop token."""

from types import SimpleNamespace

import pytest
import torch

from inference.answer import answer, answer_tokens, before_stop, place_images, prompt_ids
from inputs.templates import byte_tokenizer, encode_prompt, stop_id
from packing import IMAGE_TOKEN, Item


class FakeModel:
    """A model that answers with given texts, and remembers what it was asked."""

    def __init__(self, rows: list[list[int]]):
        self.config = SimpleNamespace(template="plain")
        self.rows = rows

    def generate(self, prompts, images, eos_token_id, **options):
        self.asked = SimpleNamespace(
            prompts=prompts, images=images, eos_token_id=eos_token_id, options=options
        )
        return torch.tensor(self.rows)


@pytest.mark.parametrize(
    "question, items, placed",
    [
        ("What?", 0, "What?"),
        ("What?", 1, "<image>\nWhat?"),
        ("What?", 2, "<image>\n<image>\nWhat?"),
        ("Is <image> red?", 1, "Is <image> red?"),
        ("Is <image> red?", 2, "<image>\n<image>\nIs  red?"),
        ("Is <image> red?", 0, "Is  red?"),
    ],
)
def test_a_question_has_a_placeholder_for_each_item(question, items, placed):
    assert place_images(question, items) == placed


def test_tokens_end_in_front_of_the_first_stop():
    assert before_stop([5, 6, 2, 7, 2], 2) == [5, 6]
    assert before_stop([5, 6], 2) == [5, 6] == before_stop([5, 6], None)
    assert before_stop([2, 2], 2) == []


def test_answers_are_decoded_up_to_the_stop_token_in_the_order_of_the_questions():
    tokenizer = byte_tokenizer()
    stop = stop_id(tokenizer, "plain")
    red = [*tokenizer.encode(" red ")[0], stop, stop, stop]
    circle = tokenizer.encode(" circle.")[0]
    assert len(red) == len(circle)

    model = FakeModel([red, circle])
    first, second = Item(torch.zeros(1, 3, 4, 4)), Item(torch.ones(1, 3, 4, 4))
    questions, items = ["Which colour?", "What are <image> and <image>?"], [[], [first, second]]
    assert answer(model, tokenizer, questions, items, max_new_tokens=8) == ["red", "circle."]
    assert answer_tokens(model, tokenizer, questions, items) == [red[:5], circle]

    assert model.asked.eos_token_id == stop
    assert model.asked.images == [first, second]
    turn = {"from": "human", "value": questions[1]}
    assert model.asked.prompts[1].tolist() == encode_prompt([turn], tokenizer, "plain")
    assert [int((ids == IMAGE_TOKEN).sum()) for ids in model.asked.prompts] == [0, 2]


def test_options_go_to_generate_and_every_question_needs_its_items():
    model = FakeModel([[5]])
    answer(model, byte_tokenizer(), ["What?"], [[]], temperature=0.5, num_beams=1)
    assert model.asked.options == {"temperature": 0.5, "num_beams": 1}
    with pytest.raises(ValueError, match="zip"):
        answer(model, byte_tokenizer(), ["What?", "Who?"], [[]])


def test_the_prompt_of_a_question_is_that_of_its_turn():
    tokenizer = byte_tokenizer()
    turn = {"from": "human", "value": "<image>\nWhat?"}
    assert prompt_ids("What?", 1, tokenizer, "plain") == encode_prompt([turn], tokenizer, "plain")
