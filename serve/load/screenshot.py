"""A picture of a report for a README: the whole page in headless Chromium, cut at its end, in few colours.

    python serve/load/screenshot.py load-results/quick-20260101-120000/report.html docs/images/load.png

Needs Chromium (Debian: apt-get install chromium) and Pillow, which matplotlib brings.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image, ImageChops

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--headless", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-background-networking"]
FLAGS += [
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--no-sandbox",
]  # our own page, also as root
TALL, MARGIN = 12000, 24
COLOURS = 256


def main(
    page: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="An HTML file.")],
    picture: Annotated[Path, typer.Argument(help="The PNG to write.")],
    width: Annotated[int, typer.Option(min=300, help="Of the window, in pixels.")] = 1200,
    dark: Annotated[bool, typer.Option(help="As a browser that prefers dark pages.")] = False,
) -> None:
    """Take a picture of a whole page.

    Exit status: 0 it is there, 1 the browser made none, 2 there is no browser.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser:
        print(f"screenshot: none of {', '.join(BROWSERS)} is installed: apt-get install chromium", file=sys.stderr)
        raise typer.Exit(2)
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "page.png"
        command = [browser, *FLAGS, f"--user-data-dir={folder}/profile", f"--window-size={width},{TALL}"]
        command += [*(["--force-dark-mode"] if dark else []), f"--screenshot={shot}", page.resolve().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        if not shot.exists():
            print(f"screenshot: {browser} made no picture:\n{done.stderr[-2000:]}", file=sys.stderr)
            raise typer.Exit(1)
        image = Image.open(shot).convert("RGB")
    background = Image.new("RGB", image.size, image.getpixel((0, TALL - 1)))
    content = ImageChops.difference(image, background).getbbox() or (0, 0, *image.size)
    picture.parent.mkdir(parents=True, exist_ok=True)
    image.crop((0, 0, width, min(TALL, content[3] + MARGIN))).quantize(COLOURS, Image.Quantize.MAXCOVERAGE).save(
        picture, optimize=True
    )
    print(f"{picture}: {picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    typer.run(main)
