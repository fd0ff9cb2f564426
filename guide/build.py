"""Build the guide as one page for reading without a network: out/guide.html.

    python -m guide.build            # or `make guide`
    python -m guide.build FILE.html

Style sheet and figures are inside the page; it has no script. To see it as a picture:

    chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1200,2400 \\
        --screenshot=guide.png out/guide.html
"""

import base64
import re
from html import escape
from pathlib import Path

import command_line
from checkpoints.files import write_file
from config import UserError
from guide.blocks import GUIDE, ROOT, chapters, markdown_parser
from guide.check import anchor_of

GLOSSARY = GUIDE / "glossary.md"
TYPES = {".svg": "image/svg+xml", ".png": "image/png"}


class Page:
    """The chapters as sections of one page. Anchors are "CHAPTER" and "CHAPTER--HEADING"."""

    def __init__(self):
        self.parser = markdown_parser()
        self.file = None  # the chapter that is being written
        rules = {
            "fence": self.fence,
            "heading_open": self.heading_open,
            "image": self.image,
            "link_open": self.link_open,
            "table_open": lambda *_: '<div class="wide"><table>\n',
            "table_close": lambda *_: "</table></div>\n",
        }
        for name, rule in rules.items():
            # markdown-it calls a rule as a method of its renderer, which none of these needs.
            self.parser.renderer.rules[name] = rule

    def section(self, file: Path) -> tuple[str, str]:
        """Return the title of a chapter and its HTML."""
        self.file = file
        text = file.read_text()
        title = re.match(r"# (.+)", text).group(1)
        return title, self.parser.render(text)

    def fence(self, tokens, i: int, options, env) -> str:
        """Return a block of code, with a line above that says what it is."""
        info = tokens[i].info.split()
        language = info[0] if info else ""
        text = tokens[i].content
        if language == "output":
            return f'<pre class="output"><code>{escape(text)}</code></pre>\n'

        caption = ""
        for word in info[1:]:
            key, _, value = word.partition("=")
            if key == "source":
                file, _, name = value.partition(":")
                caption = f'<a href="../{file}">{file}</a> {escape(name)}'
            elif key == "demo":
                caption = "with the trained model of <code>make demo</code>"
        if caption:
            caption = f"<figcaption>{caption}</figcaption>"
        return f'<figure class="code">{caption}<pre>{coloured(text, language)}</pre></figure>\n'

    def heading_open(self, tokens, i: int, options, env) -> str:
        """Return the beginning of a heading, with its anchor."""
        level = tokens[i].tag
        name = self.file.stem
        if level != "h1":
            name += "--" + anchor_of(tokens[i + 1])
        return f'<{level} id="{name}">'

    def image(self, tokens, i: int, options, env) -> str:
        """Return a figure that holds the picture itself."""
        token = tokens[i]
        file = self.file.parent / token.attrs["src"]
        data = base64.b64encode(file.read_bytes()).decode()
        kind = TYPES[file.suffix]
        return f'<img src="data:{kind};base64,{data}" alt="{escape(token.content)}">'

    def link_open(self, tokens, i: int, options, env) -> str:
        """Return the beginning of a link: to a section of the page, or to a file beside out/."""
        return f'<a href="{escape(self.target(tokens[i].attrs["href"]))}">'

    def target(self, link: str) -> str:
        """Return where a link of a chapter leads on the page."""
        if re.match(r"\w+:", link):
            return link
        name, _, anchor = link.partition("#")
        file = (self.file.parent / name).resolve() if name else self.file
        if file in (*chapters(), GLOSSARY):
            return f"#{file.stem}--{anchor}" if anchor else f"#{file.stem}"
        return f"../{file.relative_to(ROOT)}"


def coloured(code: str, language: str) -> str:
    """Return code as HTML with classes of Pygments. Raise UserError where it is not installed."""
    try:
        from pygments import highlight
        from pygments.formatters import HtmlFormatter
        from pygments.lexers import get_lexer_by_name
        from pygments.util import ClassNotFound
    except ImportError:
        raise UserError("guide", "pygments is not installed", "pip install '.[guide]'") from None
    try:
        lexer = get_lexer_by_name(language or "text")
    except ClassNotFound:
        lexer = get_lexer_by_name("text")
    return f"<code>{highlight(code, lexer, HtmlFormatter(nowrap=True))}</code>"


def colour_rules() -> str:
    """Return the style sheet of the code, for light and for dark pages."""
    from pygments.formatters import HtmlFormatter

    light = HtmlFormatter(style="friendly").get_style_defs(".code pre")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".code pre")
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"


def build() -> str:
    """Return the whole page."""
    page = Page()
    sections = []
    for file in [*chapters(), GLOSSARY]:
        title, body = page.section(file)
        sections.append((file.stem, title, body))

    contents = ""
    written = ""
    for i, (name, title, body) in enumerate(sections):
        contents += f'<li><a href="#{name}">{escape(title)}</a></li>\n'
        leads = ""
        if i > 0:
            before, title_before, _ = sections[i - 1]
            leads += f'<a href="#{before}">← {escape(title_before)}</a>'
        if i + 1 < len(sections):
            after, title_after, _ = sections[i + 1]
            leads += f'<a href="#{after}" class="next">{escape(title_after)} →</a>'
        written += f'<section>\n{body}<p class="leads">{leads}</p></section>\n'

    style = (GUIDE / "build.css").read_text() + colour_rules()
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>How a small multimodal model works</title>
<style>{style}</style></head>
<body>
<input type="checkbox" id="menu"><label for="menu">Contents</label>
<nav><p class="name">How a small multimodal model works</p><ul>
{contents}</ul></nav>
<main>
{written}</main>
</body></html>
"""


def main(argv: list[str]):
    parser = command_line.parser(__doc__)
    parser.prog = "-m guide.build"
    parser.add_argument("out", nargs="?", default="out/guide.html", metavar="FILE")
    options = parser.parse_args(argv)

    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, build().encode())
    print(f"{out}: {len(chapters())} chapters, {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    command_line.cli(main, __doc__)
