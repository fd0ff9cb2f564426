"""GGUF files of the text side, read back with llama.cpp's own package and compared with the model.

python -m pytest tests/checkpoints/test_gguf.py

What llama.cpp answers with them is in test_llama_cpp.py.
"""

import json
import sys
from dataclasses import replace

import gguf as package
import jinja2.sandbox
import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers

import export
import lora
from checkpoints import gguf, gguf_check, gguf_file, gguf_lora, gguf_tokenizer, peft, weights
from config import LoRA, UserError
from inputs import templates
from inputs.tokenizer import WORDS, JsonTokenizer, load_tokenizer
from model import LLaVA
from tests.tools.gguf_models import CHAT, LISTS, TOKENIZER, configurations, llava, with_chat
from tests.tools.vocabularies import train_pieces, turns, write

CONFIGURATIONS = configurations()
REFUSED = ("smollm3-1", "gemma3_text-1", "phi-1")
EXPRESSIBLE = [name for name in CONFIGURATIONS if name not in REFUSED]


def read(path):
    """Return the keys of a file, and its tensors as torch has them."""
    reader = package.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        values = package.quants.dequantize(tensor.data, tensor.tensor_type)
        tensors[tensor.name] = torch.tensor(values)
    return fields, tensors


def text_file(model, tmp_path, file_type="float32", tokenizer=TOKENIZER):
    gguf.write(tmp_path, model, tokenizer, file_type)
    return read(tmp_path / gguf.MODEL)


# ------------------------------------------------------------------------------ tensors and keys


def halves(tensor, d):
    """Return rows of which neighbours turn together as rows of which the halves of a head do."""
    heads = []
    for head in tensor.split(d):
        heads += [head[0::2], head[1::2]]
    return torch.cat(heads)


def layer_of(family, tensors, i, c):
    """Return the parameters of block i under our names, of what a file has."""
    layer = c.layers[i]
    blk = {}
    for name, tensor in tensors.items():
        if name.startswith(f"blk.{i}."):
            blk[name.removeprefix(f"blk.{i}.")] = tensor

    names = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    if family == "phi":
        names |= {"ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"}
    if family == "gemma3_text":
        names["ffn_norm"] = "pre_feedforward_layernorm"
        names["post_attention_norm"] = "post_attention_layernorm"
        names["post_ffw_norm"] = "post_feedforward_layernorm"

    ours = {}
    for name, tensor in blk.items():
        stem, _, kind = name.rpartition(".")
        if family in ("llama", "mistral", "smollm3") and stem in ("attn_q", "attn_k"):
            tensor = halves(tensor, c.head_dim)
        if family in ("gemma", "gemma3_text") and stem.endswith("norm"):
            if stem == "attn_q_norm":
                tensor = tensor / (c.score_scale * c.head_dim**0.5)
            tensor = tensor - 1

        if stem == "attn_qkv":
            rows = [count * c.head_dim for count in (layer.heads, layer.kv_heads, layer.kv_heads)]
            for letter, part in zip("qkv", tensor.split(rows), strict=True):
                ours[f"self_attn.{letter}_proj.{kind}"] = part
        elif family == "phi3" and stem == "ffn_up":
            ours[f"mlp.gate_proj.{kind}"], ours[f"mlp.up_proj.{kind}"] = tensor.chunk(2)
        elif family == "stablelm" and stem in ("attn_q_norm", "attn_k_norm"):
            for head, row in enumerate(tensor):
                ours[f"{names[stem]}.norms.{head}.{kind}"] = row
        else:
            ours[f"{names[stem]}.{kind}"] = tensor
    return ours


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_every_parameter_of_each_family_is_in_the_file(name, tmp_path):
    hf = CONFIGURATIONS[name]
    family = hf["model_type"]
    model = llava(hf)
    lm = model.language_model
    fields, tensors = text_file(model, tmp_path)

    found = {}
    for i in range(len(lm.config.layers)):
        for key, tensor in layer_of(family, tensors, i, lm.config).items():
            found[f"model.layers.{i}.{key}"] = tensor
    less = 1 if family in ("gemma", "gemma3_text") else 0
    found["model.norm.weight"] = tensors["output_norm.weight"] - less
    found["model.embed_tokens.weight"] = tensors["token_embd.weight"]
    for theirs, ours in (
        ("output_norm.bias", "model.norm.bias"),
        ("output.weight", "lm_head.weight"),
        ("output.bias", "lm_head.bias"),
    ):
        if theirs in tensors:
            found[ours] = tensors[theirs]
    if lm.config.tied:
        assert ("lm_head.weight" in found) == (family in ("stablelm", "phi"))
        found["lm_head.weight"] = lm.lm_head.weight

    # Subtracting 1 again, and dividing, rounds.
    state = lm.state_dict()
    assert found.keys() == state.keys()
    exact = family not in ("gemma", "gemma3_text")
    for key, tensor in state.items():
        limit = 0 if exact else 2e-7
        assert torch.allclose(found[key], tensor, rtol=0, atol=limit), key

    # The keys.
    c = lm.config
    arch = fields["general.architecture"]
    assert arch == gguf.FAMILIES[family].architecture
    assert fields[f"{arch}.block_count"] == len(c.layers)
    assert fields[f"{arch}.embedding_length"] == c.width
    assert fields[f"{arch}.vocab_size"] == c.vocab == len(fields["tokenizer.ggml.tokens"])
    assert fields[f"{arch}.rope.dimension_count"] == c.rotary_dim
    assert fields[f"{arch}.attention.key_length"] == c.head_dim
    heads = fields[f"{arch}.attention.head_count"]
    assert heads == ([4, 6] if family == "openelm" else c.layers[0].heads)
    kind = "layer_norm_epsilon" if family in ("stablelm", "phi") else "layer_norm_rms_epsilon"
    assert fields[f"{arch}.attention.{kind}"] == pytest.approx(lm.model.norm.eps)
    assert fields[f"{arch}.rope.freq_base"] == pytest.approx(c.rope_theta)


