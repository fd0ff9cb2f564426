"""The tokenizer of a nanoVLM folder: that of its language model, with more control tokens.

A folder of nanoVLM has no tokenizer. Its config.json names one (`lm_tokenizer`), says which control
tokens are added to it (`vlm_extra_tokens`) and what the chat template is (`lm_chat_template`). The
names are those of nanoVLM's VLMConfig, and so are the defaults of fields that are not there.

The vocabulary's files may also lie in the folder itself: those of the language model as they are,
or those that export.py has put there.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import tokenizers

from checkpoints.fields import Fields
from checkpoints.files import resolve
from config import UserError
from inputs.vocabulary_file import check_vocabulary

LLM = "HuggingFaceTB/SmolLM2-360M-Instruct"

# Of these fields each config.json of nanoVLM has one.
OWN_FIELDS = ("vit_hidden_dim", "vlm_extra_tokens")

# What is added by default: a tile's token has the place 1 to 8 of its row and of its column.
GRID = range(1, 9)
TOKENS = {
    "image_token": "<|image|>",
    "global_image_token": "<|global_image|>",
    **{f"r{row}c{column}": f"<row_{row}_col_{column}>" for row in GRID for column in GRID},
}

CHAT = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Before a chat template of nanoVLM, whose contents are texts. Nothing stands between an image and
# the text beside it, and several images of a turn are counted.
BEFORE_CHAT = (
    "{% set turns = namespace(messages=[]) %}{% for message in messages %}"
    "{% set images = message['content'] | selectattr('type', 'equalto', 'image') | list | length %}"
    "{% set turn = namespace(text='', images=0) %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}"
    "{% if images > 1 %}{% set turn.text = turn.text ~ '<image: ' ~ turn.images ~ '>' %}{% endif %}"
    "{% set turn.text = turn.text ~ '<image>' %}{% set turn.images = turn.images + 1 %}"
    "{% else %}{% set turn.text = turn.text ~ part['text'] %}{% endif %}{% endfor %}"
    "{% set turns.messages = turns.messages + [{'role': message['role'], 'content': turn.text}] %}"
    "{% endfor %}{% set messages = turns.messages %}"
)


def is_needed(config: Fields) -> bool:
    """Say whether a config.json is nanoVLM's, which has no model_type."""
    has_its_fields = any(field in config for field in OWN_FIELDS)
    return "model_type" not in config and has_its_fields


def may_be_needed(content: bytes) -> bool:
    """Say whether the bytes of a config.json, which may be damaged, can be nanoVLM's."""
    return any(field.encode() in content for field in OWN_FIELDS)


def extra_tokens(config: Fields) -> dict[str, str]:
    """Return the control tokens that are added, by the names that nanoVLM has for them."""
    tokens = TOKENS
    if "vlm_extra_tokens" in config:
        table = config.table("vlm_extra_tokens")
        tokens = {name: table.text(name, most=100) for name in table.values}
    for name, string in tokens.items():
        if not string or string == "<image>":
            raise config.refuse("vlm_extra_tokens", f"{name} without a string of its own")
    return tokens


def chat_template(config: Fields) -> str:
    """Return the chat template as nanoVLM has it."""
    return config.text("lm_chat_template", default=CHAT)


def named_folder(config: Fields, folder: Path) -> Path:
    """Return the folder of the tokenizer that config.json names. Raise UserError if it has none."""
    name = config.text("lm_tokenizer", default=LLM, most=1000)
    found = None
    with contextlib.suppress(UserError):  # said below, with what helps
        found = resolve(name, small=True)
    if found is None or found == folder or not (found / "tokenizer.json").is_file():
        what = f"no tokenizer.json, and none is found as {name!r} (lm_tokenizer)"
        fix = "put tokenizer.json and tokenizer_config.json of its language model there"
        raise UserError(folder, what, fix)
    return found


def extend(files: dict[str, bytes], config: Fields) -> dict[str, bytes]:
    """Return a tokenizer's files with the control tokens and the chat template of a config.json.

    A token that the vocabulary has keeps its id. The others get the next ones, in their order.
    Raise UserError for a vocabulary that asks for too much.
    """
    check_vocabulary(files["tokenizer.json"], f"{config.where}:lm_tokenizer")
    model = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    model.add_special_tokens(list(extra_tokens(config).values()))
    template = BEFORE_CHAT + chat_template(config)
    return files | {
        "tokenizer.json": model.to_str().encode(),
        "chat_template.jinja": template.encode(),
    }
