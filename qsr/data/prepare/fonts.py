"""The fonts of Debian's packages: which there are, and what is recorded of each."""

import hashlib
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from qsr.errors import DataError

_NAMES = """
    3270 adf-accanthis adf-baskervald adf-berenis adf-gillius adf-ikarius adf-irianis adf-libris
    adf-mekanus adf-oldania adf-romande adf-solothurn adf-switzera adf-tribun adf-universalis
    adf-verana aenigma agave aksharyogini2 alee allerta anonymous-pro aoyagi-soseki apropal
    arabeyes arapey arkpandora arundina atarismall averia-gwf averia-sans-gwf averia-serif-gwf
    b612 bajaderka bebas-neue beng-extra beteckna blankenburg bpg-georgian breip bwht cabin
    cabinsketch campania cantarell cardo cegui century-catalogue cherrybomb clear-sans cmu
    comfortaa comic-neue courier-prime croscore crosextra-caladea crosextra-carlito
    dancingscript dejavu-core deva-extra dkg-handwriting dosis dustin dzongkha ebgaramond
    ebgaramond-extra ecolier-court ecolier-lignes-court elstob engadget essays1743 eurofurence
    fantasma fantasque-sans fanwood farsiweb femkeklaver ferrite-core firacode freefarsi
    freefont-otf gamaliel gargi gemunu-libre georgewilliams gfs-artemisia gfs-didot
    gfs-neohellenic glasstty gnutypewriter go gotico-antiqua goudybookletter gujr-extra hack
    havana hermit hosny-amiri hosny-thabit humor-sans inconsolata inter isabella jetbrains-mono
    johnsmith-induni joscelyn junction jura karla karmilla kaushanscript khmeros
    klaudia-berenika kristi lao lato le-murmure league-mono league-spartan leckerli-one lemonada
    levien-museum lexi-gulim lg-aboriginal liberation2 lindenhill linex linuxlibertine lmodern
    lobstertwo manrope meera-inimai misaki mmcedar monlam monofur monoid mononoki
    morisawa-bizud-mincho motoya-l-cedar motoya-l-maruberi myanmar nakula national-park ocr-a
    ocr-b okolaks oldstandard open-sans opendin opendyslexic osifont oxygen pagul paktype
    paratype pc pc-extra play povray prociono proggy quattrocento quicksand radisnoir
    ricty-diminished rit-sundar roadgeek roboto-slab roboto-unhinted routed-gothic rufscript
    sahadeva sarai sawarabi-gothic sawarabi-mincho senamirmir-washra sil-abyssinica sil-akatab
    sil-alkalami sil-andika sil-annapurna sil-charis sil-dai-banna sil-doulos sil-ezra
    sil-galatia sil-gentium-basic sil-harmattan sil-lateef sil-mingzat sil-mondulkiri
    sil-mondulkiri-extra sil-nuosusil sil-padauk sil-scheherazade sil-sophia-nubian sil-tagmukay
    sil-taiheritagepro sil-zaghawa-beria sixtyfour sjfonts smiley-sans sora spleen staypuft
    summersby taml-tamu taml-tscu teluguvijayam terminus texgyre tiresias tlwg-garuda-ttf
    tlwg-kinnari-ttf tlwg-laksaman-ttf tlwg-loma-ttf tlwg-mono-ttf tlwg-norasi-ttf
    tlwg-purisa-ttf tlwg-sawasdee-ttf tlwg-typewriter-ttf tlwg-typist-ttf tlwg-typo-ttf
    tlwg-umpush-ttf tlwg-waree-ttf tomsontalks triod-postnaja tuffy ubuntu-title ukij-uyghur
    unikurdweb uralic urw-base35 vollkorn woowa-bm yanone-kaffeesatz yrsa-rasa
"""

PACKAGES = tuple(f"fonts-{name}" for name in _NAMES.split())
"""Packages with fonts that have the Latin letters: 170 MB of archives in Debian 12."""

DOCUMENTS = Path("/usr/share/doc")
ENDINGS = (".ttf", ".otf")


class Font(NamedTuple):
    """A font file, with what the manifest says of it."""

    path: Path
    sha256: str
    package: str
    version: str
    licence: str
    """Short names from the package's copyright file, or where to read it."""


def installed_fonts(packages: Sequence[str] = PACKAGES) -> list[Font]:
    """All font files of these packages, sorted by path; a file that is there twice comes once.

    Raises:
        DataError: a package is not installed, or this is not a Debian system.
    """
    versions = _versions(packages)
    missing = [name for name in packages if name not in versions]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(packages)} font packages are missing: apt-get install "
            f"--no-install-recommends {' '.join(missing)}"
        )
    fonts: dict[str, Font] = {}
    for path, package in sorted(_files(packages)):
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        licence = licence_of(DOCUMENTS / package / "copyright")
        fonts.setdefault(found, Font(path, found, package, versions[package], licence))
    return list(fonts.values())


def licence_of(copyright_file: Path) -> str:
    """The licences that a Debian copyright file names, separated by semicolons."""
    try:
        text = copyright_file.read_text(errors="replace")
    except OSError:
        return f"see {copyright_file}"
    names = re.findall(r"^License: *(\S.*)$", text, re.MULTILINE)
    return "; ".join(dict.fromkeys(name.strip() for name in names)) or f"see {copyright_file}"


def _versions(packages: Sequence[str]) -> dict[str, str]:
    """Package -> version, of those that are installed."""
    form = "${db:Status-Status} ${Package} ${Version}\n"
    lines = _ask_dpkg("--show", f"--showformat={form}", *packages)
    rows = [line.split() for line in lines]
    return {row[1]: row[2] for row in rows if row[0] == "installed"}


def _files(packages: Sequence[str]) -> Iterable[tuple[Path, str]]:
    """Each font file with its package."""
    for package in packages:
        for line in _ask_dpkg("--listfiles", package):
            path = Path(line)
            if path.suffix.lower() in ENDINGS and path.is_file() and not path.is_symlink():
                yield path, package


def _ask_dpkg(*words: str) -> list[str]:
    try:
        # it exits with 1 if a package is unknown, and still answers for the others
        answer = subprocess.run(["dpkg-query", *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise DataError(
            "the glyphs come from Debian's font packages, and there is no dpkg-query here: prepare "
            "them on a Debian system and copy the folder"
        ) from None
    return answer.stdout.splitlines()
