"""Render the 60 sprites of Emoji Scenes into sdlib/assets/sprites (run once, by us).

    apt-get install fonts-noto-color-emoji
    python tools/make_sprites.py [path/to/NotoColorEmoji.ttf]

The font (SIL Open Font License 1.1) holds bitmaps of one size, 136 x 128 pixels. Each is
cropped to its content and shrunk, in premultiplied alpha, so that its longer side is
60 pixels in the middle of a transparent tile of 64 x 64. All tiles go into one sheet.
"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
TARGET = Path(__file__).parent.parent / "sdlib" / "assets" / "sprites"
TILE, CONTENT, COLUMNS = 64, 60, 10

OBJECTS = {
    "fox": "🦊", "pizza": "🍕", "panda": "🐼", "apple": "🍎", "cat": "🐱", "dog": "🐶",
    "frog": "🐸", "tree": "🌳", "car": "🚗", "rocket": "🚀", "guitar": "🎸",
    "penguin": "🐧", "owl": "🦉", "butterfly": "🦋", "turtle": "🐢", "octopus": "🐙",
    "elephant": "🐘", "pig": "🐷", "rabbit": "🐰", "whale": "🐳", "crab": "🦀",
    "parrot": "🦜", "banana": "🍌", "strawberry": "🍓", "watermelon": "🍉",
    "pineapple": "🍍", "carrot": "🥕", "mushroom": "🍄", "cactus": "🌵",
    "sunflower": "🌻", "star": "⭐", "donut": "🍩", "burger": "🍔", "cake": "🎂",
    "house": "🏠", "crown": "👑", "robot": "🤖", "umbrella": "☂", "ghost": "👻",
    "sailboat": "⛵", "gift": "🎁", "clock": "⏰",
}
COLORS = ["red", "orange", "yellow", "green", "blue", "purple"]
FAMILIES = {"heart": "❤🧡💛💚💙💜", "circle": "🔴🟠🟡🟢🔵🟣", "square": "🟥🟧🟨🟩🟦🟪"}


def glyph(font: ImageFont.FreeTypeFont, text: str) -> Image.Image:
    """One emoji, cropped to its content, as a centered TILE x TILE picture."""
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((12, 12), text, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        sys.exit(f"the font has no picture for {text!r}")
    content = canvas.crop(box)
    shrink = CONTENT / max(content.size)
    size = tuple(max(1, round(side * shrink)) for side in content.size)
    # Pillow resizes RGBA through premultiplied alpha, so no dark fringes arise
    content = content.resize(size, Image.Resampling.LANCZOS)
    tile = Image.new("RGBA", (TILE, TILE), (0, 0, 0, 0))
    tile.paste(content, ((TILE - size[0]) // 2, (TILE - size[1]) // 2))
    return tile


def main() -> None:
    font = ImageFont.truetype(sys.argv[1] if len(sys.argv) > 1 else FONT, 109)
    emoji = dict(OBJECTS)
    for shape, characters in FAMILIES.items():
        for color, character in zip(COLORS, characters, strict=True):
            emoji[f"{color} {shape}"] = character
    rows = -(-len(emoji) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * TILE, rows * TILE), (0, 0, 0, 0))
    sprites = []
    for k, (name, character) in enumerate(emoji.items()):
        tile = glyph(font, character)
        left, top, right, bottom = tile.getbbox()
        sheet.paste(tile, (k % COLUMNS * TILE, k // COLUMNS * TILE))
        sprites.append({"name": name, "emoji": f"U+{ord(character):04X}",
                        "width": right - left, "height": bottom - top})
    TARGET.mkdir(parents=True, exist_ok=True)
    sheet.save(TARGET / "sprites.png", optimize=True)
    about = {"source": "Noto Color Emoji, SIL Open Font License 1.1 (see OFL.txt)",
             "tile": TILE, "content": CONTENT, "columns": COLUMNS, "sprites": sprites}
    text = json.dumps(about, indent=1, ensure_ascii=False)
    (TARGET / "sprites.json").write_text(text + "\n", encoding="utf-8")
    print(f"{len(sprites)} sprites, {(TARGET / 'sprites.png').stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
