"""Looks drawn on one sheet: a page of HTML that holds its pictures, or a single PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from zeroflow.studies.looks import IMAGES, PARTS, REACH, Look, as_it_is

LEGEND = (
    "Above: what the model gets, mapped back to pixels, which shows crops, mirroring and classes; training images are as random "
    f"as in training. Below: the model's own numbers on one scale for all, black is {-REACH:g}, grey 0, white {REACH:g}. A photo lies "
    "around grey there: from about -2 to 2 with the mean and std of ImageNet or CLIP, from -1 to 1 where both are 0.5. One that is "
    "nowhere darker than grey is not normalised; one that is black and white alone has a std that is too small. The numbers are of "
    "all images that are shown."
)

_LEAST = 96  # pixels of a picture's side, at least
_GAP, _LINE, _FONT = 8, 18, 13


def html(looks: Sequence[Look]) -> str:
    """A page with a section for each look; pictures are PNG files in it, with the pixels that ``Look.mapped_back`` gives."""
    parts = [_HEAD, f"<h1>What the model sees</h1><p>{escape(LEGEND)}</p>"]
    for look in looks:
        parts.append(f"<h2>{escape(look.title)}</h2><p class=numbers>{'<br>'.join(map(escape, look.numbers()))}</p>")
        for number, task in enumerate(look.tasks):
            for part, images in zip(PARTS, task, strict=True):
                figures = [
                    f"<figure>{_img(look.mapped_back(shown))}{_img(as_it_is(shown), coarse=True)}"
                    f"<figcaption>{escape(shown.class_name)}</figcaption></figure>"
                    for shown in images
                ]
                parts.append(f"<section><h3>task {number + 1}, {part}</h3>{''.join(figures)}</section>")
    return "\n".join([*parts, "</body></html>", ""])


def _img(picture: Tensor, coarse: bool = False) -> str:
    """A picture in the page; ``coarse``: with fewer pixels, as only its brightness is of interest."""
    side, content = max(len(picture), _LEAST), io.BytesIO()
    step = max(1, len(picture) // 64) if coarse else 1
    _image(picture[::step, ::step]).save(content, "png")
    source = base64.b64encode(content.getvalue()).decode()
    return f'<img width={side} height={side} alt="" src="data:image/png;base64,{source}">'


def png(looks: Sequence[Look]) -> Image.Image:
    """The same as one picture; small images are enlarged by a whole factor, others keep their pixels."""
    rows: list[Image.Image] = [_text(LEGEND, _width(looks))]
    for look in looks:
        rows += [_text(line, _width(looks)) for line in (look.title, *look.numbers())]
        for number, task in enumerate(look.tasks):
            for part, images in zip(PARTS, task, strict=True):
                names = ", ".join(shown.class_name for shown in images)
                rows.append(_text(f"task {number + 1}, {part}: {names}", _width(looks)))
                rows += [_strip([draw(shown) for shown in images]) for draw in (look.mapped_back, as_it_is)]
    sheet = Image.new("RGB", (_width(looks), sum(row.height + _GAP for row in rows) + _GAP), "white")
    top = _GAP
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + _GAP
    return sheet


def _width(looks: Sequence[Look]) -> int:
    return max(800, *(IMAGES * (look.size * _factor(look.size) + _GAP) + _GAP for look in looks))


def _factor(size: int) -> int:
    return -(-_LEAST // size)


def _strip(pictures: Sequence[Tensor]) -> Image.Image:
    factor = _factor(len(pictures[0]))
    side = len(pictures[0]) * factor
    strip = Image.new("RGB", ((side + _GAP) * len(pictures) + _GAP, side), "white")
    for number, picture in enumerate(pictures):
        large = picture.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
        strip.paste(_image(large), (_GAP + number * (side + _GAP), 0))
    return strip


def _text(text: str, width: int) -> Image.Image:
    """Words on white, in lines that fit into ``width``."""
    font, lines = ImageFont.load_default(_FONT), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width - 2 * _GAP:
            lines.append(word)
        else:
            lines[-1] = longer
    image = Image.new("RGB", (width, _LINE * len(lines)), "white")
    ImageDraw.Draw(image).multiline_text((_GAP, 0), "\n".join(lines), fill="black", font=font)
    return image


def _image(picture: Tensor) -> Image.Image:
    return Image.fromarray(picture.contiguous().numpy())


def _png_bytes(looks: Sequence[Look]) -> bytes:
    content = io.BytesIO()
    png(looks).save(content, "png")
    return content.getvalue()


FORMATS: Mapping[str, Callable[[Sequence[Look]], bytes]] = {
    ".html": lambda looks: html(looks).encode(), ".png": _png_bytes,
}  # fmt: skip
"""A sheet as a file's content, by the ending of the file's name."""

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>What the model sees</title><style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em; max-width: 90em }
h2, h3 { font-size: 1em; margin: 1.5em 0 .3em } h3 { font-weight: normal }
section { display: inline-block; margin-right: 2em; vertical-align: top }
.numbers { font-family: ui-monospace, monospace; font-size: .85em }
figure { display: inline-block; margin: 0 .5em .5em 0 } figcaption { font-size: .85em }
img { display: block; margin-bottom: 2px; image-rendering: pixelated }
</style></head><body>"""
