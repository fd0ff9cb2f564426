"""Write a model in another checkpoint layout, exactly, or refuse with the reason.

    python export.py --model out/demo --to hf-llava OUT               # LlavaForConditionalGeneration; anyres: LlavaNext
    python export.py --model DIR --to hf-llava OUT --transformers 4   # differs for Gemma only
    python export.py --model DIR --to tinyllava OUT                   # TinyLLaVA Factory or -Video, one file
    python export.py --model DIR --to barellava OUT                   # our own layout, from any that we read
    python export.py --model DIR --to hf-llava OUT --dtype bfloat16
    python export.py --model DIR --adapter ADAPTER --to hf-llava OUT  # with a PEFT adapter merged into it
    python export.py --model DIR --to peft OUT                        # the adapters that a LoRA run left

Weights go out as they came in unless --dtype says otherwise. Tokenizer, image processor and, for Hugging Face, the
processor and the chat template go along, so that its chat pipelines work on the folder as it is.
"""

from __future__ import annotations

import json
from pathlib import Path

import sentencepiece
import tokenizers
import torch
from torch import Tensor

import config
import lora
from checkpoints import layouts, weights
from checkpoints.files import resolve, write_file
from checkpoints.names import Table, rename, reverse
from config import UserError
from inputs import templates
from inputs.tiling import TILED
from inputs.tokenizer import load_tokenizer
from model import LLaVA

# Families that transformers has; its LLaVA gives every one of them a head without a bias.
TOWER = "vision_tower.vision_model."
HF_FAMILIES = ("llama", "qwen2", "qwen3", "gemma", "stablelm", "phi")


def flat_state(model: LLaVA, table: Table, hf_names: bool) -> dict[str, Tensor]:
    """Every tensor of the model under a layout's names."""
    state = {}
    for name in model.PARTS:
        part = getattr(model, name)
        state |= weights.tensors(part, getattr(part, "rename", ()) if hf_names else (), f"{name}.")
    return {rename(k, reverse(table)): v for k, v in state.items()}


def write(folder: Path, state: dict[str, Tensor], files: dict[str, dict | str]):
    """Weights first, then the small files, config.json last: a folder that has it is whole."""
    weights.save(folder, state)
    for name, content in sorted(files.items(), key=lambda f: f[0] == "config.json"):
        text = (
            content
            if isinstance(content, str)
            else json.dumps(content, indent=2, ensure_ascii=False)
        )
        write_file(folder / name, text + "\n")


# ------------------------------------------------------------------------------------- Hugging Face LLaVA


def check_expressible(model: LLaVA):
    """Raises UserError naming the part that neither LlavaForConditionalGeneration nor LlavaNext's has a place for."""
    c, lm, transform = model.config, model.language_model, model.vision_tower.processor
    reason = ""
    if c.connector != "mlp2x_gelu":
        reason = f"connector {c.connector}: Hugging Face LLaVA, and the servers built on it, have the two-layer MLP alone"
    elif c.text["model_type"] not in HF_FAMILIES:
        reason = f"{c.text['model_type']}: transformers has no such class"
    elif model.vision_tower.config.hf["model_type"] not in (
        "clip_vision_model",
        "siglip_vision_model",
    ):
        reason = (
            f"encoder {model.vision_tower.config.hf['model_type']}: its LLaVA takes CLIP or SigLIP"
        )
    elif lm.lm_head.bias is not None and lm.lm_head.bias.any():
        reason = "the bias of the language model's head: Hugging Face LLaVA drops it"
    elif c.image_mode == "tiles":
        reason = "image mode tiles: Hugging Face LLaVA-NeXT has those of anyres alone"
    elif c.image_mode == "anyres" and transform.crop not in (0, transform.size):
        reason = f"anyres of {transform.crop} pixels cropped from {transform.size}: LLaVA-NeXT would crop each tile"
    if reason:
        fix = "export to barellava" if c.image_mode in TILED else "export to barellava or tinyllava"
        raise UserError("--to hf-llava", reason, fix)


