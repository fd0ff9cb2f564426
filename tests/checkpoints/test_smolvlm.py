"""SmolVLM and Idefics3: pixels, ids, logits and files are those of transformers."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from checkpoints.files import read_json
from checkpoints.folder import named_tensors
from checkpoints.layouts import read_config
from checkpoints.smolvlm import TABLE
from config import UserError
from evals.own_rows import room_for_answers
from evaluate import items_of_example
from export import export
from generate import Chat
from inference.answer import answer
from inputs import templates
from inputs.pictures import load_image
from inputs.rows import open_rows
from inputs.sample import SampleSpec
from inputs.tokenizer import load_tokenizer
from model import LLaVA, tiling_of
from packing import IGNORE, IMAGE_TOKEN, expand_images
from tests.tools.environment import ROOT, run, shared
from tests.tools.refused_exports import check_refusals
from tests.tools.sample_rows import make_sample, turns
from tests.tools.training_runs import one_line
from tests.tools.vocabularies import byte_level

transformers = pytest.importorskip("transformers", reason="the oracle: pip install .[dev]")

PHOTOS = (
    "astronaut.png",
    "australia.jpg",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "cow_in_beach.jpg",
    "horse.png",
    "rocket.jpg",
)
SIZES = ((3, 5), (1, 1), (900, 1), (1, 700), (217, 216), (101, 99), (2000, 1500))

# SmolVLM's own template, in a few words.
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

# Two small odd models: 9 x 9 patches in squares of 3, and 6 x 6 in squares of 2 with an odd edge.
MODELS = {
    "SmolVLM": {
        "text": {"num_attention_heads": 6, "num_key_value_heads": 2},
        "vision": {"image_size": 54, "patch_size": 6},
        "factor": 3,
        "edge": 216,
        "tied": True,
    },
    "Idefics3": {
        "text": {"num_attention_heads": 4, "num_key_value_heads": 1, "rope_theta": 777.0},
        "vision": {"image_size": 42, "patch_size": 7},
        "factor": 2,
        "edge": 101,
        "tied": False,
    },
}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with SmolVLM's control tokens, in which line breaks merge."""
    marks = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    controls = ["<|endoftext|>", "<|im_start|>", *marks, "<global-img>"]
    controls += ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    fast = byte_level(controls, 400)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|endoftext|>",
        add_bos_token=False,
    )


def published(kind: str, folder):
    """Write a small random model with its processor; return both."""
    given = MODELS[kind]
    tok = tokenizer()
    side = given["vision"]["image_size"]
    sequence = (side // given["vision"]["patch_size"] // given["factor"]) ** 2
    images = getattr(transformers, f"{kind}ImageProcessorPil")(
        size={"longest_edge": given["edge"]}, max_image_size={"longest_edge": side}
    )
    # SmolVLM's processor needs a package more; Idefics3's writes the same text.
    processor = transformers.Idefics3Processor(
        images, tok, image_seq_len=sequence, chat_template=TEMPLATE
    )
    config = getattr(transformers, f"{kind}Config")(
        text_config={
            "model_type": "llama",
            "vocab_size": len(tok) + 3,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            **given["text"],
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            **given["vision"],
        },
        scale_factor=given["factor"],
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=given["tied"],
        pad_token_id=tok.pad_token_id,
    )
    torch.manual_seed(7)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.2)
            if p.dim() == 1:
                p.add_(1.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


@pytest.fixture(scope="module", params=["SmolVLM", "Idefics3"])
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model, processor = published(request.param, folder)
    return request.param, folder, model, processor


def photos():
    folder = shared("assets/images/photos")
    return [load_image(folder / name) for name in PHOTOS]


def drawn(size) -> Image.Image:
    """Return a picture of noise."""
    width, height = size
    noise = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(width))
    return Image.fromarray(noise.to(torch.uint8).numpy())


def expanded(ids, views, items) -> list[int]:
    """Return prompt ids with the text of each item in place, -200 where a feature goes."""
    left = iter(items)
    row = []
    for i in ids:
        if i == IMAGE_TOKEN:
            row += views.placeholder(next(left).shape)
        else:
            row.append(int(i))
    return row


def asked(question: str, images: int) -> tuple[list[dict], list[dict]]:
    """Return a question behind so many pictures: our turns, and transformers' messages."""
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    conversation = [{"from": "human", "value": "<image>\n" * images + question}]
    return conversation, [{"role": "user", "content": content}]


