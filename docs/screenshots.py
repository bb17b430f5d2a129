"""Pictures of each page of the site, to be looked at: ``python docs/screenshots.py OUT [PAGE…]``.

After ``make docs``. Each page of build/site is opened in a headless Chromium, light and dark, wide
(1,280 pixels) and narrow (400). Its first 2,000 pixels become OUT/PAGE-light-wide.png and so on.
A PAGE is a part of a page's path; without one, all pages but those that show a file as it is.
"""

import argparse
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

SITE = Path(__file__).parents[1] / "build/site"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SCHEMES = {"dark": 0, "light": 1}  # Blink's numbers of them
WIDTHS = {"wide": 1280, "narrow": 400}
HEIGHT = 2000


def pages(site: Path, named: list[str]) -> Iterator[Path]:
    """Pages that are asked for."""
    for page in sorted(site.rglob("*.html")):
        name = page.relative_to(site).as_posix()
        # 404.html is for a server: from a file it finds no style.
        if any(x in name for x in named) or not (named or name.startswith(("source/", "404"))):
            yield page


def command(browser: str, page: Path, scheme: str, width: str, picture: Path) -> list[str]:
    """What takes one picture."""
    return [
        browser,
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        "--allow-file-access-from-files",
        f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
        f"--window-size={WIDTHS[width]},{HEIGHT}",
        "--virtual-time-budget=3000",
        f"--screenshot={picture}",
        page.resolve().as_uri(),
    ]


def main() -> None:
    """Take them all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("pages", nargs="*")
    parser.add_argument("--site", type=Path, default=SITE)
    given = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        parser.error(f"none of {', '.join(BROWSERS)} is installed")
    if not (given.site / "index.html").is_file():
        parser.error(f"{given.site} has no site: make docs builds it")
    given.out.mkdir(parents=True, exist_ok=True)
    for page in pages(given.site, given.pages):
        name = page.relative_to(given.site).with_suffix("").as_posix().replace("/", "-")
        for scheme in SCHEMES:
            for width in WIDTHS:
                picture = given.out / f"{name}-{scheme}-{width}.png"
                words = command(browser, page, scheme, width, picture)
                subprocess.run(words, check=True, capture_output=True, timeout=120)
                print(picture, flush=True)


if __name__ == "__main__":
    main()