def hf_llava(model: LLaVA, tok, version: int) -> tuple[dict[str, Tensor], dict[str, dict | str]]:
    """(tensors, small files) that transformers loads with nothing missing and nothing left over.

    version is the major version of transformers it is for. 5 multiplies Gemma's token embeddings by sqrt(D) and
    leaves image features alone where 4 scaled both; the connector's last linear and anyres's separator make up for it.
    """
    check_expressible(model)
    c, lm, tower = model.config, model.language_model, model.vision_tower
    state = flat_state(model, layouts.PROJECTOR, True)
    state.pop("language_model.lm_head.bias", None)
    scale = c.image_scale * (lm.config.embed_scale if version >= 5 else 1.0)
    if scale != 1:
        last = (
            "multi_modal_projector.linear_2.weight",
            "multi_modal_projector.linear_2.bias",
            "image_newline",
        )
        for key in state.keys() & last:
            state[key] = (state[key].double() * scale).to(state[key].dtype)
    vision, layer = dict(tower.config.hf), c.feature_layer
    if not tower.spares:  # made here, not loaded: there is nothing behind the feature layer
        layer = -1
        vision |= {"num_hidden_layers": len(tower.blocks), "vision_use_head": False}
        for name, value in (("weight", 1.0), ("bias", 0.0)):  # a norm that LLaVA does not run
            state[f"{TOWER}post_layernorm.{name}"] = torch.full((tower.config.width,), value)
    if layer in (-1, vision["num_hidden_layers"]):
        # transformers 4.57 puts SigLIP's final norm on the last hidden state, so it must not be the last: behind it
        # goes a block of zeros, which adds nothing.
        layer, last = -2, f"{TOWER}encoder.layers.{vision['num_hidden_layers'] - 1}."
        vision["num_hidden_layers"] += 1
        for key in [k for k in state if k.startswith(last)]:
            state[
                key.replace(last, f"{TOWER}encoder.layers.{vision['num_hidden_layers'] - 1}.")
            ] = 0 * state[key]
    token = image_token(tok, lm.config.vocab)
    vocab = max(lm.config.vocab, token + 1)
    if vocab > lm.config.vocab:
        # No row is free: add one, a copy of the first (a control token), which greedy decoding then never prefers.
        for key in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
            if key in state:
                state[key] = torch.cat([state[key], state[key][:1]])
    tied, select = lm.config.tied, {"patch": "default", "cls_patch": "full"}[c.feature_select]
    kind, images, grids = "Llava", tower.processor.to_hf(), {}
    if c.image_mode == "pad":
        images |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    if c.image_mode == "anyres":  # where crop_size is a tile's, cropped or not
        kind, side = "LlavaNext", tower.processor.side
        grids = {
            "image_grid_pinpoints": [
                [rows * side, columns * side] for rows, columns in model.views.grids
            ]
        }
        images |= {"image_processor_type": "LlavaNextImageProcessor", **grids,
                   "crop_size": {"height": side, "width": side}}  # fmt: skip
    files = {
        "config.json": {
            "model_type": {"Llava": "llava", "LlavaNext": "llava_next"}[kind],
            "architectures": [f"{kind}ForConditionalGeneration"],
            "text_config": c.text | {"vocab_size": vocab, "tie_word_embeddings": tied},
            "vision_config": vision,
            "image_token_index": token,
            "image_seq_length": model.image_tokens,
            "projector_hidden_act": "gelu",
            "vision_feature_layer": layer,
            "vision_feature_select_strategy": select,
            "tie_word_embeddings": tied,
            "dtype": str(state["language_model.model.embed_tokens.weight"].dtype).removeprefix(
                "torch."
            ),
            "transformers_version": {4: "4.57.1", 5: "5.23.0"}[version],
            **grids,
        },
        "preprocessor_config.json": images | {"processor_class": f"{kind}Processor"},
        "processor_config.json": {
            "processor_class": f"{kind}Processor",
            "patch_size": vision["patch_size"],
            "num_additional_image_tokens": len(tower.config.leading),
            "vision_feature_select_strategy": select,
            "image_token": "<image>",
        },
    }
    if tok:
        form = templates.resolve(c.template, tok)
        files |= tokenizer_files(tok, token) | {"chat_template.jinja": chat_template(form, tok)}
        stop = templates.stop_id(tok, c.template)
        files["generation_config.json"] = {
            "bos_token_id": tok.bos_id,
            "eos_token_id": stop,
            "pad_token_id": tok.pad_id,
        }
    return state, files


