"""One answer looked into: what else each token might have been, and where in the picture and the text it comes from.

    python visualize.py --model out/demo --image FILE --prompt "What colour is the circle?" OUT

writes OUT/index.html, one page with everything in it, and its heat maps as OUT/token-1.png ... For every token of the
greedy answer:
- the likeliest tokens in its place, and their probabilities;
- attention of the position that chose it, averaged over heads and layers (or one --layer), to every token before it,
  and to the patches of the picture, as a heat map;
- cosine similarity of its row of the output head with the last hidden state of every patch;
- occlusion (Zeiler and Fergus, 2014): how much its log-probability falls where a window of the picture, a quarter of
  its side, is filled with the picture's median colours.
Heat maps lie on the picture as the encoder sees it, each scaled to its own maximum. Those of attention and similarity
need a connector with a token per patch. What they are worth was measured on 100 scenes of the demo with the word that
answers a question on a colour or a shape (tests/test_visualize.py). Occlusion is the one to trust: it peaks inside the
object's box in 86 %, and 69 % of its mass lies there (the box is 11 % of the picture). Attention peaks on the object's
patch in 85 %, but 43 % of its mass is all that lies there; similarity peaks there in 45 % (chance: 25 %).

T tokens after image expansion, W of them the answer, L layers, H heads, n tokens per image, N windows, S x S pixels.
"""

import base64
import html
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import config
from checkpoints.files import resolve, write_file
from config import UserError
from inputs.pictures import load_image
from inputs.templates import IMAGE, encode_prompt, stop_id
from inputs.tokenizer import load_tokenizer
from model import LLaVA
from packing import IMAGE_TOKEN, Item, expand_images

SHOWN = 240  # pixels across a heat map on the page
WINDOWS = 7  # along a side, each a quarter of it and half over the next
PER_PATCH = (
    "identity",
    "linear",
    "mlp",
)  # connectors that keep a token for each patch, by the start of their names


@dataclass
class Answer:
    """What is known of W answer tokens; maps are (W, g, g) over the picture, None where patches have no tokens."""

    picture: Tensor  # (3, S, S) uint8, as the encoder sees it
    ids: Tensor  # (T,) prompt and answer, IMAGE_TOKEN at every image position
    first: int  # where the answer starts
    probabilities: Tensor  # (W, V)
    attention: (
        Tensor  # (L, W, T) of the position before each token, averaged over heads; rows sum to 1
    )
    similarity: Tensor | None
    occlusion: (
        Tensor  # (W, WINDOWS + 1, WINDOWS + 1), fall of the log-probability in nats, never below 0
    )

    def attention_map(self, layer: int | None = None) -> Tensor | None:
        """(W, g, g): the share of attention that each patch gets, of all layers' mean or of one layer."""
        weight = self.attention.mean(0) if layer is None else self.attention[layer]
        return (
            None
            if self.similarity is None
            else on_grid(weight[:, self.ids == IMAGE_TOKEN], self.similarity.size(-1))
        )


def on_grid(values: Tensor, g: int) -> Tensor:
    """(W, n) values of an image's tokens -> (W, g, g): without a class token, 0 for a patch that the encoder drops."""
    kept = values[:, -g * g :]
    return torch.nn.functional.pad(kept, (g * g - kept.size(1), 0)).view(-1, g, g)


def recorded(rows: slice, into: list[Tensor]):
    """Causal attention of one sequence by its formula; the softmax of `rows`, averaged over heads, is appended."""

    def attend(_, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k).float() * q.size(-1) ** -0.5
        future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        p = scores.masked_fill(future, float("-inf")).softmax(-1)
        into.append(p[:, rows].mean(0))
        return torch.einsum("hts,shd->thd", p.to(v.dtype), v)

    return attend