def test_pixels_are_those_of_the_published_processor(made):
    """The photographs and odd sizes, bit for bit before they are normalised."""
    _, folder, _, processor = made
    model = LLaVA.from_pretrained(folder)
    shapes = set()
    for image in photos() + [drawn(size) for size in SIZES]:
        item = model.views.picture(image)
        want = processor.image_processor(
            [image],
            do_rescale=False,
            do_normalize=False,
            return_row_col_info=True,
            return_tensors="pt",
        )
        assert torch.equal(item.pixels, want["pixel_values"][0].to(torch.uint8)), image.size
        assert [item.shape.rows, item.shape.columns] == [want["rows"][0][0], want["cols"][0][0]]
        assert item.shape == model.views.shape(image.size)
        assert len(item.pixels) == item.shape.views
        shapes.add(item.shape)

        normalised = processor.image_processor([image], return_tensors="pt")["pixel_values"][0]
        mine = model.vision_tower.processor.normalise(item.pixels)
        assert (mine - normalised).abs().max() <= 1e-6
    assert len(shapes) >= 4
    largest = max(model.views.positions(shape) for shape in model.views.largest())
    assert max(model.views.positions(shape) for shape in shapes) <= largest


def test_ids_logits_and_tokens_are_those_of_transformers(made):
    _, folder, theirs, processor = made
    model = LLaVA.from_pretrained(folder)
    tok = load_tokenizer(folder)
    all_photos = photos()
    cases = [
        ("What is this?", all_photos[:1]),
        ("\n\nHow many?\n", all_photos[5:8]),
        ("And?", [drawn((30, 30)), all_photos[1]]),
        ("No picture at all", []),
    ]
    for question, images in cases:
        check_answer(model, tok, theirs, processor, question, images)


def check_answer(model, tok, theirs, processor, question: str, images: list):
    """Assert that ids, logits and ten greedy tokens are those of transformers."""
    conversation, messages = asked(question, len(images))
    # Rows of data have no line breaks beside an image, so the processor gets none.
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    prompt = prompt.replace(question, question.strip())
    given = {"images": [images]} if images else {}
    inputs = processor(text=[prompt], return_tensors="pt", **given)

    ids = templates.encode_prompt(conversation, tok, "chat")
    items = [model.views.picture(image) for image in images]
    row = expanded(ids, model.views, items)
    token = processor.image_token_id
    want = [IMAGE_TOKEN if i == token else i for i in inputs["input_ids"][0].tolist()]
    assert row == want, prompt

    with torch.no_grad():
        wanted = theirs(**inputs).logits
        logits = model(torch.tensor([ids]), items).logits
    assert (logits - wanted).abs().max().item() <= 1e-4
    assert wanted.std().item() > 0.1  # otherwise 1e-4 would say little

    tokens = model.generate([torch.tensor(ids)], items, max_new_tokens=10)[0].tolist()
    new = theirs.generate(**inputs, max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert tokens == new[0, inputs["input_ids"].size(1) :].tolist()


def test_gradients_are_those_of_transformers(made):
    """Of every weight, from the loss of a row with three pictures, two of them split."""
    _, folder, theirs, processor = made
    model = LLaVA.from_pretrained(folder).requires_grad_(True)
    images = [photos()[1], drawn((30, 30)), photos()[4]]
    messages = asked("Which of them is a horse?", 3)[1]
    messages.append({"role": "assistant", "content": [{"type": "text", "text": "The first."}]})
    prompt = processor.apply_chat_template(messages)
    inputs = processor(text=[prompt], images=[images], return_tensors="pt")

    conversation = asked("Which of them is a horse?", 3)[0]
    conversation.append({"from": "gpt", "value": "The first."})
    ids, labels = map(torch.tensor, templates.encode(conversation, load_tokenizer(folder), "chat"))
    items = [model.views.picture(image) for image in images]
    counts = [model.views.positions(item.shape) for item in items]
    assert (labels != IGNORE).sum() >= 5

    theirs.zero_grad()
    want = theirs(**inputs, labels=expand_images(ids, counts, labels)[None]).loss
    want.backward()
    got = model(ids[None], items, labels=labels[None]).loss
    got.backward()
    assert (got - want).abs() <= 1e-5

    # The writer gives them the names of transformers, as it does the weights.
    for p in model.parameters():
        p.data = p.grad
    grads = named_tensors(model, TABLE)
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        # A key's bias is zero but for rounding: it moves all scores of a query alike.
        error = (grad - expected[name]).norm()
        assert error <= 1e-4 * expected[name].norm() + 1e-5, name


def test_logits_in_bf16_are_close_to_those_in_fp32(made):
    _, folder, theirs, processor = made
    model = LLaVA.from_pretrained(folder, dtype=torch.bfloat16)
    images = photos()[2:4]
    conversation, messages = asked("And?", 2)
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[images], return_tensors="pt")
    ids = templates.encode_prompt(conversation, load_tokenizer(folder), "chat")
    items = [model.views.picture(image) for image in images]
    with torch.no_grad():
        want = theirs(**inputs).logits
        got = model(torch.tensor([ids]), items).logits
    assert got.dtype == torch.bfloat16
    assert (got - want).norm() <= 2e-2 * want.norm()