def image_token(tok, vocab: int) -> int:
    """The id that stands for one image position: the tokenizer's `<image>`, or the first that nothing uses."""
    if tok is None:
        return vocab
    known = tok.token_id("<image>")
    return tok.vocab_size if known is None else known


def tokenizer_files(tok, token: int) -> dict[str, dict | str]:
    """tokenizer.json and tokenizer_config.json with `<image>` as one more control token, and the ids that we train on.

    The class is transformers' plain one, which takes tokenizer.json as it is; its Llama classes rebuild it, each
    version in another way.
    """
    fast = (
        tokenizers.Tokenizer.from_str(tok.files["tokenizer.json"].decode())
        if "tokenizer.json" in tok.files
        else None
    )
    fast = fast or from_pieces(tok)
    steps = json.loads(fast.normalizer.__getstate__()) if fast.normalizer else {}
    if any(
        s.get("type") == "Prepend" for s in steps.get("normalizers", [steps])
    ) and not tok.config.get("legacy"):
        # The older form puts a word mark behind every control token too; training rows have it in front only.
        fast.normalizer = tokenizers.normalizers.Sequence([])
        fast.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("\u2581", "first", split=False)
    fast.add_special_tokens([tokenizers.AddedToken("<image>", special=True, normalized=False)])
    if fast.token_to_id("<image>") != token:
        raise UserError(
            "tokenizer.json",
            f"<image> became {fast.token_to_id('<image>')}, not {token}",
            "report this file",
        )
    kept = ("model_max_length", "clean_up_tokenization_spaces")
    # Prompts of a batch are filled up on the left: an answer goes on from the last token of each.
    settings = {k: tok.config[k] for k in kept if k in tok.config} | {"pad_token": tok.eos} | tok.named | {
        "tokenizer_class": "PreTrainedTokenizerFast", "image_token": "<image>", "padding_side": "left",
        "extra_special_tokens": {"image_token": "<image>"},
        "model_input_names": ["input_ids", "attention_mask"]}  # fmt: skip
    return {"tokenizer.json": fast.to_str(pretty=True), "tokenizer_config.json": settings}


