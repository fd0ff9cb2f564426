"""Look into one answer: what else each token could have been, and what its choice came from.

    python visualize.py --model out/demo --image FILE --prompt "What colour is the circle?" OUT

writes OUT/index.html, one page with everything in it, and its heat maps as OUT/token-1.png,
OUT/token-2.png and so on.

For every token of the greedy answer the page shows:
- the likeliest tokens in its place, and their probabilities;
- attention of the position that chose it, averaged over heads and layers (or one --layer), to
  every token before it, and to the patches of the picture, as a heat map;
- cosine similarity of its row of the output head with the last hidden state of every patch;
- occlusion (Zeiler and Fergus, 2014): how much its log-probability falls where a window of the
  picture, a quarter of its side, is filled with the picture's median colours.
Heat maps lie on the picture as the encoder sees it, each scaled to its own maximum. A tiled model
is shown the picture as a whole, without its tiles, so its answer here may be another one. The maps
of attention and similarity need a connector with a token per patch. What they are worth was
measured on 100 scenes with the word that answers a question on a colour or a shape. On the demo
(tests/test_visualize.py) occlusion peaks inside the object's box in 47 %, and 44 % of its mass lies
there; the box is 5 % of the picture. In a smaller world, of 2 x 2 cells with a token for each, it
was 86 % and 69 %, and the box 11 %. There attention peaked on the object's patch in 85 %, but 43 %
of its mass was all that lay there; similarity peaked there in 45 % (chance: 25 %). So occlusion is
the one to trust.

`inspect_answer` computes all this as an `Inspection`, and `answer_page` draws it. Read
`Inspection` first. The page ends with the explanation above, taken from this docstring.

T tokens after image expansion, W of them the answer, L layers, H heads, n tokens per image,
N pictures, S x S pixels, g x g cells of a heat map, V vocabulary.
"""

import html
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import command_line
from checkpoints.files import resolve, write_file, writing
from checkpoints.owned import own
from command_line import within
from config import UserError
from inference.answer import answer_tokens, prompt_ids
from inputs.pictures import load_image
from inputs.preview import encode_png, html_page, image_tag
from inputs.tokenizer import load_tokenizer
from model import LLaVA
from packing import IMAGE_TOKEN, Item, expand_images, image_positions

# Connectors that keep a token for each patch, by the start of their names.
PER_PATCH = ("identity", "linear", "mlp")

# Occlusion covers the picture with windows, of which a side has seven. A window is two cells wide,
# a quarter of the side, and begins one cell behind the window before it, so neighbours overlap by
# half.
WINDOWS = 7
CELLS = WINDOWS + 1


# -- what is computed ------------------------------------------------------------------------------


@dataclass
class Inspection:
    """What is known of the W tokens of an answer. Maps lie on the picture, (W, g, g)."""

    picture: Tensor  # (3, S, S) uint8, as the encoder sees it
    ids: Tensor  # (T,) prompt and answer, IMAGE_TOKEN at every image position
    first: int  # where the answer starts in ids
    patches: Tensor  # (n,) where the picture's tokens are in ids, without marks and separators
    probabilities: Tensor  # (W, V)

    # (L, W, T): of the position before each token, averaged over heads; each row sums to 1.
    attention: Tensor

    # (W, g, g) with a cell for each patch; None where patches have no tokens of their own.
    similarity: Tensor | None

    # (W, CELLS, CELLS): the fall of the log-probability in nats, never below 0.
    occlusion: Tensor

    def attention_of(self, layer: int | None = None) -> Tensor:
        """Return the attention (W, T) of one layer, or the mean of all layers."""
        if layer is None:
            return self.attention.mean(0)
        return self.attention[layer]

    def attention_map(self, layer: int | None = None) -> Tensor | None:
        """Return the attention (W, g, g) to each patch; None where patches have no tokens."""
        if self.similarity is None:
            return None
        to_patches = self.attention_of(layer)[:, self.patches]  # (W, n)
        return on_grid(to_patches, self.similarity.size(-1))


