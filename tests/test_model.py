"""The models against the reference implementation's outputs (../shared/golden) and themselves."""

import json
import pkgutil

import pytest
import torch
from safetensors.torch import load_file

import kernels
from checkpoints import weights
from checkpoints.names import rename, reverse
from config import LLaVAConfig, Model
from inference.sampling import sample_tokens
from inputs.tokenizer import load_tokenizer
from model import LanguageModel, LLaVA, init_weights
from packing import IMAGE_TOKEN, Batch, expand_images
from tests.tools.environment import DEVICES, GPU, shared
from tests.tools.no_cache import generate_without_cache

CASES = (
    "gemma-siglip-qformer",
    "openelm-dinov2-mlp3x_gelu",
    "phi-siglip-mlp2x_gelu",
    "qwen2-clip-mlp-cls_patch",
    "qwen2-siglip-linear",
    "stablelm-clip-resampler",
    "tinyllama-clip-mlp2x_gelu",
    "tinyllama-mof-mof_mlp",
)

TEXT = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.3,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 12,
    "initializer_range": 0.3,
}


def small_model(seed: int = 0, text: dict | None = None, **config) -> LLaVA:
    torch.manual_seed(seed)
    model = LLaVA(LLaVAConfig(TEXT | (text or {}), VISION, {}, **config))
    init_weights(model, 0.3)
    return model


@pytest.fixture(scope="module", params=CASES)
def case(request):
    folder = shared(f"golden/{request.param}")
    return LLaVA.from_pretrained(folder), load_file(folder / "io.safetensors"), folder


def close(got, want, atol=1e-4):
    assert got.shape == want.shape
    assert (got - want).abs().max().item() <= atol


def test_golden_features_logits_loss_and_gradients(case):
    equals_golden(*case)