def from_pieces(tok) -> tokenizers.Tokenizer:
    """A SentencePiece BPE model with byte fallback, Llama's kind, for `tokenizers`. Raises UserError for another."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tok.files["tokenizer.model"])
    names = [pieces.id_to_piece(i) for i in range(pieces.vocab_size())]
    vocab = {name: i for i, name in enumerate(names)}
    control = [i for i in range(len(names)) if pieces.is_control(i) or pieces.is_unknown(i)]
    merges = []
    for i, name in enumerate(names):
        if i not in control and not pieces.is_byte(i):
            pairs = [(name[:cut], name[cut:]) for cut in range(1, len(name))]
            pairs = sorted((vocab[a], vocab[b]) for a, b in pairs if a in vocab and b in vocab)
            merges += [(-pieces.get_score(i), (names[a], names[b])) for a, b in pairs]
    merges.sort(key=lambda merge: merge[0])  # stable: equal scores stay in the order of ids
    bpe = tokenizers.models.BPE(vocab, [pair for _, pair in merges], unk_token=names[pieces.unk_id()],
                                fuse_unk=True, byte_fallback=True)  # fmt: skip
    fast = tokenizers.Tokenizer(bpe)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("\u2581", "first", split=False)
    decoders = tokenizers.decoders
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast.add_special_tokens(
        [tokenizers.AddedToken(names[i], special=True, normalized=False) for i in control]
    )
    if tok.bos_id is not None:
        bos = tok.token(tok.bos_id)
        fast.post_processor = tokenizers.processors.TemplateProcessing(
            f"{bos} $A", special_tokens=[(bos, tok.bos_id)]
        )
    for text in (
        "Once upon a time, 3.14 \u00e9t\u00e9 \u4e2d\u6587",
        "two  spaces\n\ttab \u1680 \U0001f600",
    ):
        if fast.encode(text, add_special_tokens=False).ids != pieces.encode(text):
            raise UserError(
                "tokenizer.model", "is no BPE of Llama's kind", "give a tokenizer.json beside it"
            )
    return fast


# Contents may be strings or lists of {"type": "text" | "image"}; one image goes in front, as in training.
FLATTEN = """\
{%- set ns = namespace(turns=[], text='', images=0) -%}
{%- for message in messages -%}
{%- if message.content is string -%}{%- set ns.text = message.content -%}
{%- else -%}
{%- set ns.text = '' -%}{%- set ns.images = 0 -%}
{%- for part in message.content if part.type == 'image' -%}{%- set ns.images = ns.images + 1 -%}{%- endfor -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}{%- set ns.text = ns.text + part.text -%}
{%- elif ns.images > 1 -%}{%- set ns.text = ns.text + '<image>\\n' -%}{%- endif -%}
{%- endfor -%}
{%- if ns.images == 1 -%}{%- set ns.text = '<image>\\n' + ns.text | trim -%}{%- endif -%}
{%- endif -%}
{%- set ns.turns = ns.turns + [{'role': message.role, 'content': ns.text}] -%}
{%- endfor -%}
{%- set messages = ns.turns -%}
"""


def chat_template(form, tok) -> str:
    """The model's template as Jinja, for processors: what `form` renders, character for character."""
    # A Llama vocabulary starts the text behind an image with a word mark of its own, as LLaVA's training rows have it;
    # transformers puts one at the very front only, where a blank in the template does the same.
    flatten = FLATTEN.replace(
        "ns.text}", "ns.text | replace('<image>', '<image> ')}" if tok.marks_words else "ns.text}"
    )
    if isinstance(form, templates.Chat):
        return tok.chat_template if form.lists else flatten + tok.chat_template
    quote = lambda text: json.dumps(text, ensure_ascii=False)  # noqa: E731  Jinja reads JSON's strings
    before, _, after = form.question.replace("{images}", "{q}").partition("{q}")
    lead, _, trail = form.answer.partition("{a}")
    system = quote(form.system or "")
    return flatten + (
        "{%- if messages[0].role == 'system' -%}\n"
        "{%- set text = messages[0].content | trim -%}{{ text + ' ' if text else '' }}\n"
        "{%- set messages = messages[1:] -%}\n"
        f"{{%- else -%}}{{{{ {system} }}}}{{%- endif -%}}\n"
        "{%- for message in messages -%}\n"
        f"{{%- if message.role == 'user' -%}}{{{{ {quote(before)} + message.content + {quote(after)} }}}}\n"
        f"{{%- else -%}}{{{{ {quote(lead)} + message.content + {quote(trail + form.eos)} }}}}{{%- endif -%}}\n"
        "{%- endfor -%}\n"
    )


# -------------------------------------------------------------------------------------------- the command


OPENED_BY = {
    "hf-llava": "transformers: `AutoModelForImageTextToText.from_pretrained(DIR)` and `AutoProcessor`",
    "tinyllava": "TinyLLaVA Factory, with a video's connector TinyLLaVA-Video: `load_pretrained_model(DIR)`",
    "barellava": "barellava: `python generate.py --model DIR --image FILE`, or `--video FILE`",
}