@torch.inference_mode()
def inspect_answer(
    model: LLaVA, prompt: list[int], answer: list[int], picture: Tensor
) -> Inspection:
    """Return what made the model give an answer to a prompt with one picture.

    prompt and answer: ids, one IMAGE_TOKEN in the prompt. picture: (3, S, S) uint8.
    """
    lm = model.language_model
    device = lm.lm_head.weight.device

    shape = model.views.one_view
    (features,) = model.encode_items([Item(picture[None], shape)])  # (m, D)
    tokens = torch.tensor(prompt + answer, device=device)
    ids = expand_images(tokens, [len(features)])  # (T,)

    # Around the tokens of a view there may be marks, and behind them a separator.
    text_of_item = torch.tensor(model.views.placeholder(shape), device=device)
    own = image_positions(text_of_item)[: model.views.tokens]
    patches = image_positions(ids)[own]

    # The position before a token chooses it.
    first = len(ids) - len(answer)
    choosing = slice(first - 1, len(ids) - 1)

    # One forward pass that keeps the attention of those positions.
    attention: list[Tensor] = []
    x = model.embed(ids, features)
    positions = torch.arange(len(ids), device=device)
    attend = recording_attention(choosing, attention)
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32, device=device)
    hidden_states = lm.model(x, positions, attend, cu_seqlens)  # (T, D)
    logits = lm.lm_head(hidden_states[choosing]).float()  # (W, V)

    similarity = None
    if model.config.connector.startswith(PER_PATCH):
        answer_ids = ids[first:]
        patch_states = hidden_states[patches]
        similarity = cosines(lm.lm_head.weight[answer_ids], patch_states)  # (W, n)

        vision = model.vision_tower.config
        patches_of_a_side = vision.processor.side // vision.hf["patch_size"]
        similarity = on_grid(similarity, patches_of_a_side)

    return Inspection(
        picture=picture,
        ids=ids,
        first=first,
        patches=patches,
        probabilities=logits.softmax(-1),
        attention=torch.stack(attention),
        similarity=similarity,
        occlusion=occlusion(model, prompt, answer, picture),
    )


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine (W, n) of each row of a (W, D) with each row of b (n, D)."""
    a = F.normalize(a.float(), dim=-1)
    b = F.normalize(b.float(), dim=-1)
    return a @ b.T


def on_grid(values: Tensor, g: int) -> Tensor:
    """Return the values (W, n) of an image's tokens as (W, g, g), a cell for each patch.

    If there are more than g g tokens, the first is a class token, which is left out. If there are
    fewer, the encoder has dropped the first patch, whose cell is 0.
    """
    cells = g * g
    patches = values[:, -cells:]
    dropped = cells - patches.size(1)
    return F.pad(patches, (dropped, 0)).view(-1, g, g)


def recording_attention(rows: slice, recorded: list[Tensor]):
    """Return causal attention of one sequence that keeps its probabilities.

    It is computed by its formula, because the fused kernels never have all probabilities in memory.
    Those of the queries `rows`, averaged over heads, (W, T), are appended to `recorded`, once for
    each layer.
    """

    def attend(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = q.size(0)
        scale = layer.scale
        if scale is None:
            scale = q.size(-1) ** -0.5

        # Every key-value head serves a group of query heads.
        group = q.size(1) // k.size(1)
        k = k.repeat_interleave(group, 1)  # (T, H, d)
        v = v.repeat_interleave(group, 1)

        # q has the index t of the query, k and v the index s of the key that it attends to.
        scores = torch.einsum("thd,shd->hts", q, k).float() * scale  # (H, T, T)
        everything = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device)
        unseen = everything.triu(1)  # the future
        if layer.window is not None:
            unseen |= everything.tril(-layer.window)  # what lies before the window
        probabilities = scores.masked_fill(unseen, float("-inf")).softmax(-1)

        of_rows = probabilities[:, rows]  # (H, W, T)
        recorded.append(of_rows.mean(0))
        return torch.einsum("hts,shd->thd", probabilities.to(v.dtype), v)

    return attend


@torch.inference_mode()
def occlusion(model: LLaVA, prompt: list[int], answer: list[int], picture: Tensor) -> Tensor:
    """Return how much each token's log-probability falls where the picture is covered.

    (W, CELLS, CELLS): each cell is the mean of the windows that cover it.
    """
    side = picture.size(-1)
    edges = [round(i * side / CELLS) for i in range(CELLS + 1)]  # of the cells, in pixels
    median = picture.flatten(1).median(1).values  # (3,)
    uncovered = log_probabilities(model, prompt, answer, picture[None])  # (1, W)

    total = torch.zeros(len(answer), CELLS, CELLS)
    count = torch.zeros(CELLS, CELLS)
    for y in range(WINDOWS):
        # The windows of one row at once, each on a picture of its own.
        pictures = picture.repeat(WINDOWS, 1, 1, 1)  # (WINDOWS, 3, S, S)
        down = slice(edges[y], edges[y + 2])
        for x in range(WINDOWS):
            across = slice(edges[x], edges[x + 2])
            pictures[x, :, down, across] = median[:, None, None]
        covered = log_probabilities(model, prompt, answer, pictures)  # (WINDOWS, W)

        # A window counts for each of its two by two cells. If covering it makes a token likelier,
        # the model does not need what is there, which is a fall of 0.
        falls = (uncovered - covered).clamp(min=0)
        cells_down = slice(y, y + 2)
        for x, fall in enumerate(falls):
            cells_across = slice(x, x + 2)
            total[:, cells_down, cells_across] += fall[:, None, None]
            count[cells_down, cells_across] += 1
    return total / count


def log_probabilities(
    model: LLaVA, prompt: list[int], answer: list[int], pictures: Tensor
) -> Tensor:
    """Return the log-probability (N, W) of an answer's tokens for each of the pictures.

    pictures: (N, 3, S, S) uint8.
    """
    device = model.language_model.lm_head.weight.device
    pixels = model.vision_tower.processor.normalise(pictures).to(device)
    tokens = torch.tensor(prompt + answer, device=device)
    logits = model(tokens.expand(len(pixels), -1), pixels).logits  # (N, T, V)

    # Counted from the end, where images have no tokens. The position before a token chooses it.
    width = len(answer)
    choosing = slice(-width - 1, -1)
    of_answer = logits[:, choosing].float().log_softmax(-1)  # (N, W, V)
    chosen = tokens[-width:].expand(len(pixels), -1)  # (N, W)
    of_chosen = of_answer.gather(-1, chosen[:, :, None])  # (N, W, 1)
    return of_chosen[:, :, 0].cpu()


# -- the page --------------------------------------------------------------------------------------

MAP_WIDTH = 240  # pixels across a heat map
MAP_GAP = 8  # pixels between two of them
SMALL_WIDTH = 120  # pixels across the picture at the top
BAR_WIDTH = 130  # pixels of a bar that stands for a probability of 1

RED = (220, 20, 20)

STYLE = """\
body { font: 15px system-ui, sans-serif; margin: 2em auto; max-width: 1060px; color: #222;
       padding: 0 16px }