def test_phi_has_a_head_and_a_bias_in_any_case(tmp_path):
    changes = {"lm_head_bias": False, "tie_word_embeddings": True}
    model = llava(CONFIGURATIONS["phi-0"] | changes)
    _, tensors = text_file(model, tmp_path)
    assert torch.equal(tensors["output.weight"], tensors["token_embd.weight"])
    assert torch.equal(tensors["output.bias"], torch.zeros(CONFIGURATIONS["phi-0"]["vocab_size"]))


def test_what_scales_the_rotation(tmp_path):
    """Divisors as tensors, one factor as a key; and how far both compute the same."""
    for name in ("llama-2", "mistral-1", "phi3-0", "phi3-1", "gemma3_text-0"):
        (tmp_path / name).mkdir()
    model = llava(CONFIGURATIONS["llama-2"])
    _, tensors = text_file(model, tmp_path / "llama-2")
    short = torch.tensor(model.language_model.config.rope_scaling.short)
    assert torch.equal(tensors["rope_freqs.weight"], short) and len(set(short.tolist())) > 2

    fields, _ = text_file(llava(CONFIGURATIONS["mistral-1"]), tmp_path / "mistral-1")
    assert fields["llama.rope.scaling.type"] == "linear"
    assert fields["llama.rope.scaling.factor"] == 2.5
    assert fields["llama.context_length"] == 4  # its window

    fields, tensors = text_file(llava(CONFIGURATIONS["phi3-0"]), tmp_path / "phi3-0")
    assert fields["phi3.context_length"] == fields["phi3.rope.scaling.original_context_length"]
    assert fields["phi3.context_length"] == 12 and fields["phi3.rope.scaling.attn_factor"] > 1
    assert tensors["rope_factors_short.weight"][1] == pytest.approx(1.1)
    assert tensors["rope_factors_long.weight"][1] == pytest.approx(2.1)

    fields, _ = text_file(llava(CONFIGURATIONS["gemma3_text-0"]), tmp_path / "gemma3_text-0")
    assert fields["gemma3.attention.sliding_window"] == 3
    assert fields["gemma3.attention.sliding_window_pattern"] == 2
    assert fields["gemma3.rope.freq_base_swa"] == pytest.approx(123.4)
    assert fields["gemma3.rope.scaling.factor"] == 8