def card(model: LLaVA, to: str) -> str:
    """README.md of an exported folder."""
    c, count = model.config, sum(p.numel() for p in model.parameters()) / 1e6
    names = {part: c.sources.get(key) or f"{hf.get('model_type')}, of random weights or an unknown source"
             for part, key, hf in (("language model", "llm", c.text), ("encoder", "vision", c.vision))}  # fmt: skip
    lines = [f"- {part}: {name}" for part, name in names.items()]
    mode = f"{c.image_mode}, grids {c.image_grids}" if c.image_mode in TILED else c.image_mode
    lines.append(
        f"- connector: {c.connector}; {model.image_tokens} tokens for an image of one view, image mode {mode}"
    )
    if (
        to != "hf-llava"
    ):  # Factory's config.json has no place for them, and transformers' class takes no video
        lines.append(
            f"- frames of a video: {c.frames}" + f" at most, {c.fps:g} a second" * (c.fps > 0)
        )
    lines += [
        f"- chat template: {c.template}",
        f"- {count:.1f}M parameters",
        "",
        f"Opens in {OPENED_BY[to]}",
    ]
    return "# A small multimodal model\n\n" + "\n".join(lines)


def export(model: LLaVA, tok, to: str, folder: Path, version: int = 5):
    """Write `model` and its tokenizer (or None) to `folder`. Raises UserError for what the layout cannot express."""
    if to == "hf-llava":
        state, files = hf_llava(model, tok, version)
        write(folder, state, files | {"README.md": card(model, to)})
        return
    layout = layouts.LAYOUTS[to]
    settings = layout.writes(model.config)
    if tok:
        tok.save(folder)
    write(folder, flat_state(model, layout.table, layout.hf_names), {
        "preprocessor_config.json": model.vision_tower.processor.to_hf(), "README.md": card(model, to),
        "config.json": settings})  # fmt: skip


def export_peft(adapter: Path, out: Path):
    """The PEFT files that train.py left beside a model that it had tuned with LoRA, whole. Raises UserError."""
    if not (adapter / "adapter_config.json").exists():
        raise UserError(
            adapter, "no adapters", "give the output folder of a run that tuned something as lora"
        )
    tensors = weights.read_file(adapter / "adapter_model.safetensors")
    write_file(
        out / "adapter_model.safetensors", (adapter / "adapter_model.safetensors").read_bytes()
    )
    write_file(out / "adapter_config.json", (adapter / "adapter_config.json").read_text())
    print(f"{out}: peft, {sum(t.numel() for t in tensors.values()) / 1e6:.1f}M parameters")


def main(argv: list[str]):
    parser = config.parser(__doc__)
    parser.add_argument("out", help="folder to write; must not exist, or be empty")
    parser.add_argument(
        "--model", required=True, help="folder or Hugging Face id, in any layout that we read"
    )
    parser.add_argument("--to", required=True, choices=("hf-llava", "tinyllava", "barellava", "peft"),
                        help="the layout")  # fmt: skip
    parser.add_argument("--adapter", help="folder of a PEFT adapter to merge first")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (as they are)"
    )
    parser.add_argument(
        "--transformers",
        type=int,
        choices=(4, 5),
        default=5,
        help="hf-llava: for which of them (5)",
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", help="also read pytorch_model.bin, tensors only"
    )
    a = parser.parse_args(argv)
    out = Path(a.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(out, "exists", "name a new folder")
    folder = resolve(a.model, allow_pickle=a.allow_pickle)
    if a.to == "peft":
        return export_peft(folder / "adapter", out)
    model = LLaVA.from_pretrained(
        folder, a.dtype and getattr(torch, a.dtype), allow_pickle=a.allow_pickle
    )
    if a.adapter:
        lora.load_adapter(Path(a.adapter), model, layouts.ADAPTED)
        lora.merge(model)
    if a.dtype:
        model.vision_tower.spares = {
            k: v.to(getattr(torch, a.dtype)) for k, v in model.vision_tower.spares.items()
        }
    try:
        tok = load_tokenizer(folder)
    except ValueError as e:
        print(f"warning: exported without a tokenizer: {e}")
        tok = None
    export(model, tok, a.to, out, a.transformers)
    size = sum(f.stat().st_size for f in out.iterdir()) / 1e9
    print(
        f"{out}: {a.to}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {size:.2f} GB"
    )
    for file in sorted(out.iterdir()):
        print(f"  {file.name}")


if __name__ == "__main__":
    config.cli(main, __doc__)
