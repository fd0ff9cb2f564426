"""Small random LLaVAs around a language model of each family, and a small tokenizer for them."""

import json

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from config import LLaVAConfig
from inputs.tokenizer import JsonTokenizer, Tokenizer
from model import LLaVA
from tests.tools.small_language_models import CONFIGS, OPENELM, SIZES, filled

VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 16,
    "image_size": 32,
}


def byte_level() -> Tokenizer:
    """Return a byte-level BPE of the bytes of ASCII, three merges and an end.

    llama.cpp's server says nothing of a token that is a part of a character.
    """
    alphabet = [chr(byte) for byte in range(33, 127)] + ["\u0120", "\u010a"]  # blank and line end
    merges = [("\u0120", "t"), ("h", "e"), ("\u0120t", "he")]
    names = [*alphabet, *("".join(merge) for merge in merges)]
    model = models.BPE({name: i for i, name in enumerate(names)}, merges)
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["</s>"])
    files = {
        "tokenizer.json": fast.to_str().encode(),
        "tokenizer_config.json": b'{"eos_token": "</s>"}',
    }
    return JsonTokenizer(files)


TOKENIZER = byte_level()
VOCABULARY = {"vocab_size": TOKENIZER.vocab_size + 3}  # some rows are of no token


def llava(hf: dict, **config) -> LLaVA:
    """Return a random LLaVA around a language model that a config.json describes."""
    torch.manual_seed(0)
    settings = {"feature_layer": -1, "feature_select": "cls_patch", "template": "plain", **config}
    model = LLaVA(LLaVAConfig(hf, VISION, {}, "mlp2x_gelu", **settings))
    return filled(model).requires_grad_(False).eval()


def configurations() -> dict[str, dict]:
    """Return a config.json of each kind that tests know, with a name for each."""
    found = {"openelm": OPENELM | VOCABULARY}
    for family, differences in CONFIGS.items():
        for number, difference in enumerate(differences):
            found[f"{family}-{number}"] = {
                "model_type": family,
                **SIZES,
                **VOCABULARY,
                **difference,
            }
    return found


CHAT = (
    "{%- for message in messages -%}<|{{ message.role }}|>{{ message.content }}</s>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


# The same, for contents that are lists.
LISTS = CHAT.replace(
    "{{ message.content }}",
    "{%- for part in message.content -%}{{ part.text if part.type == 'text' else '<image>' }}"
    "{%- endfor -%}",
)


def with_chat(tokenizer, chat):
    """Return a tokenizer with that chat template."""
    config = json.loads(tokenizer.files["tokenizer_config.json"]) | {"chat_template": chat}
    files = tokenizer.files | {"tokenizer_config.json": json.dumps(config).encode()}
    return JsonTokenizer(files)