@pytest.mark.parametrize("file_type", gguf_file.FILE_TYPES)
def test_file_types(file_type, tmp_path):
    """Norms and biases are float32, rows that are not whole blocks float16; the check sees all."""
    hf = CONFIGURATIONS["stablelm-1"] | {"hidden_size": 96, "intermediate_size": 80}
    model = llava(hf)
    text_file(model, tmp_path, file_type)
    types = {}
    for tensor in package.GGUFReader(tmp_path / gguf.MODEL).tensors:
        types[tensor.name] = tensor.tensor_type.name
    _, matrices = gguf_file.FILE_TYPES[file_type]
    assert types["blk.0.attn_q.weight"] == matrices
    head = "Q8_0" if file_type == "q4_0" else matrices
    assert types["token_embd.weight"] == types["output.weight"] == head
    assert types["blk.0.attn_norm.weight"] == types["blk.0.attn_q_norm.weight"] == "F32"
    down = "F16" if file_type.startswith("q") else matrices
    assert types["blk.0.ffn_down.weight"] == down  # rows of 80
    gguf.check(tmp_path, model, TOKENIZER, file_type)

    # One number that is another one.
    weight = model.language_model.model.layers[1].mlp.down_proj.weight
    weight[2, 3] += 0.5
    with pytest.raises(UserError, match="blk.1.ffn_down.weight: not what the model has"):
        gguf.check(tmp_path, model, TOKENIZER, file_type)


def test_the_type_of_the_weights_is_kept(tmp_path):
    model = llava(CONFIGURATIONS["llama-0"]).bfloat16()
    gguf.write(tmp_path, model, TOKENIZER)
    reader = package.GGUFReader(tmp_path / gguf.MODEL)
    assert reader.fields["general.file_type"].contents() == 32
    gguf.check(tmp_path, model, TOKENIZER)
    model.language_model.config = replace(model.language_model.config, rope_theta=9.0)
    with pytest.raises(UserError, match="llama.rope.freq_base: not what the model has"):
        gguf.check(tmp_path, model, TOKENIZER)