def test_the_folder_goes_back_bit_for_bit(made, tmp_path):
    kind, folder, theirs, processor = made
    out = tmp_path / "out"
    export(LLaVA.from_pretrained(folder), load_tokenizer(folder), kind.lower(), out)

    cls = getattr(transformers, f"{kind}ForConditionalGeneration")
    again, info = cls.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in info), info
    for (name, want), got in zip(theirs.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(want, got), name
    before = load_file(folder / "model.safetensors")
    after = load_file(out / "model.safetensors")
    assert before.keys() == after.keys()

    # The processor does what the first one does, and we read our own folder as theirs.
    images = getattr(transformers, f"{kind}ImageProcessorPil").from_pretrained(out)
    seen = transformers.Idefics3Processor(
        images,
        transformers.PreTrainedTokenizerFast.from_pretrained(out),
        image_seq_len=read_json(out / "processor_config.json")["image_seq_len"],
    )
    picture = photos()[2]
    messages = asked("Who?", 1)[1]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    want = processor(text=[prompt], images=[[picture]], return_tensors="pt")
    got = seen(text=[prompt], images=[[picture]], return_tensors="pt")
    for key in ("input_ids", "pixel_values"):
        assert torch.equal(want[key], got[key]), key
    ours = LLaVA.from_pretrained(out)
    assert ours.config.image_marks == LLaVA.from_pretrained(folder).config.image_marks
    assert ours.views == LLaVA.from_pretrained(folder).views


def test_our_own_layout_keeps_marks_and_the_norm(made, tmp_path):
    model = LLaVA.from_pretrained(made[1])
    export(model, load_tokenizer(made[1]), "barellava", tmp_path / "out")
    again = LLaVA.from_pretrained(tmp_path / "out")
    assert again.views == model.views
    ids = torch.tensor([[5, IMAGE_TOKEN, 7]])
    item = model.views.picture(photos()[0])
    with torch.no_grad():
        assert torch.equal(model(ids, [item]).logits, again(ids, [item]).logits)


@pytest.mark.parametrize(("top", "nested"), [(True, False), (False, True)])
def test_the_top_level_says_whether_the_head_is_tied(made, tmp_path, top, nested):
    kind, folder, _, _ = made
    config = read_json(folder / "config.json")
    config["tie_word_embeddings"] = top
    config["text_config"]["tie_word_embeddings"] = nested
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = getattr(transformers, f"{kind}Config").from_pretrained(tmp_path)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(theirs)
    is_tied = model.lm_head.weight is model.model.text_model.embed_tokens.weight
    assert is_tied == top == read_config(tmp_path).text["tie_word_embeddings"]


CHANGES = [
    ("config.json", ("image_token_id",), 3, "image_token_id"),
    ("config.json", ("scale_factor",), 4, "scale_factor"),
    ("config.json", ("text_config", "model_type"), "gemma", "text_config.model_type"),
    ("config.json", ("vision_config", "image_size"), 19 * 6, "vision_config.image_size"),
    ("processor_config.json", ("image_seq_len",), 8, "image_seq_len"),
    ("processor_config.json", ("image_processor", "do_image_splitting"), False, "do_image_splitt"),
    ("processor_config.json", ("image_processor", "size"), {"height": 9, "width": 9}, "height"),
    ("processor_config.json", ("image_processor", "max_image_size", "longest_edge"), 48, "longest"),
    ("processor_config.json", ("image_processor", "size", "longest_edge"), 918, "more than 16 a r"),
]


@pytest.mark.parametrize(("name", "path", "value", "named"), CHANGES)
def test_what_is_not_computed_is_refused(tmp_path, name, path, value, named):
    published("SmolVLM", tmp_path)
    whole = read_json(tmp_path / name)
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (tmp_path / name).write_text(json.dumps(whole))
    with pytest.raises(UserError, match=named):
        tiling_of(read_config(tmp_path))


def test_what_smolvlm_cannot_express_is_refused(made, tmp_path):
    changes = {
        "template llama": {"template": "llama"},
        "final norm": {"feature_norm": False},
        "around every picture": {"image_mode": "square"},
        "has no scale": {"image_scale": 0.5},
    }
    kind, folder, *_ = made
    model, tokenizer = LLaVA.from_pretrained(folder), load_tokenizer(folder)
    check_refusals(model, tokenizer, kind.lower(), tmp_path / "out", changes)


def test_a_video_is_refused(made, tmp_path):
    """Where a row has one, the row is named. No other video would do, and nobody says so."""
    model = LLaVA.from_pretrained(made[1])
    tok = load_tokenizer(made[1])
    with pytest.raises(ValueError, match="SmolVLM2"):
        model.views.clip([drawn((9, 9))])

    rows = [{"id": "v", "video": "a.mp4", "conversations": turns("<video>\nWhat?", "A horse.")}]
    (tmp_path / "a.mp4").write_bytes(b"a film")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    spec = SampleSpec(tok, "chat", 1000, model.views)
    told = "a.mp4: .*SmolVLM2.*; fix: remove the videos, or use a model of another image mode$"
    for pixels in (False, True):
        with pytest.raises(UserError, match=f"rows.json:row 0 .*{told}"):
            make_sample(open_rows(tmp_path / "rows.json"), 0, spec, pixels)

    with pytest.raises(UserError, match=told):
        Chat(model, tok, {}).show(str(tmp_path / "a.mp4"), "video")
    example = {"id": "v", "video": "a.mp4", "where": "rows.json:row 0"}
    with pytest.raises(UserError, match=f"rows.json:row 0: .*{told}"):
        items_of_example(example, tmp_path, model)


def write_rows(folder):
    """Write rows.json, twelve rows of a picture each, and their pictures."""
    rows = []
    for i in range(12):
        drawn((40 + i, 60)).save(folder / f"{i}.png")
        conversation = turns("<image>\nWhat is this?", "A horse.")
        rows.append({"id": str(i), "image": f"{i}.png", "conversations": conversation})
    (folder / "rows.json").write_text(json.dumps(rows))


def test_the_recipe_trains_such_a_folder_and_the_result_goes_back(made, tmp_path):
    """LoRA on own rows, an answer, and the export to transformers."""
    kind, folder, _, _ = made
    write_rows(tmp_path)
    out = tmp_path / "out"
    run(
        "train.py",
        ROOT / "recipes" / "smolvlm-256m-finetune.toml",
        f"model.checkpoint={folder}",
        f"train.output={out}",
        "train.workers=0",
        f"stage.own.data={tmp_path / 'rows.json'}",
        f"stage.own.images={tmp_path}",
        "stage.own.epochs=3",
    )
    answer = run("generate.py", "--model", out, "--image", tmp_path / "3.png", "--prompt", "Who?")
    assert answer.returncode == 0
    run("export.py", "--model", out, "--to", kind.lower(), tmp_path / "hf")
    cls = getattr(transformers, f"{kind}ForConditionalGeneration")
    _, info = cls.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[key] for key in info), info


