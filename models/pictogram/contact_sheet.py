"""Draw the contact sheet of the README: `python models/pictogram/contact_sheet.py docs/pictogram.png`."""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import sdonnx

PROMPTS = (
    "a red apple on a blue background",
    "a tiger on a white background",
    "an owl on a pink background",
    "a slice of pizza on a black background",
    "a frog face on a yellow background",
    "a cactus on an orange background",
    "a strawberry on a gray background",
    "a dolphin on a green background",
    "a penguin on a purple background",
    "a doughnut on a white background",
    "a sunflower on a black background",
    "a fox face on a green background",
    "an octopus on a yellow background",
    "a birthday cake on a blue background",
    "a panda face on a red background",
    "a pineapple on a purple background",
    "a butterfly on a gray background",
    "a mushroom on a blue background",
    "a hamburger on an orange background",
    "a parrot on a pink background",
    "a turtle on a white background",
    "an avocado on a red background",
    "a whale on a yellow background",
    "a cherry blossom on a black background",
)
TILE, LINE, COLUMNS = 128, 16, 6


def main() -> None:
    """Generate prompt i with seed i, upscaled by 2, above its text."""
    sheet = Image.new("RGB", (COLUMNS * TILE, len(PROMPTS) // COLUMNS * (TILE + LINE)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    with sdonnx.load("pictogram", memory="max") as pipe:
        for seed, prompt in enumerate(PROMPTS):
            left, top = seed % COLUMNS * TILE, seed // COLUMNS * (TILE + LINE)
            image = pipe.generate(prompt, seed=seed).images[0]
            sheet.paste(image.resize((TILE, TILE), Image.Resampling.LANCZOS), (left, top))
            text = prompt.removesuffix(" background").split(" ", 1)[1]
            draw.text((left + 4, top + TILE + 2), text, fill="black", font=font)
    sheet.save(Path(sys.argv[1]), optimize=True)


if __name__ == "__main__":
    main()