# ---------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "name, changes, why",
    [
        ("phi-1", {}, "qk_layernorm: llama.cpp has no norm of queries and keys in phi"),
        ("smollm3-1", {}, "q_proj.bias: llama.cpp adds no such bias in smollm3"),
        ("gemma3_text-1", {}, "q_proj.bias: llama.cpp adds no such bias in gemma3_text"),
        ("gemma-0", {"tie_word_embeddings": False}, "a head of its own"),
        ("openelm", {"share_input_output_layers": False}, "a head of its own"),
        ("qwen2-0", {"head_dim": 10}, "heads that are not as wide as the model"),
        ("llama-1", {"partial_rotary_factor": 0.7}, "a rotation of a part of each head"),
        ("smollm3-0", {"no_rope_layer_interval": 3}, "not every 4th"),
        (
            "gemma3_text-0",
            {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
            "without a window that are not every n-th",
        ),
        (
            "qwen2-1",
            {"rope_scaling": CONFIGURATIONS["llama-3"]["rope_scaling"]},
            "a scaled rotation that llama.cpp does not read in qwen2",
        ),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused(name, changes, why, tmp_path):
    model = llava(CONFIGURATIONS[name] | changes)
    with pytest.raises(UserError, match=why) as refused:
        gguf.write(tmp_path, model, TOKENIZER)
    assert "\n" not in str(refused.value) and "; fix: " in str(refused.value)
    assert not list(tmp_path.iterdir())

    # A plan asks the same of a model without values.
    with weights.empty(), pytest.raises(UserError, match=why):
        gguf.check_expressible(LLaVA(model.config))


# ------------------------------------------------------------------------------- the tokenizer


def byte_level(*steps, normalizer=None, ignore_merges=False, model=None):
    """Return a byte-level BPE with these pre-tokenizers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "he", "the"])}
    merges = [("h", "e"), ("t", "he")]
    fast = tokenizers.Tokenizer(
        model or models.BPE(vocabulary, merges, ignore_merges=ignore_merges)
    )
    fast.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    fast.add_special_tokens(["</s>"])
    fast.add_tokens(["   "])
    spec = json.loads(fast.to_str()) | {"normalizer": normalizer}
    return JsonTokenizer(
        {
            "tokenizer.json": json.dumps(spec).encode(),
            "tokenizer_config.json": b'{"eos_token": "</s>"}',
        }
    )


def words(pattern):
    return pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def fields_of(tokenizer, rows=None, **config):
    hf = CONFIGURATIONS["llama-0"] | {"vocab_size": rows or tokenizer.vocab_size + 2}
    return gguf_tokenizer.tokenizer_fields(llava(hf, **config), tokenizer)


@pytest.mark.parametrize(
    "pre, tokenizer",
    [
        ("gpt-2", byte_level(GPT2)),
        ("smollm", byte_level(pre_tokenizers.Digits(individual_digits=True), GPT2)),
        ("qwen2", byte_level(words(WORDS["Qwen2Tokenizer"]), BYTES, normalizer={"type": "NFC"})),
        ("smaug-bpe", byte_level(words(gguf_tokenizer.LLAMA3), BYTES)),
        ("llama-bpe", byte_level(words(gguf_tokenizer.LLAMA3), BYTES, ignore_merges=True)),
    ],
)
def test_byte_level_tokens(pre, tokenizer):
    fields = fields_of(tokenizer)
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == pre
    assert fields["tokenizer.ggml.merges"] == ["h e", "t he"]
    tokens = fields["tokenizer.ggml.tokens"]
    kinds = fields["tokenizer.ggml.token_type"]
    size = tokenizer.vocab_size
    assert [tokenizer.token(i) for i in range(size)] == tokens[:size]
    assert tokens[size:] == [f"[PAD{size}]", f"[PAD{size + 1}]"]
    assert kinds == [1] * 258 + [3, 4] + [5, 5]
    assert fields["tokenizer.ggml.eos_token_id"] == 258
    assert fields["tokenizer.ggml.add_bos_token"] is False
    with pytest.raises(UserError, match="id 257 is 'the', and 'he' in the tokenizer"):
        gguf_tokenizer.check_tokens([*tokens[:256], "he", "the"], Swapped(tokenizer))


class Swapped:
    """A tokenizer whose ids 256 and 257 are those of another one."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def token(self, i):
        return "he" if i == 257 else self.tokenizer.token(i)


@pytest.mark.parametrize(
    "tokenizer, why",
    [
        (byte_level(words(r"\w+|\s+"), BYTES), "pre-tokenizer that llama.cpp has no name for"),
        (byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "pre-tokenizer that"),
        (byte_level(words(gguf_tokenizer.LLAMA3), GPT2), "pre-tokenizer that"),
        (byte_level(GPT2, ignore_merges=True), "pre-tokenizer that"),
        (byte_level(pre_tokenizers.Digits(individual_digits=False), GPT2), "pre-tokenizer that"),
        (byte_level(GPT2, normalizer={"type": "NFKC"}), "the normalizer NFKC"),
        (byte_level(GPT2, model=models.WordLevel({"a": 0}, unk_token="a")), "kind WordLevel"),
        (templates.byte_tokenizer(), "pre-tokenizer that"),
    ],
)
def test_a_tokenizer_that_splits_text_otherwise_is_refused(tokenizer, why):
    with pytest.raises(UserError, match=why):
        fields_of(tokenizer)


def taking(tokenizer, **flags):
    """Return a tokenizer whose </s> has these flags."""
    spec = json.loads(tokenizer.files["tokenizer.json"])
    for token in spec["added_tokens"]:
        if token["content"] == "</s>":
            token |= flags
    return JsonTokenizer(tokenizer.files | {"tokenizer.json": json.dumps(spec).encode()})


@pytest.mark.parametrize(
    "flags, why",
    [
        ({"rstrip": True}, "'</s>' takes in the space behind it"),
        ({"lstrip": True}, "'</s>' looks at what is before it"),
        ({"single_word": True}, "'</s>' looks at what is before it"),
    ],
)
def test_a_control_token_that_takes_in_space_is_refused(flags, why):
    with pytest.raises(UserError, match=why):
        fields_of(taking(TOKENIZER, **flags))


def test_control_tokens_that_take_in_space_as_those_of_phi_3_do():
    taking = {"<unk>": False, "<s>": False, "<|endoftext|>": False, "</s>": True, "<|end|>": True}
    flags = {"lstrip": False, "single_word": False}
    added = [{"content": name, "rstrip": takes, **flags} for name, takes in taking.items()]
    fields = gguf_tokenizer.spaces_behind_controls({"added_tokens": added})
    assert fields == {"general.name": "phi-3"}
    for one in added:
        other = [token | {"rstrip": token["rstrip"] != (token is one)} for token in added]
        with pytest.raises(UserError, match="takes in the space behind it"):
            gguf_tokenizer.spaces_behind_controls({"added_tokens": other})


def test_a_token_without_an_embedding_is_refused():
    tokenizer = byte_level(GPT2)
    with pytest.raises(UserError, match="token 259 of the tokenizer has no embedding"):
        fields_of(tokenizer, rows=259)
    with pytest.raises(UserError, match="no tokenizer"):
        gguf_tokenizer.tokenizer_fields(llava(CONFIGURATIONS["llama-0"]), None)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A SentencePiece vocabulary, and the same as a tokenizer.json."""
    folder = tmp_path_factory.mktemp("pieces")
    tokenizer = load_tokenizer(write(folder / "model", train_pieces()))
    spec = gguf_tokenizer.specification(tokenizer)
    fast = tokenizers.Tokenizer.from_str(json.dumps(spec))
    return tokenizer, load_tokenizer(write(folder / "json", fast, eos_token="</s>")), spec


def test_sentencepiece_tokens(pieces):
    model, fast, spec = pieces
    fields = fields_of(model, template="llama")
    assert fields["tokenizer.ggml.model"] == "llama"
    tokens = fields["tokenizer.ggml.tokens"]
    assert tokens[:-2] == [model.token(i) for i in range(model.vocab_size)]
    assert fields["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.add_space_prefix"] is False

    # Pieces have the order of their scores.
    scores = dict(zip(tokens, fields["tokenizer.ggml.scores"], strict=True))
    made = ["".join(merge) for merge in spec["model"]["merges"]]
    theirs = sorted(set(made), key=lambda piece: -scores[piece])
    ours = sorted(set(made), key=model.token_id)
    assert theirs == ours
    same = fields_of(fast, template="llama")
    assert same["tokenizer.ggml.scores"] == fields["tokenizer.ggml.scores"]


def add_piece(spec):
    """Add a piece which makes another one, together with a character, that no merge tells of."""
    vocabulary = spec["model"]["vocab"]
    left, right = spec["model"]["merges"][-1]
    tail = (left + right)[1:]
    assert tail not in vocabulary
    vocabulary[tail] = len(vocabulary)


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda spec: spec["model"]["merges"].append(spec["model"]["merges"][0]), "are apart"),
        (add_piece, "without some merges into"),
        (lambda spec: spec["model"].update(ignore_merges=True), "no BPE of Llama's kind"),
        (lambda spec: spec.update(normalizer={"type": "NFKC"}), "the normalizer NFKC"),
        (
            lambda spec: spec.update(pre_tokenizer={"type": "Whitespace"}),
            "the pre-tokenizer Whitespace",
        ),
        (
            lambda spec: spec["pre_tokenizer"].update(prepend_scheme="always"),
            "the pre-tokenizer Metaspace",
        ),
    ],
)
def test_a_sentencepiece_of_another_kind_is_refused(change, why, pieces):
    _, fast, spec = pieces
    changed = json.loads(json.dumps(spec))
    change(changed)
    files = fast.files | {"tokenizer.json": json.dumps(changed).encode()}
    with pytest.raises(UserError, match=why):
        fields_of(JsonTokenizer(files), template="llama")


# --------------------------------------------------------------------------------- the template


def rendered(fields, messages):
    """Return what the chat template of a file makes of messages."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment()
    source = environment.from_string(fields["tokenizer.chat_template"])
    return source.render(messages=messages, add_generation_prompt=True)


MARK = "<__media_aB3x__>"


@pytest.mark.parametrize("template", ["plain", "llama", CHAT, LISTS])
@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_the_template_writes_what_training_writes(template, kind, pieces):
    tokenizer, blank = TOKENIZER, ""
    if kind == "pieces":
        _, tokenizer, _ = pieces
        blank = " "
    if template in (CHAT, LISTS):
        tokenizer = with_chat(tokenizer, template)
        template = "chat"
    fields = fields_of(tokenizer, template=template)

    form = templates.choose_template(template, tokenizer)
    values = ["<image>\nWho?", "A dog.", "And a<b __>?"]
    text = templates.render(turns(*values), form, prompt=True).text
    picture = {"role": "user", "content": f"{MARK}Who?"}
    messages = [
        picture,
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": "And a<b __>?"},
    ]
    assert rendered(fields, messages) == blank + text.replace("<image>", MARK + blank)

    # A picture goes in front of the words, several stay where they are.
    behind = [{"role": "user", "content": f"Who? {MARK}"}]
    assert rendered(fields, behind) == rendered(fields, messages[:1])
    text = templates.render(turns("<image>\n<image>\nWho?"), form, prompt=True).text
    two = [{"role": "user", "content": f"{MARK}{MARK}Who?"}]
    expected = blank + text.replace("<image>", MARK + blank)
    assert rendered(fields, two) == expected.replace(f"{MARK}{blank}{MARK}", MARK + MARK)


# ------------------------------------------------------------------------------------ adapters


def adapted(name="llama-0", part="language_model", patterns="", **options):
    model = llava(CONFIGURATIONS[name])
    settings = {"r": 4, "alpha": 6.0, "dropout": 0.0, **options}
    lora.apply(model, LoRA(targets=patterns, **settings), [part])
    generator = torch.Generator().manual_seed(0)
    for adapter in lora.adapters(model).values():
        adapter.lora_B.data.normal_(generator=generator)
    return model


@pytest.mark.parametrize("rslora, alpha", [(False, 6.0), (True, 12.0)])
def test_an_adapter(rslora, alpha, tmp_path):
    model = adapted(rslora=rslora)
    gguf_lora.write(tmp_path, model)
    fields, tensors = read(tmp_path / gguf_lora.FILE)
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama" and fields["adapter.lora.alpha"] == alpha
    block = model.language_model.model.layers[1]
    q, down = block.self_attn.q_proj, block.mlp.down_proj
    assert torch.equal(tensors["blk.1.attn_q.weight.lora_a"], q.lora_A)
    assert torch.equal(halves(tensors["blk.1.attn_q.weight.lora_b"], 10), q.lora_B)
    assert torch.equal(tensors["blk.1.ffn_down.weight.lora_b"], down.lora_B)
    assert len(tensors) == 2 * len(lora.adapters(model))


def test_adapters_of_several_scales_have_one_alpha(tmp_path):
    model = adapted(patterns="q_proj")
    lora.apply(model, LoRA(targets="v_proj", r=2, alpha=5.0), ["language_model"])
    v = model.language_model.model.layers[0].self_attn.v_proj
    torch.nn.init.normal_(v.lora_B)
    gguf_lora.write(tmp_path, model)
    fields, tensors = read(tmp_path / gguf_lora.FILE)
    scale = fields["adapter.lora.alpha"] / 2
    assert torch.allclose(scale * tensors["blk.0.attn_v.weight.lora_b"], 2.5 * v.lora_B)


@pytest.mark.parametrize(
    "options, why",
    [
        ({"dora": True}, "DoRA"),
        ({"part": "connector"}, "an adapter of connector.0: llama.cpp has those of"),
        ({"name": "phi3-2", "patterns": "q_proj"}, "in one tensor with others"),
        ({"name": "openelm", "patterns": "k_proj"}, "in one tensor with others"),
        ({"name": "phi-1"}, "qk_layernorm"),
    ],
)
def test_an_adapter_without_a_place_is_refused(options, why, tmp_path):
    with pytest.raises(UserError, match=why):
        gguf_lora.write(tmp_path, adapted(**options))
    assert not list(tmp_path.iterdir())


def test_what_was_trained_whole_is_refused(tmp_path):
    model = adapted(patterns="q_proj")
    model.language_model.model.norm.weight.requires_grad_(True)
    with pytest.raises(UserError, match="model.norm.weight was trained whole"):
        gguf_lora.write(tmp_path, model)


# ----------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a run that tuned LoRA: a merged model, and the adapter beside it."""
    folder = tmp_path_factory.mktemp("run") / "model"
    model = peft.merge_and_save_adapters(adapted(), folder, "base")
    export.export(model, TOKENIZER, "barellava", folder)
    return folder


def exported(folder, *options):
    """Run export.py in this process."""
    export.main(["--model", str(folder), *map(str, options)])


def test_the_command(folder, tmp_path, capsys):
    exported(folder, "--to", "gguf", tmp_path / "a")
    said = capsys.readouterr().out
    assert "llama-server -m" in said and "Q4_K_M" in said
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["mmproj.gguf", "model.gguf"]

    exported(folder, "--to", "gguf", tmp_path / "b", "--dtype", "q8_0")
    assert "Q4_K_M" not in capsys.readouterr().out
    fields, _ = read(tmp_path / "b" / gguf.MODEL)
    assert fields["general.file_type"] == 7
    fields, _ = read(tmp_path / "b" / gguf.MMPROJ)
    assert fields["general.file_type"] == 1

    exported(folder, "--to", "gguf-lora", tmp_path / "c")
    _, tensors = read(tmp_path / "c" / gguf_lora.FILE)
    assert torch.equal(tensors["blk.0.ffn_up.weight.lora_a"], first_adapter().lora_A)


def first_adapter():
    return adapted().language_model.model.layers[0].mlp.up_proj


def test_options_of_gguf_files_only(folder, tmp_path):
    for options in (["--dtype", "q4_0"], ["--check"]):
        with pytest.raises(UserError, match="of GGUF files only"):
            exported(folder, "--to", "tinyllava", tmp_path / "a", *options)
    with pytest.raises(UserError, match="of GGUF files only"):
        exported(folder, "--to", "gguf-lora", tmp_path / "a", "--check")
    assert not (tmp_path / "a").exists()


def test_the_check(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gguf_check.importlib.util, "find_spec", lambda name: None)
    exported(folder, "--to", "gguf", tmp_path / "a", "--check", "--dtype", "float16")
    said = capsys.readouterr().out
    assert "every tensor, token and key" in said and "xllamacpp is not installed" in said

    # Where it finds a mistake, nothing stays.
    monkeypatch.setattr(gguf_file, "holds", lambda *_: False)
    with pytest.raises(UserError, match="model.gguf:token_embd.weight: not what the model has"):
        exported(folder, "--to", "gguf", tmp_path / "b", "--check")
    assert not (tmp_path / "b").exists()


def test_without_the_package(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"not installed; fix: pip install '.\[gguf\]'"):
        exported(folder, "--to", "gguf", tmp_path / "a")
    assert not (tmp_path / "a").exists()