@torch.inference_mode()
def look(model: LLaVA, prompt: list[int], answer: list[int], picture: Tensor) -> Answer:
    """What made the model give `answer` to a prompt with one picture, (3, S, S) uint8."""
    lm, device = model.language_model, model.language_model.lm_head.weight.device
    (features,) = model.encode_items([Item(picture[None])])
    counts = [len(features)]
    ids, seen = expand_images(torch.tensor(prompt + answer, device=device), counts), []
    rows = slice(
        len(ids) - len(answer) - 1, len(ids) - 1
    )  # the positions that choose the answer's tokens
    hidden = lm.model(
        model.embed(ids, features), torch.arange(len(ids), device=device), recorded(rows, seen)
    )
    vision, similarity = model.vision_tower.config, None
    if model.config.connector.startswith(PER_PATCH):
        words = torch.nn.functional.normalize(
            lm.lm_head.weight[ids[-len(answer) :]].float(), dim=-1
        )
        patches = torch.nn.functional.normalize(hidden[ids == IMAGE_TOKEN].float(), dim=-1)
        similarity = on_grid(words @ patches.T, vision.processor.side // vision.hf["patch_size"])
    return Answer(
        picture, ids, len(ids) - len(answer), lm.lm_head(hidden[rows]).float().softmax(-1), torch.stack(seen),
        similarity, occlusion(model, prompt, answer, picture),
    )  # fmt: skip


@torch.inference_mode()
def occlusion(model: LLaVA, prompt: list[int], answer: list[int], picture: Tensor) -> Tensor:
    """(W, g, g), g = WINDOWS + 1: the fall of each token's log-probability, mean of the windows that cover a cell."""
    device, side = model.language_model.lm_head.weight.device, picture.size(-1)
    edges = [round(i * side / (WINDOWS + 1)) for i in range(WINDOWS + 2)]
    ids = torch.tensor(prompt + answer, device=device)[None]

    def log_probabilities(pictures: Tensor) -> Tensor:  # (N, 3, S, S) -> (N, W)
        pixels = model.vision_tower.processor.normalise(pictures).to(device)
        logits = model(ids.expand(len(pixels), -1), pixels).logits[:, -len(answer) - 1 : -1].float()
        return (
            logits.log_softmax(-1)
            .gather(-1, ids[:, -len(answer) :, None].expand(len(pixels), -1, -1))[..., 0]
            .cpu()
        )

    whole, fill = (
        log_probabilities(picture[None]),
        picture.flatten(1).median(1).values[:, None, None],
    )
    total, count = (
        torch.zeros(len(answer), WINDOWS + 1, WINDOWS + 1),
        torch.zeros(WINDOWS + 1, WINDOWS + 1),
    )
    for y in range(WINDOWS):
        row = picture.repeat(WINDOWS, 1, 1, 1)
        for x in range(WINDOWS):
            row[x, :, edges[y] : edges[y + 2], edges[x] : edges[x + 2]] = fill
        for x, fall in enumerate((whole - log_probabilities(row)).clamp(min=0)):
            total[:, y : y + 2, x : x + 2] += fall[:, None, None]
            count[y : y + 2, x : x + 2] += 1
    return total / count


# ------------------------------------------------------------------------------------------------ the page


def heat(picture: Tensor, values: Tensor) -> Image.Image:
    """(3, S, S) uint8 under (g, g) values: red where they are largest, SHOWN pixels across."""
    low = values.min().clamp(max=0)  # cosines may all be negative
    strength = (values - low) / (values.max() - low).clamp(min=1e-12)
    mask = Image.fromarray((strength * 255).byte().cpu().numpy()).resize(
        (SHOWN, SHOWN), Image.Resampling.NEAREST
    )
    grey = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize(
        (SHOWN, SHOWN), Image.Resampling.BICUBIC
    )
    grey = Image.blend(grey, Image.new("RGB", grey.size, "white"), 0.35)
    return Image.composite(
        Image.blend(grey, Image.new("RGB", grey.size, (220, 20, 20)), 0.65), grey, mask
    )


def png(image: Image.Image) -> bytes:
    image.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


STYLE = """body{font:15px system-ui,sans-serif;margin:2em auto;max-width:1060px;color:#222}h2{margin:1.6em 0 .4em}
.row{display:flex;gap:18px;align-items:flex-start}.row>div{flex:none}.small{color:#666;font-size:13px}
td{padding:1px 8px 1px 0;white-space:pre}.bar{background:#3b6fb6;height:12px}.text{line-height:1.9}
.text span{white-space:pre-wrap;padding:2px 0}img{display:block;image-rendering:pixelated;border:1px solid #ccc}"""


def image_tag(data: bytes, width: int = SHOWN) -> str:
    return f'<img width="{width}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def page(
    answer: Answer, question: str, tokenizer, k: int = 8, layer: int | None = None
) -> tuple[str, list[bytes]]:
    """The page as HTML, and the PNG of each token's heat maps, side by side."""
    pieces = [
        "<image>" if i == IMAGE_TOKEN else tokenizer.decode([i]) or tokenizer.token(i)
        for i in answer.ids.tolist()
    ]
    shares = (answer.attention.mean(0) if layer is None else answer.attention[layer]).cpu()
    image = (answer.ids == IMAGE_TOKEN).cpu()
    maps = {
        "attention": answer.attention_map(layer),
        "similarity": answer.similarity,
        "occlusion": answer.occlusion,
    }
    maps = {name: values for name, values in maps.items() if values is not None}
    said = html.escape("".join(pieces[answer.first :]))
    parts = [
        f"<p><b>{html.escape(question)}</b> {said}</p>",
        image_tag(png(heat(answer.picture, torch.zeros(1, 1))), 120),
    ]
    pngs = []
    for w, p in enumerate(answer.probabilities.cpu()):
        word, top = pieces[answer.first + w], p.topk(min(k, len(p)))
        bars = "".join(
            f"<tr><td>{html.escape(repr(tokenizer.decode([i]) or tokenizer.token(i) or '')[1:-1])}</td>"
            f'<td>{100 * q:.1f} %</td><td><div class="bar" style="width:{130 * q:.0f}px"></div></td></tr>'
            for q, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        )
        drawn = [heat(answer.picture, values[w]) for values in maps.values()]
        strip = Image.new("RGB", (len(drawn) * (SHOWN + 8) - 8, SHOWN), "white")
        for i, one in enumerate(drawn):
            strip.paste(one, (i * (SHOWN + 8), 0))
        pngs.append(png(strip))
        share, most = shares[w][image].sum().item(), shares[w][~image].max().item()
        notes = {
            "attention": f"{100 * share:.0f} % of it on the picture",
            "similarity": f"cosine {answer.similarity[w].min():.2f} to {answer.similarity[w].max():.2f}"
            if "similarity" in maps
            else "",
            "occlusion": f"at most {answer.occlusion[w].max():.2f} nats",
        }
        text, skip = "", False
        for at in range(answer.first + w):
            if not image[at]:
                shade = shares[w][at].item() / max(most, 1e-12)
                text += f'<span style="background:rgba(220,20,20,{0.7 * shade:.2f})">{html.escape(pieces[at])}</span>'
            elif not skip:
                text += f'<span class="small">[picture {100 * share:.0f} %]</span>'
            skip = bool(image[at])
        figures = "".join(
            f'<div>{image_tag(png(one))}<span class="small">{name}: {notes[name]}</span></div>'
            for name, one in zip(maps, drawn, strict=True)
        )
        parts.append(
            f"<h2>{w + 1}. {html.escape(word)}</h2><div class=row>{figures}<div><table>{bars}</table></div></div>"
        )
        parts.append(
            f'<p class="text"><span class="small">attention to the text: </span>{text}</p>'
        )
    parts.append(f'<p class="small">{html.escape(__doc__[__doc__.index("- the likeliest") :])}</p>')
    head = f"<!doctype html><meta charset=utf-8><title>{html.escape(question)}</title><style>{STYLE}</style>"
    return head + "\n".join(parts) + "\n", pngs