def equals_golden(model, io, folder, behind_connector: float = 1e-4):
    features = model.vision_tower(io["images"])
    if "vision_features2" in io:
        close(features[:, 1], io["vision_features2"])
        features = features[:, 0]
    close(features, io["vision_features"])
    close(model.encode_images(io["images"]), io["connector_features"], behind_connector)
    out = model(io["input_ids"], io["images"], io["attention_mask"], io["labels"])
    lengths = [(row != 0).sum().item() for row in io["attention_mask"]]
    for b, ids in enumerate(io["input_ids"]):
        n = lengths[b] + (io["connector_features"].size(1) - 1) * int((ids == IMAGE_TOKEN).sum())
        close(out.logits[b, :n], io["logits"][b, :n], behind_connector)
    assert abs(out.loss.item() - io["loss"].item()) <= 1e-5
    out.loss.backward()
    norms = json.loads((folder / "grad_norms.json").read_text())
    prefixes = {
        "language_model": "language_model.",
        "vision_tower": "vision_tower._vision_tower.",
        "connector": "connector._connector.",
    }
    squares = dict.fromkeys((k for k, n in norms.items() if n is not None), 0.0)
    for part, prefix in prefixes.items():
        module = getattr(model, part)
        table = reverse(getattr(module, "rename", ()))
        for name, p in module.named_parameters():
            squares[prefix + rename(name, table)] += (
                p.grad.square().sum().item()
            )  # OpenELM's are stored fused
    for key, square in squares.items():
        # A key bias does not change the softmax: its gradient is rounding noise around zero.
        assert square**0.5 == pytest.approx(norms[key], rel=1e-3, abs=1e-5), key


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name, compiled",
    [(name, compiled) for name in CASES for compiled in (False, True)]
    if GPU
    else [("phi-siglip-mlp2x_gelu", False), ("tinyllama-clip-mlp2x_gelu", True)],
)
def test_golden_through_the_kernels(name, compiled, monkeypatch):
    """The same on a GPU; without one, two in Triton's interpreter."""
    device = "cuda" if GPU else "cpu"
    for module in () if GPU else pkgutil.iter_modules(kernels.__path__):
        monkeypatch.setattr(f"kernels.{module.name}.fused", lambda x: True, raising=False)
    folder = shared(f"golden/{name}")
    io = {k: v.to(device) for k, v in load_file(folder / "io.safetensors").items()}
    model = LLaVA.from_pretrained(folder, device=device)
    if compiled:
        torch._dynamo.reset()
        model.compile_blocks(fullgraph=True, backend="aot_eager")
    # A Q-Former enlarges roundings: the reference's own logits are 1e-4 from float64, those of the
    # kernels 2.4e-4.
    equals_golden(model, io, folder, 3e-4 if "qformer" in name else 1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_golden_generation(case, use_cache, device):
    model, io, folder = case
    model = LLaVA.from_pretrained(folder, device=device) if device == "cuda" else model
    prompt = io["input_ids"][:1]
    if use_cache:
        new = model.generate(prompt, io["images"][:1], max_new_tokens=24)
    else:
        new = generate_without_cache(model, prompt, io["images"][:1], max_new_tokens=24)
    assert new[0].tolist() == io["generated"].tolist()


def test_stories_continues_as_documented():
    folder = shared("assets/weights/stories260K-hf")
    model = LanguageModel.from_pretrained(folder)
    golden = json.loads(
        shared("assets/weights/karpathy--tinyllamas-stories260K/golden_greedy.json").read_text()
    )
    ids = [1]
    for _ in range(40):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    assert ids[1:] == golden["greedy_ids_from_bos"][:40]
    text = load_tokenizer(folder).decode(ids)
    story = "Once upon a time, there was a little girl named Lily. "
    story += "She loved to play outside in the park."
    assert text.strip().startswith(story)


def test_packed_samples_do_not_see_each_other():
    model = small_model()
    rows = [torch.randint(0, 61, (n,)) for n in (7, 1, 12, 3)]
    rows[0][2], rows[2][0] = IMAGE_TOKEN, IMAGE_TOKEN
    images = torch.randn(2, 3, 12, 12)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(r)) for r in rows], batch_first=True)
    together = model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), images, mask).logits
    for b, (row, image) in enumerate(zip(rows, (images[:1], None, images[1:], None), strict=True)):
        alone = model(row[None], image).logits[0]
        close(together[b, : len(alone)], alone, 1e-5 * alone.abs().max().item())


def test_images_and_placeholders_must_agree():
    model = small_model()
    with pytest.raises(ValueError, match="2 image placeholders but 1 images"):
        model(torch.tensor([[1, IMAGE_TOKEN, IMAGE_TOKEN, 4]]), torch.randn(1, 3, 12, 12))


def test_several_images_in_one_prompt_go_in_their_order():
    model = small_model()
    images = torch.randn(2, 3, 12, 12)
    ids = torch.tensor([[5, IMAGE_TOKEN, 9, IMAGE_TOKEN, 3]])
    features = model.encode_images(images)
    x = model.embed(expand_images(ids[0], [model.image_tokens] * len(images)), features)
    close(x[1 : 1 + model.image_tokens], features[0], 0)
    close(x[2 + model.image_tokens : 2 + 2 * model.image_tokens], features[1], 0)


@pytest.mark.parametrize("beams", [1, 3])
def test_ragged_batch_generates_what_each_prompt_generates_alone(beams):
    model = small_model()
    rows = [torch.randint(0, 61, (n,)) for n in (4, 9, 2)]
    rows[1][0] = IMAGE_TOKEN
    images = torch.randn(1, 3, 12, 12)
    options = {"max_new_tokens": 8, "num_beams": beams, "eos_token_id": 7}
    together = model.generate(rows, images, **options)
    for b, row in enumerate(rows):
        alone = model.generate([row], images if b == 1 else None, **options)[0]
        assert together[b, : len(alone)].tolist() == alone.tolist()
        assert set(together[b, len(alone) :].tolist()) <= {7}


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"temperature": 0.9, "top_p": 0.8}])
def test_cache_changes_nothing(options):
    model = small_model()
    rows = [torch.randint(0, 61, (n,)) for n in (4, 9)]
    seeded = lambda: {"generator": torch.Generator().manual_seed(3)} if "top_p" in options else {}  # noqa: E731
    with_cache = model.generate(rows, max_new_tokens=9, **options, **seeded())
    without = generate_without_cache(model, rows, max_new_tokens=9, **options, **seeded())
    assert with_cache.tolist() == without.tolist()