h2 { margin: 1.6em 0 .4em }
.row { display: flex; flex-wrap: wrap; gap: 18px; align-items: flex-start }
.row > div { flex: none }
.small { color: #666; font-size: 13px }
td { padding: 1px 8px 1px 0; white-space: pre }
.bar { background: #3b6fb6; height: 12px }
.text { line-height: 1.9 }
.text span { white-space: pre-wrap; padding: 2px 0 }
img { display: block; image-rendering: pixelated; border: 1px solid #ccc }
"""


def answer_page(
    seen: Inspection,
    question: str,
    tokenizer,
    k: int = 8,
    layer: int | None = None,
    is_cut: bool = False,
) -> tuple[str, list[bytes]]:
    """Return the page as HTML, and for each token the PNG of its heat maps, side by side.

    k: how many tokens to show in each place. layer: whose attention, by default all layers' mean.
    is_cut: whether the answer would have gone on.
    """
    pieces = [piece_of(i, tokenizer) for i in seen.ids.tolist()]
    attention = seen.attention_of(layer).cpu()
    probabilities = seen.probabilities.cpu()
    maps = {
        "attention": seen.attention_map(layer),
        "similarity": seen.similarity,
        "occlusion": seen.occlusion,
    }

    # At the top: the picture, the question and the answer.
    answer = "".join(pieces[seen.first :])
    note = ""
    if is_cut:
        cut = f"... cut after token {len(probabilities)}; --max-new-tokens shows more"
        note = f' <span class="small">{cut}</span>'
    parts = [
        f"<p><b>{html.escape(question)}</b> {html.escape(answer)}{note}</p>",
        image_tag(draw_heat(seen.picture, torch.zeros(1, 1)), SMALL_WIDTH),
    ]

    # Then a section for each token of the answer.
    pngs = []
    for w in range(len(probabilities)):
        notes = map_notes(seen, w, attention)
        figures = []
        images = []
        for name, values in maps.items():
            if values is None:
                continue
            image = draw_heat(seen.picture, values[w])
            images.append(image)
            caption = f'<span class="small">{name}: {notes[name]}</span>'
            figures.append(f"<div>{image_tag(image, MAP_WIDTH)}{caption}</div>")
        pngs.append(encode_png(side_by_side(images)))

        token = html.escape(pieces[seen.first + w])
        table = likeliest_table(probabilities[w], tokenizer, k)
        text = attention_text(seen, w, attention, pieces)
        parts.append(f"<h2>{w + 1}. {token}</h2>")
        parts.append(f'<div class="row">{"".join(figures)}<div>{table}</div></div>')
        parts.append(f'<p class="text">{text}</p>')

    parts.append(f'<div class="small">{explanation()}</div>')
    return html_page(question, "\n".join(parts), STYLE), pngs


def explanation() -> str:
    """Return HTML of what this file's docstring says about the page, for who sees only the page."""
    start = __doc__.index("- the likeliest")
    end = __doc__.index("`inspect_answer`")
    listed, rest = __doc__[start:end].split("\nHeat maps", 1)
    items = "".join(f"<li>{html.escape(item)}</li>" for item in listed[2:].split("\n- "))
    return f"For every token:<ul>{items}</ul><p>Heat maps{html.escape(rest)}</p>"


def piece_of(token: int, tokenizer) -> str:
    """Return the text of one token, or its name where it has no text."""
    if token == IMAGE_TOKEN:
        return "<image>"
    return tokenizer.decode([token]) or tokenizer.token(token) or ""


def likeliest_table(probabilities: Tensor, tokenizer, k: int) -> str:
    """Return an HTML table of the k likeliest tokens and bars of their probabilities (V,)."""
    top = probabilities.topk(min(k, len(probabilities)))
    rows = []
    for p, token in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        # Line breaks and the like as a Python string has them, without its quotes.
        quoted = repr(piece_of(token, tokenizer))
        name = html.escape(quoted[1:-1])
        bar = f'<div class="bar" style="width:{BAR_WIDTH * p:.0f}px"></div>'
        rows.append(f"<tr><td>{name}</td><td>{100 * p:.1f} %</td><td>{bar}</td></tr>")
    return f"<table>{''.join(rows)}</table>"


def map_notes(seen: Inspection, w: int, attention: Tensor) -> dict[str, str]:
    """Return what stands below each of the heat maps of token w; attention (W, T)."""
    percent = 100 * attention_on_picture(seen, w, attention)
    notes = {
        "attention": f"{percent:.0f} % of it on the picture",
        "occlusion": f"at most {seen.occlusion[w].max():.2f} nats",
    }
    if seen.similarity is not None:
        cosine = seen.similarity[w]
        notes["similarity"] = f"cosine {cosine.min():.2f} to {cosine.max():.2f}"
    return notes


def attention_on_picture(seen: Inspection, w: int, attention: Tensor) -> float:
    """Return how much of the attention (W, T) of token w goes to the picture, from 0 to 1."""
    is_image = (seen.ids == IMAGE_TOKEN).cpu()
    return attention[w][is_image].sum().item()


def attention_text(seen: Inspection, w: int, attention: Tensor, pieces: list[str]) -> str:
    """Return HTML of the text before token w, the redder the more attention a token gets."""
    is_image = (seen.ids == IMAGE_TOKEN).cpu()
    of_token = attention[w]  # (T,)
    percent = 100 * attention_on_picture(seen, w, attention)

    # Text gets little beside the picture, so its own maximum is the scale. It could be 0.
    most = max(of_token[~is_image].max().item(), 1e-12)

    spans = ['<span class="small">attention to the text: </span>']
    inside_picture = False
    for at in range(seen.first + w):
        if not is_image[at]:
            strength = 0.7 * of_token[at].item() / most
            piece = html.escape(pieces[at])
            spans.append(f'<span style="background:rgba(220,20,20,{strength:.2f})">{piece}</span>')
        elif not inside_picture:
            # One span for all tokens of the picture.
            spans.append(f'<span class="small">[picture {percent:.0f} %]</span>')
        inside_picture = bool(is_image[at])
    return "".join(spans)


def draw_heat(picture: Tensor, values: Tensor) -> Image.Image:
    """Return the picture (3, S, S) uint8 under the values (g, g): red where they are largest."""
    # Cosines may all be negative, so the scale starts at 0 or below.
    low = values.min().clamp(max=0)
    range_of_values = (values.max() - low).clamp(min=1e-12)  # not 0 where all values are equal
    strength = (values - low) / range_of_values

    # The mask keeps the cells' sharp edges.
    size = (MAP_WIDTH, MAP_WIDTH)
    mask = Image.fromarray((strength * 255).byte().cpu().numpy())
    mask = mask.resize(size, Image.Resampling.NEAREST)

    # A pale picture, so that red stands out, and the same picture in red.
    pixels = picture.permute(1, 2, 0).numpy()  # (S, S, 3)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    pale = Image.blend(image, Image.new("RGB", size, "white"), 0.35)
    red = Image.blend(pale, Image.new("RGB", size, RED), 0.65)
    return Image.composite(red, pale, mask)


def side_by_side(images: list[Image.Image]) -> Image.Image:
    """Return heat maps in one picture, from left to right."""
    step = MAP_WIDTH + MAP_GAP
    width = len(images) * step - MAP_GAP  # no gap behind the last
    strip = Image.new("RGB", (width, MAP_WIDTH), "white")
    for i, image in enumerate(images):
        strip.paste(image, (i * step, 0))
    return strip


# -- the command -----------------------------------------------------------------------------------


def arguments(argv: list[str]):
    """Return the command line's options."""
    parser = command_line.parser(__doc__)
    option = parser.add_argument
    option("out", metavar="OUT", help="folder to write")
    option("--model", required=True, help="folder or Hugging Face id of a trained model")
    option("--image", required=True, help="a picture")
    option("--prompt", required=True, help="the question")
    option(
        "--layer", type=within(int, -(10**6), 10**6), help="attention of this layer, counted from 0"
    )
    option(
        "--top-k",
        type=within(int, 1, 1000),
        default=8,
        help="how many tokens to show in each place (8)",
    )
    option(
        "--max-new-tokens",
        type=within(int, 1, 1000),
        default=16,
        help="longest answer (16); a longer one is cut, and the page says so",
    )
    return parser.parse_args(argv)


def main(argv: list[str]):
    args = arguments(argv)
    folder = resolve(args.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LLaVA.from_pretrained(folder, device=device)
    tokenizer = load_tokenizer(folder)

    # Say what is wrong before anything is computed.
    if model.views.native:
        what = "its pictures keep their proportions, and the page shows squares"
        raise UserError("--model", what, "give a model of another image mode than native")
    if not args.out.strip():
        raise UserError("OUT", "empty", "name a folder")
    out = Path(args.out)
    layers = len(model.language_model.blocks)
    if args.layer is not None and not 0 <= args.layer < layers:
        what = f"{args.layer}: the model has {layers} layers"
        raise UserError("--layer", what, f"give 0 to {layers - 1}")
    try:
        image = load_image(args.image)
        picture = model.vision_tower.processor.pixels(image, model.config.image_mode)
    except UserError:
        raise
    except ValueError as e:
        raise UserError(args.image, str(e), "give an image file") from None
    own(out, "visualization")

    item = Item(picture[None], model.views.one_view)
    (answer,) = answer_tokens(
        model, tokenizer, [args.prompt], [[item]], max_new_tokens=args.max_new_tokens
    )
    if not answer:
        raise UserError("--prompt", "the model answers nothing to it", "ask something else")

    prompt = prompt_ids(args.prompt, 1, tokenizer, model.config.template)
    seen = inspect_answer(model, prompt, answer, picture)
    is_cut = len(answer) == args.max_new_tokens
    page, pngs = answer_page(seen, args.prompt, tokenizer, args.top_k, args.layer, is_cut)

    with writing(out):
        for number, png in enumerate(pngs, 1):
            write_file(out / f"token-{number}.png", png)
        write_file(out / "index.html", page)
    print(f"{tokenizer.decode(answer).strip()}: {out / 'index.html'}")


if __name__ == "__main__":
    command_line.cli(main, __doc__)
