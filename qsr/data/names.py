"""Names on disk: which are nobody's data, which look alike, and how to tell them apart."""

import unicodedata

SERVICE_NAMES = frozenset(
    {
        "@eaDir", "#recycle", "@Recycle", "@Recently-Snapshot", "#snapshot",  # Synology, QNAP
        "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information",
        "Thumbs.db", "desktop.ini", "__pycache__",
    }
)  # fmt: skip
"""What archivers, file servers and desktops leave in folders, beside what begins with a dot."""


def is_service(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or was left by a program for itself."""
    return name[0] == "." or name in SERVICE_NAMES


def same_letters(name: str) -> str:
    """What names have in common that differ only in how Unicode composes their letters."""
    return unicodedata.normalize("NFC", name)


def appearance(name: str) -> str:
    """What names have in common that a reader takes for one: composition, case and blanks do not
    count."""
    return same_letters(" ".join(same_letters(name).casefold().split()))


def how_they_differ(one: str, other: str) -> str:
    """Two names that look alike, written so that they can be told apart."""
    same = same_letters(one) == same_letters(other)
    kind = "in their Unicode form" if same else "in case or blanks"
    return f"{one!a} and {other!a} differ only {kind}"