def test_beam_search_finds_the_most_probable_sequence():
    """With as many beams as prefixes the search is exhaustive: no sequence of 2 scores higher."""
    model = small_model(text={"vocab_size": 11})
    prompt = torch.tensor([[1, 2, 3]])
    best = model.generate(prompt, max_new_tokens=2, num_beams=11)[0].tolist()
    score = {}
    for a in range(11):
        p = model(torch.tensor([[1, 2, 3, a]])).logits[0].log_softmax(-1)
        for b in range(11):
            score[a, b] = (p[2, a] + p[3, b]).item()
    assert max(score, key=score.get) == tuple(best)


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(500, -1)
    seen = set(sample_tokens(logits, 1.0, 0.6, torch.Generator().manual_seed(0)).tolist())
    assert seen == {0, 1}


def test_stream_gets_every_token_and_eos_ends():
    model = small_model()
    tokens = []
    new = model.generate(torch.tensor([[1, 2]]), max_new_tokens=6, stream=tokens.append)
    assert [t[0] for t in tokens] == new[0].tolist()
    eos = new[0, 2].item()
    short = model.generate(torch.tensor([[1, 2]]), max_new_tokens=6, eos_token_id=eos)[0].tolist()
    assert short == new[0, : new[0].tolist().index(eos) + 1].tolist()


@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load_is_bit_exact_and_tied_weights_are_stored_once(tmp_path, tied):
    model = small_model(text={"tie_word_embeddings": tied}, template="phi", feature_layer=-1)
    model.save(tmp_path)
    again = LLaVA.from_pretrained(tmp_path)
    assert ("language_model.lm_head.weight" in weights.Checkpoint(tmp_path)) == (not tied)
    assert (
        again.language_model.lm_head.weight is again.language_model.model.embed_tokens.weight
    ) == tied
    a, b = model.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert again.config.template == "phi" and again.config.feature_layer == -1


def test_blocks_compile_whole_and_once_for_all_lengths(case):
    """No graph break in any family or encoder (fullgraph), with gradients; one for all lengths."""
    folder, graphs = case[2], []
    plain, model = LLaVA.from_pretrained(folder), LLaVA.from_pretrained(folder)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model.compile_blocks(fullgraph=True, backend=backend)
    io, made = case[1], []
    for lengths in ([7, 30, 5, 2, 8, 4], [9, 9], [3, 4, 11, 2, 17], [6, 21]):
        ids = torch.randint(
            1, 90, (sum(lengths),), generator=torch.Generator().manual_seed(sum(lengths))
        )
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
        positions = torch.cat([torch.arange(n) for n in lengths])
        batch = Batch(ids, ids, positions, cu, max(lengths), None, [], [])
        losses = [m.loss(batch) for m in (plain, model)]
        assert (losses[0] - losses[1]).abs() <= 1e-5 * losses[0].abs()
        made.append(len(graphs))
    losses[1].backward()
    blocks = len({tuple(vars(layer).items()) for layer in model.language_model.config.layers})
    assert made == [blocks] * 4
    model.zero_grad()
    close(model.vision_tower(io["images"]), plain.vision_tower(io["images"]), 1e-5)
    assert len(graphs) > made[-1]


def test_the_seed_also_decides_what_a_run_from_a_checkpoint_draws(tmp_path):
    small_model().save(tmp_path)
    drawn = []
    for before in (1, 2):
        torch.manual_seed(before)  # what happened to be drawn earlier
        LLaVA.from_parts(Model(checkpoint=str(tmp_path)), "plain", seed=7)
        drawn.append(torch.rand(3))  # as an adapter would
    assert torch.equal(*drawn)