def main(argv: list[str]):
    parser = config.parser(__doc__)
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--model", required=True, help="folder or Hugging Face id of a trained model"
    )
    parser.add_argument("--image", required=True, help="a picture")
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument("--layer", type=int, help="attention of this layer alone, counted from 0")
    parser.add_argument(
        "--top-k", type=int, default=8, help="how many tokens to show in each place (8)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=16, help="longest answer (16)")
    a = parser.parse_args(argv)
    device, folder = "cuda" if torch.cuda.is_available() else "cpu", resolve(a.model)
    model, tokenizer = LLaVA.from_pretrained(folder, device=device), load_tokenizer(folder)
    layers = len(model.language_model.blocks)
    if a.layer is not None and not 0 <= a.layer < layers:
        raise UserError(
            "--layer", f"{a.layer}: the model has {layers} layers", f"give 0 to {layers - 1}"
        )
    try:
        picture = model.vision_tower.processor.pixels(load_image(a.image), model.config.image_mode)
    except ValueError as e:
        raise UserError(a.image, str(e), "give an image file") from None
    template, turn = (
        model.config.template,
        {"from": "human", "value": f"{IMAGE}\n{a.prompt.replace(IMAGE, '')}"},
    )
    prompt, eos = encode_prompt([turn], tokenizer, template), stop_id(tokenizer, template)
    pixels = model.vision_tower.processor.normalise(picture[None]).to(device)
    made = model.generate(
        [torch.tensor(prompt)], images=pixels, max_new_tokens=a.max_new_tokens, eos_token_id=eos
    )
    answer = [t for t in made[0].tolist() if t != eos]
    if not answer:
        raise UserError("--prompt", "the model answers nothing to it", "ask something else")
    text, pngs = page(look(model, prompt, answer, picture), a.prompt, tokenizer, a.top_k, a.layer)
    for i, data in enumerate(pngs, 1):
        write_file(Path(a.out) / f"token-{i}.png", data)
    write_file(Path(a.out) / "index.html", text)
    print(f"{tokenizer.decode(answer).strip()}: {Path(a.out) / 'index.html'}")


if __name__ == "__main__":
    config.cli(main, __doc__)
