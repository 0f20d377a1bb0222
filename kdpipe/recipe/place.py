"""The paths that a recipe and the command line name."""

from __future__ import annotations

import os
from pathlib import Path

from kdpipe.errors import RecipeError, refusal

SHOWN = 120
"""Characters of a path that a message repeats."""


def place_of(name: str | Path, folder: Path | None = None) -> Path:
    """The absolute path that `name` means from `folder` on, or from here; it may be that nothing is there.

    Raises RecipeError where the system takes no such name: a null byte, text that is not UTF-8, a link to itself, a
    part that is too long or a file, a user without a home, a working folder that was removed.
    """
    text = os.fspath(name)
    shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    try:
        path = ((folder or Path()) / Path(text).expanduser()).absolute()
        str(path).encode()
        path.stat()
    except UnicodeEncodeError:
        raise RecipeError(f"{shown}: a path that is not UTF-8", hint="name another place") from None
    except ValueError:
        raise RecipeError(f"{shown}: a path with a null byte", hint="name another place") from None
    except RuntimeError:
        raise RecipeError(
            f"{shown}: there is no such user", hint="a folder of this name here is ./~..."
        ) from None
    except FileNotFoundError as error:
        if error.filename is None:  # of the working folder
            raise refusal(error) from None
    except OSError as error:
        error.filename = shown
        raise refusal(error) from None
    return path