def test_such_a_folder_is_evaluated_and_looked_into(made, tmp_path):
    """Answers in one batch are those of each row alone; the page has a heat map of each token."""
    folder = tmp_path / "model"
    shutil.copytree(made[1], folder)
    rows = []
    for i, size in enumerate([(40, 60), (60, 40), (9, 8)]):
        drawn(size).save(tmp_path / f"{i}.png")
        conversation = turns("<image>\nWhat is this?", "A horse.")
        rows.append({"id": f"{i}", "image": f"{i}.png", "conversations": conversation})
    conversation = turns("<image> or <image>?", "The first.")
    rows.append({"id": "two", "image": ["2.png", "0.png"], "conversations": conversation})
    rows.append({"id": "text", "conversations": turns("Who?", "A dog.")})
    (tmp_path / "rows.json").write_text(json.dumps(rows))

    model = LLaVA.from_pretrained(folder)
    tok = load_tokenizer(folder)
    room = room_for_answers([{"label": ["A horse.", "The first.", "A dog."]}], tok)
    want = []
    for row in rows:
        names = row.get("image", [])
        if isinstance(names, str):
            names = [names]
        items = [model.views.picture(load_image(tmp_path / name)) for name in names]
        question = row["conversations"][:1]
        want += answer(model, tok, [question], [items], max_new_tokens=room)
    assert len(set(want)) >= 4

    data = tmp_path / "rows.json"
    run("evaluate.py", "--model", folder, "--task", "rows", "--data", data, "--blank")
    lines = (folder / "eval" / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["answer"] for line in lines] == want

    out = tmp_path / "page"
    looked = ("--model", folder, "--image", tmp_path / "0.png", "--prompt", "Who?")
    run("visualize.py", *looked, "--max-new-tokens", 3, out)
    assert {file.name for file in out.glob("token-*")} == {f"token-{i}.png" for i in (1, 2, 3)}
    assert "whole, without its tiles" in (out / "index.html").read_text().replace("\n", " ")


