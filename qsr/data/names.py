"""File names: which are not data, which look alike, and how two of them differ."""

import unicodedata

SERVICE_NAMES = frozenset(
    {
        "@eaDir", "#recycle", "@Recycle", "@Recently-Snapshot", "#snapshot",  # Synology, QNAP
        "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information",
        "Thumbs.db", "desktop.ini", "__pycache__",
    }
)  # fmt: skip
"""Files and folders that archivers, file servers and desktops create. Names that start with a dot
are hidden as well."""


def is_service(name: str) -> bool:
    """Whether a file or folder with this name is hidden, or a program's own."""
    return name[0] == "." or name in SERVICE_NAMES


def same_letters(name: str) -> str:
    """The name in Unicode's composed form (NFC): a key for names that differ only in it."""
    return unicodedata.normalize("NFC", name)


def appearance(name: str) -> str:
    """A key for names that look alike: Unicode form, case and whitespace do not count."""
    return same_letters(" ".join(same_letters(name).casefold().split()))


def how_they_differ(one: str, other: str) -> str:
    """Two similar names in ASCII, and what distinguishes them."""
    same = same_letters(one) == same_letters(other)
    kind = "in their Unicode form" if same else "in case or whitespace"
    return f"{one!a} and {other!a} differ only {kind}"