def test_a_folder_without_a_chat_template_is_one_line(made, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(made[1], folder)
    (folder / "chat_template.jinja").unlink()
    drawn((40, 60)).save(tmp_path / "0.png")
    asks = ("generate.py", "--image", tmp_path / "0.png", "--prompt", "Who?")
    for script in (asks, ("export.py", "--to", made[0].lower(), tmp_path / "out")):
        done = run(*script, "--model", folder, ok=False)
        assert "no chat template; fix: " in one_line(done)
    assert not (tmp_path / "out").exists()


# The chat template of a language model that has never heard of pictures.
TEXT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def language_model(folder, tied: bool):
    """Write a small random Llama whose tokenizer has no marks, and a row more of embeddings."""
    fast = byte_level(["<|im_start|>", "<|im_end|>"], 300)
    tok = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tok.chat_template = TEXT_TEMPLATE
    tok.save_pretrained(folder)
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=len(tok) + 1,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def published_processor(folder):
    """Return the processor of a folder. SmolVLM's own needs a package more."""
    written = read_json(folder / "processor_config.json")
    return transformers.Idefics3Processor(
        transformers.SmolVLMImageProcessorPil.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
        image_seq_len=written["image_seq_len"],
        chat_template=(folder / "chat_template.jinja").read_text(),
    )


@pytest.mark.parametrize("edge", [0, 30])
def test_a_model_made_here_of_parts_answers_alike_as_smolvlm(tmp_path, edge):
    """It learns from its first step on with the control tokens that transformers will write."""
    language_model(tmp_path / "llm", tied=edge == 0)
    write_rows(tmp_path)
    (tmp_path / "recipe.toml").write_text(f"""
        [model]
        llm = "{tmp_path / "llm"}"
        connector = "pixel_shuffle"
        feature_layer = -1
        feature_select = "cls_patch"
        feature_norm = true
        image_mode = "split"
        image_edge = {edge}
        [model.vision_config]
        model_type = "siglip_vision_model"
        hidden_size = 32
        intermediate_size = 48
        num_hidden_layers = 2
        num_attention_heads = 2
        patch_size = 3
        image_size = 12
        hidden_act = "gelu_pytorch_tanh"
        initializer_range = 0.3
        [train]
        output = "{tmp_path / "out"}"
        workers = 0
        precision = "fp32"
        [stage.one]
        data = "{tmp_path / "rows.json"}"
        images = "{tmp_path}"
        template = "chat"
        learning_rate = 1e-3
        global_batch = 4
        steps = 4
        tune = {{ llm = "full", vision = "full", connector = "full" }}
    """)
    plan = run("train.py", tmp_path / "recipe.toml", "--dry-run")
    run("train.py", tmp_path / "recipe.toml")
    model = LLaVA.from_pretrained(tmp_path / "out").eval()
    tok = load_tokenizer(tmp_path / "out")
    embeddings = model.language_model.model.embed_tokens.weight
    marks = {ids[0] for ids in model.config.image_marks.values()}
    longest = max(model.views.positions(shape) for shape in model.views.largest())
    said = "; 7 tokens per image"
    if edge:
        said += f" of one view, up to {longest} of several"
    assert said + "\n" in plan.stdout
    assert len(embeddings) == tok.vocab_size == 1 + max(*marks, tok.token_id("<image>"))
    assert model.vision_tower.processor.resample == Image.Resampling.LANCZOS

    run("export.py", "--model", tmp_path / "out", "--to", "smolvlm", tmp_path / "hf")
    theirs, info = transformers.SmolVLMForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(info[key] for key in info), info
    processor = published_processor(tmp_path / "hf")
    for question, images in (("What is this?", 1), ("How many?", 2), ("None?", 0)):
        check_answer(model, tok, theirs.eval(), processor, question, photos()[:images])
